"""The commands: each resolves its inputs, calls the packages below, publishes artifacts and logs."""
