"""Figures of the report: functions from arrays or data frames to one SVG element. matplotlib is imported when they draw."""
