"""Stages on a cluster without nodes, under Ray's autoscaler with fake nodes: what they wait for is demand; after them nobody stays.

The pool of perturb: `stages/test_killed_perturb.py`.
"""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from fake_cluster import assert_up_and_down, autoscaled, until
from processes import die_with_us

from mixgf.config import data, parse, run, training
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import files

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def on_two_nodes(stage, chosen, folder, monkeypatch):
    """A stage as its own driver on a cluster that may have two nodes and starts with none."""
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(parse.to_dict(chosen)))
    command = die_with_us([sys.executable, "-m", "mixgf", stage, "--config", str(path), "--debug"])
    with autoscaled(folder, monkeypatch, most=2) as (made, sizes):
        environment = os.environ | {"RAY_ADDRESS": made.address}
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        until(lambda: sizes[-1] == 0, "a cluster without nodes for work")
    assert_up_and_down(sizes, most=2)


def shards(uri):
    return {name: files.sha256(f"{uri}/shards/{name}") for name in files.list_dir(f"{uri}/shards")}


def test_prepare_starts_from_no_nodes_and_leaves_none_with_the_same_shards(world, tmp_path, monkeypatch):
    chosen, _ = world
    chosen = dataclasses.replace(chosen, prepare=data.Prepare(shard_cells=1, block_cells=1))  # work for a while
    whole = prepare.run(dataclasses.replace(chosen, output=str(tmp_path / "whole")), executor=LocalExecutor())
    on_two_nodes(
        "prepare", dataclasses.replace(chosen, output=str(tmp_path / "run")), tmp_path / "cluster", monkeypatch
    )
    assert shards(tmp_path / "run" / "corpus") == shards(whole)


def test_pretraining_starts_from_no_nodes_and_leaves_none(make_corpus, tracking_uri, tmp_path, monkeypatch):
    uri = make_corpus(np.random.default_rng(0).integers(6, 18, 40), np.arange(40) % 2, [40])
    chosen = run.Config(
        output=str(tmp_path / "run"), inputs=run.Inputs(corpus=uri), tokens=data.Tokens(max_len=20),
        model=training.Model(num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_positions=20),
        train=training.Train(batch_cells=8, max_steps=5), compute=run.Compute(num_workers=2), tracking=run.Tracking(uri=tracking_uri),
    )  # fmt: skip
    on_two_nodes("pretrain", chosen, tmp_path / "cluster", monkeypatch)
    assert files.read_json(f"{tmp_path}/run/pretrain/record.json")["counts"]["steps"] == 5
