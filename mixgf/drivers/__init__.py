"""The only package that imports Ray: resolve inputs, spread a pure function, publish, log. No arithmetic."""
