"""Species, gene names, orthologs, gene medians and the joint vocabulary of token ids.

Gene tables and column names in; Ensembl ids, medians and token ids out.
"""
