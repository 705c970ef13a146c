"""mixgf: one encoder for human and mouse single cells, from raw counts to perturbation screens, on Ray.

`mixgf --help` is the table of contents; `mixgf demo` runs every stage on bundled real cells.
"""

__version__ = "0.1.0"
