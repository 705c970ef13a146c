"""The models that `mixgf classify` scores, one class each, by one protocol (`protocol`).

To add a model, write its class in a file here and list it in `mixgf.classification.registry`; `genes_centroid` is a short example.
"""
