"""`mixgf compare` from end to end on small invented cells of two species whose types and stimulus are alike by construction."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from invented import NUM_GENES, species, untrained_checkpoint
from scipy import sparse

from mixgf import across, artifacts, comparison, report, storage
from mixgf.config import QC, Classify, Compare, Config, Inputs, Model, Source, Tokens, Tracking, Train, UserError, Vocab
from mixgf.drivers import compare, dispatch, pieces, prepare

SMALL = Model(num_layers=1, dim=16, num_heads=2, ffn_dim=32, max_positions=32)
SHIFTS = (
    *(
        f"stimulus of {s}#immune=species == '{s}' and condition == 'rest' -> species == '{s}' and condition == 'stimulus'"
        for s in ("ant", "bee")
    ),
    *(
        f"a to b of {s}#type=species == '{s}' and cell_type == 'a' => species == '{s}' and cell_type == 'b'"
        for s in ("ant", "bee")
    ),
    "halves of ant=species == 'ant' and condition == 'rest' -> half",
)


def write(path: Path, prefix: str, seed: int) -> None:
    """120 cells of three types; genes 3 t to 3 t + 2 are high in type t, genes 10 to 13 rise with the stimulus."""
    rng = np.random.default_rng(seed)
    kinds, stimulus = rng.integers(0, 3, 120), np.arange(120) % 2
    rate = np.full((120, NUM_GENES), 2.0) * rng.gamma(4, 0.25, NUM_GENES)
    for i in range(3):
        rate[np.arange(120), 3 * kinds + i] += 12
    rate[stimulus == 1, 10:14] += 8
    obs = pd.DataFrame(
        {"cell_type": np.array(["a", "b", "c"])[kinds], "condition": np.array(["rest", "stimulus"])[stimulus], "organ": "blood",
         "donor": [f"{prefix}{i % 4}" for i in range(120)]}, index=[f"c{i}" for i in range(120)],
    )  # fmt: skip
    names = [f"{prefix}{i:05d}" for i in range(NUM_GENES)]
    anndata.AnnData(
        sparse.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=pd.DataFrame(index=names)
    ).write_h5ad(path)


def prepared(folder: Path, sharing: str, sources: Path) -> Config:
    rows = tuple(species(sources, n, p) for n, p in (("ant", "ENSA"), ("bee", "ENSB")))
    pairs = {row.name: [f"{row.gene_prefix}{i:05d}" for i in range(25)] for row in rows}
    pq.write_table(pa.table(pairs), sources / "orthologs.parquet")
    run = Config(
        output=str(folder / "run"), species=rows, model=SMALL, qc=QC(method="none"), tokens=Tokens(max_len=32), train=Train(micro_tokens=2048),
        sources=tuple(Source(uri=str(sources / f"{row.name}.h5ad"), species=row.name, name=row.name) for row in rows),
        vocab=Vocab(orthologs=(str(sources / "orthologs.parquet"),), sharing=sharing),
        tracking=Tracking(uri=f"sqlite:///{sources}/mlflow.db"),
        classify=Classify(num_hvgs=25),
        compare=Compare(cells=150, shifts=SHIFTS, num_permutations=99, controls=("majority", "hvg_logreg")),
    )  # fmt: skip
    prepare.run(run, spread=dispatch.loop)
    untrained_checkpoint(run, SMALL)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Config]:
    """Two corpora of the same cells, with separate ids and with shared ones, and an encoder on each."""
    folder = tmp_path_factory.mktemp("compare")
    for name, prefix, seed in (("ant", "ENSA", 1), ("bee", "ENSB", 2)):
        write(folder / f"{name}.h5ad", prefix, seed)
    return prepared(folder / "separate", "separate", folder), prepared(folder / "ortholog", "ortholog", folder)


@pytest.fixture(scope="module")
def done(runs: tuple[Config, Config]) -> Config:
    own, shared = runs
    run = replace(
        own, compare=replace(own.compare, encoders=(f"shared={shared.output}/pretrain@{shared.output}/corpus",))
    )
    compare.run(run, spread=pieces.loop)
    return run


def table(run: Config, name: str) -> pd.DataFrame:
    return storage.read_table(f"{run.output}/compare/{name}.parquet").to_pandas()


def test_labels_are_carried_both_ways_by_every_encoder_and_control(done: Config) -> None:
    found = table(done, "transfer")
    assert set(found["direction"]) == {"ant>bee", "bee>ant"}
    heads = {f"{h}{e}" for h in ("knn", "probe") for e in ("", "@untrained", "@shared", "@shared_untrained")}
    assert set(found["model"]) == heads | {"majority", "hvg_logreg"}
    best = found[(found["model"] == "hvg_logreg") & (found["metric"] == "macro_f1")]
    assert (best["value"] > 0.9).all()  # orthologs carry the types by construction
    failed = table(done, "failures")
    poor = failed[(failed["model"] == "majority") & (failed["recall"] == 0)]
    assert len(poor) == 4  # three types a direction, of which the largest is right
    assert (poor["into_share"] == 1).all()


def test_a_stimulus_and_a_change_of_type_match_by_genes_and_halves_match_nothing(done: Config) -> None:
    pairs = table(done, "pairs")
    assert set(pairs["space"]) == {"trained", "untrained", "shared", "shared_untrained", "expression", "ranks"}
    by = pairs[pairs["space"] == "expression"].set_index(["shift", "other_shift"])
    for pair in (("stimulus of ant", "stimulus of bee"), ("a to b of ant", "a to b of bee")):
        assert by.loc[pair, "best"]
        assert by.loc[pair, "p"] == by.loc[pair, "smallest_p"] == 0.01
        assert by.loc[pair, "low"] < by.loc[pair, "cosine"] < by.loc[pair, "high"] + 0.05
        assert by.loc[pair, "cosine"] > 0.8
    assert by.loc[("halves of ant", "stimulus of bee"), "cosine"] < 0.5
    tags = table(done, "together").set_index(["space", "tag"])
    assert tags.loc[("expression", "all"), "auroc"] == 1


def test_types_correspond_in_expression(done: Config) -> None:
    found = table(done, "corresponding")
    assert set(found["type"]) == {"a", "b", "c"}
    assert (found.loc[found["space"] == "expression", "num_types"] == 3).all()
    maps = table(done, "maps")
    assert set(maps["donor"]) == {f"ENS{s}{i}" for s in "AB" for i in range(4)}


def test_again_does_nothing_and_a_classification_that_is_there_is_read(
    done: Config, runs: tuple[Config, Config]
) -> None:
    def refuse(made: Sequence[pieces.Piece]):
        raise AssertionError(made)

    compare.run(done, spread=refuse)
    own, _ = runs
    again = replace(own, output=own.output + "-again", inputs=Inputs(
        corpus=f"{own.output}/corpus", checkpoint=f"{own.output}/pretrain", classification=f"{own.output}/compare/classify"))  # fmt: skip
    compare.run(again, spread=pieces.loop)
    assert artifacts.find(f"{again.output}/compare/classify") is None
    mine, theirs = (table(r, "transfer") for r in (again, done))
    pd.testing.assert_frame_equal(mine, theirs[~theirs["model"].str.contains("shared")].reset_index(drop=True))


def test_the_report_shows_every_part(done: Config) -> None:
    made = across.section(report.load(done))
    headings = [b.text for b in made.blocks if b.kind == "text" and b.tone == "heading"]
    assert headings == ["One space", "Labels carried to the other species", "Shifts that match", "Gene networks"]
    assert "Shifts that match" in report.render(report.load(done), "key")


@pytest.mark.parametrize(
    ("shifts", "said"),
    [
        (("x=species == 'ant'",), "must be NAME=BEFORE -> AFTER"),
        (("x=species == 'ant' -> species == 'bee'",), "cells of ant and bee"),
        (("x=species == 'ant' -> condition == 'rest' and species == 'ant'",), "cells that are in both"),
        (("x=species == 'ant' -> half",), "all are of ant"),
        (("x=species == 'ant' and donor == 'nobody' -> half",), "donor has no value 'nobody'"),
    ],
)
def test_a_wrong_shift_is_refused_before_anything_is_made(
    runs: tuple[Config, Config], shifts: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    own, _ = runs
    inputs = Inputs(corpus=f"{own.output}/corpus", checkpoint=f"{own.output}/pretrain")
    run = replace(own, output=str(tmp_path / "run"), inputs=inputs, compare=replace(own.compare, shifts=shifts))
    with pytest.raises(UserError, match=said):
        compare.run(run, spread=pieces.loop)
    assert not (tmp_path / "run").exists()


def test_strata_keep_composition_out_of_a_shift(runs: tuple[Config, Config]) -> None:
    own, _ = runs
    obs = comparison.Corpus(f"{own.output}/corpus").obs()
    within = replace(own, compare=replace(own.compare, within=("cell_type",), min_cells=5, shifts=SHIFTS[:2]))
    for shift in comparison.chosen(within, obs):
        types = obs["cell_type"].to_numpy()[shift.rows_N]
        for stratum in np.unique(shift.strata_N):
            assert len(set(types[shift.strata_N == stratum])) == 1
            assert set(shift.after_N[shift.strata_N == stratum]) == {True, False}
