"""The results of a run as one HTML file that opens without a network.

From artifacts to a page, in three steps:

1. `load` reads records and tables of the finished stages into `RunResults` (`results`).
2. Every module of `sections` has one pure function, `section(results) -> Section`. A section is a title and a list of
   elements (`elements`): text, figures, tables, folded blocks. It says which command to run where a stage is not done.
   A section without elements is left out. `score_tables` and `verdicts` work out what the sections state, `wording` gives
   models, metrics and tasks their names for readers, and `figures` draws (matplotlib is imported there, when it draws).
3. `build` puts the sections in order and renders them with the template `resources/report.html.j2`.

A new section is a new module in `sections` and one entry in `build.SECTIONS`.

`run_text` prints a short summary at the end of `mixgf run`, and `corpus_text` the output of `mixgf inspect`.
"""
