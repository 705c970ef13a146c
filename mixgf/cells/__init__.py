"""Count files in (.h5ad, 10x .h5, Matrix Market), checked raw counts and quality-controlled cells out.

`open.open_reader` opens a file, `counts.read_blocks` checks its counts, `qc` and `doublets` decide which cells are kept.
"""
