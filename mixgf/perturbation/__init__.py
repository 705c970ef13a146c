"""In silico perturbation (paper section 4.2): which genes, deleted or overexpressed, move cells towards a state.

A corpus, an encoder and a config in; a table of genes with shifts and tests out. `operations` edits sentences, `shift`
scores them, `gene_table` tests the genes over donors.
"""
