"""The config of a run: sections and their fields, recipes, JSON and `--set`."""
