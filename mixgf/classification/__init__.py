"""Cell-type classification: labels, splits, models, metrics, kept classifiers and annotation."""
