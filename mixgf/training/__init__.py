"""Pretraining and the training loop: sentences and a model in, weights, metrics and checkpoints out.

`losses` holds the paper's eq. 1 to 3, `pretraining` applies them to a corpus, `loop.fit` trains any `TrainingTask`.
"""
