"""Medians from a sample of the cells: the stated error is the real one, and nothing else of the run changes them."""

import dataclasses

import numpy as np
import pytest
from executors import Through, backwards

from mixgf.config import data, run
from mixgf.corpus import prepare_passes
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.genes import medians
from mixgf.genes.vocabulary import Vocabulary
from mixgf.stages import prepare
from mixgf.storage import artifacts, files

CELLS = 600


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Human pancreas cells that come with mixgf."""
    return run.Config(
        output=str(tmp_path_factory.mktemp("all")), tracking=run.Tracking(uri="off"), qc=data.QC(doublets="off"),
        sources=(data.Source(uri="resource:pancreas_human_baron.h5ad", species="human"),),
        prepare=data.Prepare(shard_cells=700, block_cells=64),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(settings):
    return prepare.run(settings, executor=LocalExecutor())


def sampled(settings, tmp_path, name, cells=CELLS, executor=None, **options):
    chosen = dataclasses.replace(
        settings, output=str(tmp_path / name), vocab=data.Vocab(median_cells=cells),
        prepare=dataclasses.replace(settings.prepare, **options),
    )  # fmt: skip
    return prepare.run(chosen, executor=executor or LocalExecutor())


def median_of(uri):
    found = Vocabulary.load(uri).species_genes("human")
    return dict(zip(found.genes.tolist(), found.medians.tolist(), strict=True))


def test_the_stated_error_is_that_of_the_medians(settings, whole, tmp_path, monkeypatch):
    errors = []
    stated = medians.standard_errors
    monkeypatch.setattr(medians, "standard_errors", lambda *args: errors.append(stated(*args)) or dict(errors[-1]))
    uri = sampled(settings, tmp_path, "part")
    facts = artifacts.require(f"{tmp_path}/part/vocabulary", "vocabulary").details["sampled_medians"]["human"]
    kept = artifacts.require(whole, "corpus").counts["kept"]
    assert facts["of"] == kept == artifacts.require(uri, "corpus").counts["kept"]
    assert abs(facts["cells"] - CELLS) < 5 * np.sqrt(CELLS)
    exact, part = median_of(whole), median_of(uri)
    assert exact.keys() <= part.keys(), "every gene that a kept cell has"
    genes = sorted(part)
    away = np.array([part[genes[g]] / exact[genes[g]] - 1 for g in errors[0] if g < len(genes)])
    error = np.array([errors[0][g] for g in errors[0] if g < len(genes)]) * np.sqrt(1 - facts["cells"] / kept)
    assert facts["genes_with_error"] == len(error) > 3_000
    assert 0.75 < np.sqrt(np.mean((away / error) ** 2)) < 1.25  # one draw of cells moves all genes together
    assert facts["standard_errors"] == pytest.approx(np.quantile(error, [0.5, 0.95]).tolist())


def test_workers_shards_and_copies_change_no_byte_and_few_rows_are_read(settings, tmp_path, monkeypatch):
    rows, read = [], prepare_passes.read_kept

    def counting(plan):
        for table in read(plan):
            rows.append(len(table))
            yield table

    pipeline = dataclasses.replace(prepare_passes.sketch_medians, read=counting)
    monkeypatch.setattr(prepare_passes, "sketch_medians", pipeline)
    first = sampled(settings, tmp_path, "a", cells=150)
    sums = sum(rows)
    assert 100 < sums < 200, "rows of the sample alone are unpacked"
    expected = files.read_bytes(f"{first}/vocabulary.parquet")
    for name, options in (
        ("b", {"executor": Through(backwards)}), ("c", {"shard_cells": 311}), ("d", {"keep_counts": False, "block_cells": 50}),
    ):  # fmt: skip
        assert (
            files.read_bytes(f"{sampled(settings, tmp_path, name, cells=150, **options)}/vocabulary.parquet")
            == expected
        )


def test_a_sample_of_all_cells_is_no_sample(settings, whole, tmp_path):
    uri = sampled(settings, tmp_path, "all", cells=1_000_000)
    assert files.read_bytes(f"{uri}/vocabulary.parquet") == files.read_bytes(f"{whole}/vocabulary.parquet")
    assert "sampled_medians" not in artifacts.require(f"{tmp_path}/all/vocabulary", "vocabulary").details
    with pytest.raises(UserError, match=r"vocab.median_cells = 5: must be 0 or at least 100"):
        data.Vocab(median_cells=5)
