"""Comparison of species and encoders: the tables of `mixgf compare`.

`encoder_sets` lists what is compared: encoders with their corpora and classifications. The tables come from `spaces`
(embeddings and corresponding types), `transfer` (labels of one species predicted in the other), `shift_selection`,
`shift_matching` and `shift_tables` (which shift of one species is similar to which of the other), `conserved_response`
(perturbation of orthologs in two species) and `gene_networks` (neighbours of orthologs). `matched_null` permutes orthologs.
"""
