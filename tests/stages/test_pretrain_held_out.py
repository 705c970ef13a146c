"""Pretraining with held-out cells, as a stage."""

import dataclasses

import numpy as np
import pytest
import torch

from mixgf.config import data, run, training
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.execution import LocalExecutor
from mixgf.stages import pretrain
from mixgf.training import checkpoints, held_out_loss

CONFIG = run.Config(
    model=training.Model(num_layers=1, dim=32, num_heads=4, ffn_dim=48, max_positions=40),
    tokens=data.Tokens(max_len=40), tracking=run.Tracking(uri="off"),
    train=training.Train(
        epochs=3, batch_cells=6, lr=1e-2, warmup_steps=2, log_steps=1, checkpoint_steps=3, heldout_share=0.3, heldout_steps=2
    ),
)  # fmt: skip


@pytest.mark.parametrize("publish", ["last", "best"])
def test_the_published_weights_are_the_last_or_those_with_the_lowest_loss(make_corpus, tmp_path, monkeypatch, publish):
    """The held-out loss is made to be lowest at the second of five evaluations; the fourth one in a row that is not ends the run."""
    corpus = make_corpus(np.random.default_rng(0).integers(5, 30, 23), np.arange(23) % 2, [9, 14])
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr(held_out_loss.HeldOutLoss, "__call__", lambda *_: {held_out_loss.METRIC: next(losses)})
    train = dataclasses.replace(CONFIG.train, publish=publish, patience=2)
    config = dataclasses.replace(CONFIG, output=str(tmp_path), inputs=run.Inputs(corpus=corpus), train=train)
    uri = pretrain.run(config, executor=LocalExecutor())
    model, record = checkpoint.load_model(uri)
    expected = MaskedModel(config.model, model.encoder.vocab_size)
    checkpoints.load_step_weights(uri, {"last": 8, "best": 4}[publish], expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert record.counts == {"steps": 8, "epochs": 3, "cells": 17}
    assert record.details["held_out"] == {"cells": 6, "unit": "cell", "units": 6}
    assert record.config["train"]["heldout_share"] == 0.3
