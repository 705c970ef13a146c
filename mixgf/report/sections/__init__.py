"""Sections of the report. Every module has one function: `section(results) -> Section`."""
