"""`mixgf compare` from end to end: on small invented cells of two species whose types and stimulus are alike, and on a few real ones."""

import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from executors import Through, refusing
from invented import NUM_GENES, species, untrained_checkpoint
from processes import free_port
from scipy import sparse

from mixgf.comparison import encoder_sets, shift_selection, shift_tables
from mixgf.config.classification import Classify
from mixgf.config.comparison import Compare, ShiftSpec
from mixgf.config.data import QC, Source, Tokens, Vocab
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Config, Inputs, Tracking
from mixgf.config.training import Model, Train
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.genes.species import orthologs
from mixgf.report import build, load
from mixgf.report.sections import species_comparison
from mixgf.stages import compare, perturb, prepare
from mixgf.storage import artifacts, files, tables

SMALL = Model(num_layers=1, dim=16, num_heads=2, ffn_dim=32, max_positions=32)
SHIFTS = (
    *(
        ShiftSpec(
            name=f"stimulus of {s}", tag="immune", before=f"species == '{s}' and condition == 'rest'",
            after=f"species == '{s}' and condition == 'stimulus'",
        )
        for s in ("ant", "bee")
    ),
    *(
        ShiftSpec(
            name=f"a to b of {s}", tag="type", before=f"species == '{s}' and cell_type == 'a'",
            after=f"species == '{s}' and cell_type == 'b'", within=False,
        )
        for s in ("ant", "bee")
    ),
    ShiftSpec(name="halves of ant", before="species == 'ant' and condition == 'rest'", after=None),
)  # fmt: skip


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
    prepare.run(run, executor=LocalExecutor())
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
        own,
        compare=replace(
            own.compare, encoders={"shared": f"{shared.output}/pretrain"}, corpora={"shared": f"{shared.output}/corpus"}
        ),
    )
    compare.run(run, executor=LocalExecutor())
    return run


def table(run: Config, name: str) -> pd.DataFrame:
    return tables.read_table(f"{run.output}/compare/{name}.parquet").to_pandas()


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
    dense = table(done, "compactness")
    assert set(dense["other"]) == {"untrained", "expression", "shared", "shared_untrained"}
    assert set(dense["on"]) == {"map", "space"}
    assert len(dense) == 4 * 2 * 6  # three types of two species
    assert (dense["dispersion"] > 0).all()
    assert set(dense["interval_by"]) == {"donor"}
    assert ((dense["dispersion_low"] < dense["dispersion"]) & (dense["dispersion"] < dense["dispersion_high"])).all()


def test_again_does_nothing_and_a_classification_that_is_there_is_read(
    done: Config, runs: tuple[Config, Config]
) -> None:
    compare.run(done, executor=Through(refusing))
    own, _ = runs
    again = replace(own, output=own.output + "-again", inputs=Inputs(
        corpus=f"{own.output}/corpus", checkpoint=f"{own.output}/pretrain", classification=f"{own.output}/compare/classify"))  # fmt: skip
    compare.run(again, executor=LocalExecutor())
    assert artifacts.find(f"{again.output}/compare/classify") is None
    mine, theirs = (table(r, "transfer") for r in (again, done))
    pd.testing.assert_frame_equal(mine, theirs[~theirs["model"].str.contains("shared")].reset_index(drop=True))


def test_a_tracker_that_is_down_neither_ends_a_comparison_nor_leaves_files_in_it(
    runs: tuple[Config, Config], tmp_path: Path
) -> None:
    """The output has no run yet: its stages were not tracked. What is kept for the tracker lies beside the comparison."""
    own, _ = runs
    for name in ("corpus", "pretrain"):
        shutil.copytree(f"{own.output}/{name}", tmp_path / name)
    few = replace(own.compare, controls=("majority",), models=("knn",), shifts=(), cells=100)
    run = replace(
        own, output=str(tmp_path), compare=few, tracking=Tracking(uri=f"http://127.0.0.1:{free_port()}")
    )  # fmt: skip
    compare.run(run, executor=LocalExecutor())
    assert not list((tmp_path / "compare").rglob("tracking"))
    assert {path.name.partition("-")[0] for path in (tmp_path / "tracking").iterdir()} == {"run.json", "unsent"}


def test_the_report_shows_every_part(done: Config) -> None:
    made = species_comparison.section(load.load_results(done))
    headings = [b.text for b in made.blocks if b.kind == "text" and b.tone == "heading"]
    assert headings == [
        "Corresponding types", "Dispersion and local density of types", "Label transfer to the other species", "Matched shifts",
        "Gene networks",
    ]  # fmt: skip
    assert "Matched shifts" in build.render(load.load_results(done), "key")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("species == 'ant'", "species == 'bee'", "cells of ant and bee"),
        ("species == 'ant'", "condition == 'rest' and species == 'ant'", "cells that are in both"),
        ("species == 'ant'", None, "all are of ant"),
        ("species == 'ant' and donor == 'nobody'", None, "donor has no value 'nobody'"),
    ],
)
def test_a_wrong_shift_is_refused_before_anything_is_made(
    runs: tuple[Config, Config], before: str, after: str | None, said: str, tmp_path: Path
) -> None:
    own, _ = runs
    inputs = Inputs(corpus=f"{own.output}/corpus", checkpoint=f"{own.output}/pretrain")
    run = replace(
        own,
        output=str(tmp_path / "run"),
        inputs=inputs,
        compare=replace(own.compare, shifts=(ShiftSpec(name="x", before=before, after=after),)),
    )
    with pytest.raises(UserError, match=said):
        compare.run(run, executor=LocalExecutor())
    assert not (tmp_path / "run").exists()


def test_strata_keep_composition_out_of_a_shift(runs: tuple[Config, Config]) -> None:
    own, _ = runs
    obs = shift_tables.Corpus(f"{own.output}/corpus").obs()
    within = replace(own, compare=replace(own.compare, within=("cell_type",), min_cells=5, shifts=SHIFTS[:2]))
    for shift in shift_selection.select_shifts(within, obs):
        types = obs["cell_type"].to_numpy()[shift.rows_N]
        for stratum in np.unique(shift.strata_N):
            assert len(set(types[shift.strata_N == stratum])) == 1
            assert set(shift.after_N[shift.strata_N == stratum]) == {True, False}


def test_a_classification_of_other_cells_or_labels_is_not_taken_for_its_own(done: Config) -> None:
    (world, _), uri = encoder_sets.encoder_sets(done, f"{done.output}/compare"), f"{done.output}/compare/classify"
    assert encoder_sets._is_sufficient(uri, world)
    for change in ({"merge": {"x": ("a", "b")}}, {"cells": "donor == 'ENSA0'"}, {"transfer": "donor"}):
        other = replace(world.config, classify=replace(world.config.classify, **change))
        assert not encoder_sets._is_sufficient(uri, replace(world, config=other)), change


# two perturbations of real cells

NUM_REAL = 60
"""Cells of either type and species."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Human and mouse alpha and beta cells with 150 orthologs, an encoder with random weights, and a perturbation of each species."""
    folder = tmp_path_factory.mktemp("responses")
    cells = {}
    for name in ("human", "mouse"):
        with files.local_copy(f"resource:pancreas_{name}_baron.h5ad") as path:
            whole = anndata.read_h5ad(path)
        kinds = whole.obs["cell_type"].astype(str).to_numpy()
        rows = np.concatenate([np.flatnonzero(kinds == f"{kind} cell")[:NUM_REAL] for kind in ("alpha", "beta")])
        cells[name] = whole[rows, whole.var["ensembl_id"] != ""].copy()
        cells[name].var = cells[name].var[[]].set_axis(cells[name].var["ensembl_id"].astype(str))
    of = {h: m for h, m in orthologs(Vocab().orthologs)["human", "mouse"].items() if m in cells["mouse"].var_names}
    human = cells["human"][:, cells["human"].var_names.isin(of)]
    often = human.var_names[np.argsort(-np.asarray((human.X > 0).sum(0)).ravel(), kind="stable")[:150]]
    for name, genes in (("human", list(often)), ("mouse", [of[g] for g in often])):
        cells[name][:, genes].copy().write_h5ad(folder / f"{name}.h5ad")
    run = Config(
        output=str(folder / "run"), model=replace(SMALL, max_positions=64, init_sd=0.3), qc=QC(method="none", min_mapped_fraction=0),
        tokens=Tokens(max_len=64), tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
        sources=tuple(Source(uri=str(folder / f"{name}.h5ad"), species=name, name=name) for name in cells),
        compare=Compare(models=("knn",), controls=("majority",), cells=100, num_permutations=99),
    )  # fmt: skip
    prepare.run(run, executor=LocalExecutor())
    untrained_checkpoint(run, run.model)
    inputs = Inputs(corpus=f"{run.output}/corpus", checkpoint=f"{run.output}/pretrain")
    for name in cells:
        states = {
            "start": f"cell_type == 'alpha cell' and species == '{name}'",
            "goal": f"cell_type == 'beta cell' and species == '{name}'",
        }
        asked = Perturb(**states, unrelated=0, max_cells=40, max_genes=80, response=80, num_permutations=100)
        perturb.run(replace(run, output=str(folder / name), inputs=inputs, perturb=asked), executor=LocalExecutor())
    responses = {name: f"{folder}/{name}/perturb" for name in cells}
    run = replace(run, compare=replace(run.compare, responses=responses))
    compare.run(run, executor=LocalExecutor())
    return run


def test_responses_of_real_cells_stand_side_by_side_ortholog_by_ortholog(real: Config) -> None:
    found, of = table(real, "conserved"), orthologs(Vocab().orthologs)["human", "mouse"]
    assert set(found["operation"]) == {"delete", "overexpress"}
    assert [of[g] for g in found["gene_human"]] == found["gene_mouse"].tolist()
    sides = {}
    for name in ("human", "mouse"):
        genes = tables.read_table(f"{real.output}/../{name}/perturb/genes.parquet").to_pandas()
        genes = genes[genes["num_cells"] > 0].set_index(["operation", "gene"])
        sides[name] = {
            (operation, of[g] if name == "human" else g) for operation, g in genes.index if name == "mouse" or g in of
        }
        mine = genes.loc[list(zip(found["operation"], found[f"gene_{name}"], strict=True))]
        for column in ("shift", "coverage", "p_donor", "rank_expected"):
            np.testing.assert_array_equal(mine[column].to_numpy(), found[f"{column}_{name}"].to_numpy())
        assert (found[f"rank_error_{name}"] > 0).all()
    assert set(zip(found["operation"], found["gene_mouse"], strict=True)) == sides["human"] & sides["mouse"]
    np.testing.assert_allclose(found["difference"], found["shift_human"] - found["shift_mouse"])
    summary = table(real, "conserved_summary").set_index("operation")
    for operation, mine in found.groupby("operation"):
        assert summary.loc[operation, "num_pairs"] == len(mine) > 20
        assert summary.loc[operation, "towards"] == (mine["place"] > 0).sum()
        assert summary.loc[operation, "low"] < summary.loc[operation, "spearman"] < summary.loc[operation, "high"]
    assert not summary["by_donors"].any()  # one mouse


def test_response_matrices_of_real_cells_give_networks(real: Config) -> None:
    found = table(real, "networks").set_index("space")
    assert set(found.index) == {"trained: token vectors", "responses to delete", "responses to overexpress"}
    assert (found["why"] == "").all()
    assert (found["num_genes"] > 20).all()
    assert found["share"].between(0, 1).all()
    assert (
        found.loc["trained: token vectors", "share"] < 3 * found.loc["trained: token vectors", "chance"]
    )  # random vectors


def test_the_report_shows_responses_and_networks_or_why_there_are_none(real: Config) -> None:
    loaded = load.load_results(real)
    made = species_comparison.section(loaded)
    headings = [b.text for b in made.blocks if b.kind == "text" and b.tone == "heading"]
    assert headings[-2:] == ["Conserved and divergent responses", "Gene networks"]
    page = build.render(loaded, "key")
    assert "At least one species has too few donors" in page
    assert "responses to overexpress" in page
    none = pd.DataFrame(
        [{"space": "responses", "first": "human", "second": "mouse", "num_genes": 0, "why": "no matrix"}]
    )
    (_, told) = species_comparison.gene_networks({"networks": none})
    assert (told.text, told.tone) == ("responses, human and mouse: not compared. no matrix.", "missing")


def test_perturbations_without_orthologs_in_common_are_refused(real: Config, tmp_path: Path) -> None:
    pairs = {"human": ["ENSG00000000003"], "mouse": ["ENSMUSG00000000001"]}
    pq.write_table(pa.table(pairs), tmp_path / "none.parquet")
    run = replace(real, vocab=Vocab(orthologs=(str(tmp_path / "none.parquet"),)))
    with pytest.raises(UserError, match="human and mouse share no operation on a one-to-one ortholog"):
        compare.run(run, executor=LocalExecutor())
