"""Files, tables and artifacts, on local disk or object storage. The only package that opens files."""
