"""Corpora of cell sentences: checked counts and a vocabulary in, Parquet shards of token ids and cell metadata out.

`rank_value` makes the sentences (paper section 3.2), `prepare_passes` and `import_passes` write corpora, `reader` reads them.
"""
