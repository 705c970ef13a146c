"""Every field that an arm may change in model, objective or train changes the losses of its training.

A sweep over a field that the training ignored would say "no effect". Each field is changed as an arm of `tune.space` is; the
arm's losses are compared with those of the base, step by step.
"""

from dataclasses import replace

import numpy as np
import pytest

from mixgf.config import training
from mixgf.config.data import Tokens, Vocab
from mixgf.config.fields import names
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import pretrain_inputs
from mixgf.training.loop import fit
from mixgf.training.pretraining import Pretraining, initial_model
from mixgf.training.worker_group import LocalContext
from mixgf.tuning import search_space

LOSSES = ("loss", "mlm", "contrast", "simcsepp", "ortholog")
STEPS = 4
ARMS = {
    "model.num_layers": (2, {}),
    "model.dim": (16, {}),
    "model.num_heads": (4, {}),
    "model.ffn_dim": (32, {}),
    "model.max_positions": (10, {}),
    "model.activation": ("gelu", {}),
    "model.dropout": (0.3, {}),
    "model.attention_dropout": (0.3, {}),
    "model.norm_eps": (0.1, {}),
    "model.init_sd": (0.1, {}),
    "model.start": ("svd", {}),
    "model.residual": (True, {"objective.pooling": "ranked"}),
    "objective.mlm_weight": (0.5, {}),
    "objective.mlm_fraction": (0.3, {}),
    "objective.contrast_weight": (0.1, {}),
    "objective.view": ("mask", {}),
    "objective.subsample_fraction": (0.5, {"objective.view": "subsample"}),
    "objective.neighbours": (1, {"objective.view": "neighbour"}),
    "objective.temperature": (0.2, {}),
    "objective.learn_temperature": (True, {}),
    "objective.projection": (12, {}),
    "objective.pooling": ("first", {}),
    "objective.simcsepp_weight": (0.1, {}),
    "objective.simcsepp_temperature": (1.0, {"objective.simcsepp_weight": 0.1}),
    "objective.ortholog_weight": (0.1, {}),
    "train.epochs": (4, {}),
    "train.max_steps": (STEPS, {}),
    "train.cells_share": (0.5, {}),
    "train.heldout_share": (0.3, {}),
    "train.batch_cells": (6, {}),
    "train.lr": (1e-3, {}),
    "train.schedule": ("constant", {}),
    "train.warmup_steps": (4, {}),
    "train.weight_decay": (0.5, {}),
    "train.clip": (0.01, {}),
    "train.precision": ("bf16", {}),
    "train.species_mix": ({"human": 0.9, "mouse": 0.1}, {}),
}
"""Field to another value, and what the base must have for the field to matter."""
ONE_WORKER = {"objective.gather_negatives": False, "train.reduce": "bf16"}
"""Fields that matter with several workers only, and another value; tests of `training` run them with several."""


@pytest.fixture(scope="module")
def corpus(make_corpus):
    uri = make_corpus(np.random.default_rng(0).integers(8, 24, 40), np.arange(40) % 2, [20, 20])
    return uri, Corpus(uri, max_len=24)


@pytest.fixture(scope="module")
def large_corpus(make_corpus):
    """Enough cells of a species in a shard for two neighbours."""
    return make_corpus(np.random.default_rng(0).integers(8, 24, 170), np.arange(170) % 2, [170])


def losses(config, uri):
    """The losses of the first steps: (step, name) to value."""
    corpus = Corpus(uri, max_len=config.model.max_positions)
    config = pretrain_inputs.prepared(config, corpus, LocalExecutor(), folder=f"{uri}-inputs")
    rows = fit(initial_model(config, corpus), Pretraining(config, corpus), config.train, LocalContext(), until=STEPS)
    found = {(step, name): value for step, _, name, value in rows if name in LOSSES}
    assert np.isfinite(list(found.values())).all()
    return found


def base(uri, needed):
    config = Config(
        model=training.Model(num_layers=1, dim=8, num_heads=2, ffn_dim=16, max_positions=24, init_sd=0.3), tokens=Tokens(max_len=24),
        vocab=Vocab(orthologs=(f"{uri}/orthologs.parquet",)),
        train=training.Train(epochs=2, batch_cells=8, lr=1e-2, warmup_steps=1, log_steps=1),
    )  # fmt: skip
    return search_space.make(config, needed).config


def test_every_field_that_an_arm_may_change_has_a_case():
    sections = {"model": training.Model, "objective": training.Objective, "train": training.Train}
    every = {f"{part}.{name}" for part, cls in sections.items() for name in names(cls, result=True)}
    assert every == set(ARMS) | set(ONE_WORKER) | set(search_space.WITHOUT_EFFECT)


@pytest.mark.parametrize("field", ARMS)
def test_a_changed_field_changes_the_losses(corpus, large_corpus, field):
    uri = large_corpus if field == "objective.neighbours" else corpus[0]
    value, needed = ARMS[field]
    config = base(uri, needed)
    arm = search_space.make(config, {field: value})
    assert arm.changes, "the arm differs from the base"
    ours, theirs = losses(arm.config, uri), losses(config, uri)
    shared = set(ours) & set(theirs)
    change = max(abs(ours[key] - theirs[key]) / abs(theirs[key]) for key in shared)
    assert change > 1e-4, f"{field} = {value!r} does not reach the training beyond rounding"


@pytest.mark.parametrize("field", sorted(ONE_WORKER))
def test_a_field_for_several_workers_changes_nothing_with_one(corpus, field):
    uri, _ = corpus
    config = base(uri, {})
    assert losses(search_space.make(config, {field: ONE_WORKER[field]}).config, uri) == pytest.approx(
        losses(config, uri), rel=1e-5
    )


def test_the_same_config_has_the_same_losses(corpus):
    """Without this, the test above could not fail."""
    uri, _ = corpus
    config = base(uri, {})
    assert losses(config, uri) == losses(replace(config), uri)


def test_a_species_that_the_corpus_has_not_is_refused(corpus):
    uri, found = corpus
    config = search_space.make(base(uri, {}), {"train.species_mix": {"rat": 1.0}}).config
    with pytest.raises(UserError, match="'rat': must be a species of the corpus"):
        Pretraining(config, found)
