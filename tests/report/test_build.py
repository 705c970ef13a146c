"""Laws of the report: it says what the tables say, names the baseline that wins, and is one file that asks for nothing."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import mixgf
from mixgf.classification import embedding_measures, metrics, umap
from mixgf.config.classification import Classify
from mixgf.config.parse import to_dict
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Config, Inputs
from mixgf.errors import UserError
from mixgf.perturbation import gene_table, hits
from mixgf.report import build, elements, load, results, run_text, score_tables, verdicts, wording
from mixgf.report.figures import cell_maps, curves
from mixgf.report.sections import corpus, embedding_map, perturbation, pretraining, summary
from mixgf.storage import artifacts, files, tables

TYPES = ("alpha cell", "beta cell", "ductal cell")


def _scores(values, *, half=0.02, group="baron", split="random", direction=""):
    """Scores of one task: model -> (accuracy, macro F1)."""
    rows = [
        {"group": group, "split": split, "direction": direction, "seed": 0, "model": model, "metric": metric, "value": value, "low": value - half,
             "high": value + half, "num_train": 80, "num_test": 20, "num_classes": 3, "interval_by": "cell"}
        for model, pair in values.items() for metric, value in zip(("accuracy", "macro_f1"), pair, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _genes(num_donors=3, num=30, seed=0, **columns):
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 0.01, num)
    frame = {
        "gene": [f"ENSG{i:05d}" for i in range(num)], "symbol": [f"GENE{i}" for i in range(num)], "species": "human",
        "ortholog": "", "ortholog_symbol": "", "role": "target", "operation": "delete", "variant": "remaining", "num_cells": 40, "num_donors": num_donors, "coverage": rng.uniform(0.1, 1, num),
        "mean_rank": rng.uniform(1, 300, num), "shift": shift, "shift_low": shift - 0.001, "shift_high": shift + 0.001,
        "response": abs(shift), "p_cell": 1e-9, "fdr_cell": 1e-8, "p_donor": 0.25, "fdr_donor": 0.5, "null_percentile": 50.0,
        "rank_expected": rng.normal(0, 0.01, num), "shift_minus_rank_expected": 0.001, "shift_alternatives": 0.0,
        "shift_minus_alternatives": shift, "de_statistic": rng.normal(0, 1, num), "de_log_fold": 0.1, "warnings": "one donor carries it",
        "p_null": 0.5, "fdr_null": 0.5, "num_null": 300, "start_cells": 50, "readable_cells": 40, "expressing_cells": 45, "reading_length": 300.0,
    }  # fmt: skip
    made = pd.DataFrame(frame | columns)
    if "hit" not in made:
        columns = (made[name].to_numpy(float) for name in ("fdr_donor", "fdr_null", "null_percentile"))
        made["hit"] = gene_table.is_hit(*columns, np.zeros(num, dtype=bool))
    return made


def _text(section):
    parts = []
    for block in section.blocks:
        parts += [block.text] if isinstance(block, elements.Text) else []
        parts += [block.caption] if isinstance(block, elements.Figure | elements.Table) else []
        parts += [cell.text for row in block.rows for cell in row] if isinstance(block, elements.Table) else []
    return "\n".join(parts)


def _artifact(uri, kind, paths, *, parents=None, **finish):
    record = artifacts.plan(kind, 1, {"made": "by test_report"}, parents or {})
    artifacts.begin(uri, record)
    for name, frame in paths.items():
        table = frame if isinstance(frame, pa.Table) else pa.Table.from_pandas(frame, preserve_index=False)
        tables.write_table(files.join(uri, name), table)
    return artifacts.finish(uri, record, **finish)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A finished small run: real Parquet artifacts in the layout of the stages."""
    root = str(tmp_path_factory.mktemp("run"))
    config = Config(
        output=root,
        recipe="test",
        classify=Classify(splits=("random",)),
        perturb=Perturb(start="x == 1", goal="x == 2"),
    )
    rng = np.random.default_rng(5)
    sizes = {"human": 90, "mouse": 61}
    shards, vectors = {}, {}
    for species, n in sizes.items():
        kind = rng.integers(0, 3, n)
        name = f"{len(shards):05d}.parquet"
        shards[name] = pd.DataFrame({
            "cell": [f"{species}:{i}" for i in range(n)], "species": species, "source": f"baron_{species}", "length": 20 + kind,
            "cell_type": np.where(np.arange(n) == 0, "unknown", np.array(TYPES)[kind]), "donor": [f"d{i % 3}" for i in range(n)],
        })  # fmt: skip
        centre = np.eye(8, dtype=np.float32)[kind] * 4 + (species == "mouse") * np.eye(8, dtype=np.float32)[5]
        vectors[name] = (centre + rng.normal(0, 0.3, (n, 8))).astype(np.float32)
    entries = [{"name": name, "rows": len(frame), "bytes": 1, "sha256": "0"} for name, frame in shards.items()]
    corpus_record = _artifact(
        f"{root}/corpus", "corpus",
        {f"shards/{name}": frame for name, frame in shards.items()} | {
            "dropped.parquet": pd.DataFrame({"source": ["baron_human", "baron_human"], "reason": ["depth", "few_genes"], "cells": [4, 1]}),
            "mapping.parquet": pd.DataFrame({"source": ["baron_human"], "columns": [20], "mapped": [18], "counts_lost": [0.031], "unmapped_names": [["A", "B"]]}),
        },
        counts={"read": 156, "kept": 151, "dropped": {"depth": 4, "few_genes": 1, "mito": 0}},
        details={"shards": entries, "max_len": 22, "species": list(sizes)},
    )  # fmt: skip
    parents = {"corpus": corpus_record.fingerprint}
    _artifact(f"{root}/embed", "embeddings", {
        f"shards/{name}": pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(z.ravel()), 8)}) for name, z in vectors.items()
    }, parents=parents)  # fmt: skip
    history = [
        (s, s // 20, n, v)
        for s in range(1, 41)
        for n, v in (("loss", 9 - s / 10), ("mlm", 8 - s / 10), ("contrast", 1.0), ("lr", 1e-3), ("cells_per_s", 30.0))
    ]
    _artifact(f"{root}/pretrain", "checkpoint", {"history.parquet": pd.DataFrame(history, columns=["step", "epoch", "name", "value"])},
              parents=parents, details={"model": to_dict(config.model), "objective": to_dict(config.objective)})  # fmt: skip
    truth = rng.integers(0, 3, 60)
    rows = {"per_class": [], "confusion": []}
    for model, wrong in (("finetune", 0.3), ("hvg_logreg", 0.0), ("knn@untrained", 0.5)):
        predicted = np.where(rng.random(60) < wrong, (truth + 1) % 3, truth)
        matrix = metrics.confusion(truth, predicted, 3)
        key = {"group": "baron_human", "split": "random", "direction": "", "seed": 0, "model": model}
        rows["per_class"].append(
            pd.DataFrame(key | {"class": TYPES} | metrics.class_scores(matrix) | {"num_test": matrix.sum(1)})
        )
        true, guess = np.nonzero(matrix)
        rows["confusion"].append(
            pd.DataFrame(
                key | {"true": np.array(TYPES)[true], "predicted": np.array(TYPES)[guess], "count": matrix[true, guess]}
            )
        )
    means = _scores(
        {"finetune": (0.7, 0.68), "hvg_logreg": (1.0, 1.0), "knn@untrained": (0.5, 0.4)}, group="baron_human"
    )
    _artifact(
        f"{root}/classify",
        "classification",
        {"scores.parquet": means} | {f"{k}.parquet": pd.concat(v) for k, v in rows.items()},
        parents=parents,
    )
    genes = pd.concat([_genes(), _genes(seed=1, operation="overexpress")])
    _artifact(
        f"{root}/perturb",
        "perturbation",
        {"genes.parquet": genes},
        parents=parents,
        details={"warnings": ["one thing to know"]},
    )
    return config


# findings


@pytest.mark.parametrize("content", [b"<html>mine</html>", b"", bytes(range(256)) * 40])
def test_a_file_that_is_no_report_is_not_replaced(tmp_path, content):
    page = tmp_path / "report.html"
    page.write_bytes(content)
    with pytest.raises(UserError, match=r"report\.html: is no report of mixgf; move it away"):
        build.build_report(Config(output=str(tmp_path)), str(page))
    assert page.read_bytes() == content


@pytest.mark.parametrize(
    ("score", "verdict", "lower"),
    [((0.90, 0.88, 0.92), "ahead", False), ((0.80, 0.70, 0.86), "level", True), ((0.60, 0.55, 0.65), "behind", True)],
    ids=["intervals apart, above", "intervals meet", "intervals apart, below"],
)
def test_a_verdict_needs_intervals_that_do_not_meet(score, verdict, lower):
    pair = verdicts.PairedComparison(split="random", group="g", direction="", metric="macro_f1", model="finetune", score=score,
                         baseline="pca_knn", baseline_score=(0.85, 0.84, 0.87))  # fmt: skip
    assert (pair.verdict, pair.lower) == (verdict, lower)


def test_a_paired_comparison_decides_where_there_is_one():
    means = score_tables.mean_scores(_scores({"finetune": (0.80, 0.80), "pca_knn": (0.82, 0.82)}))
    paired = pd.DataFrame([
        {"group": "baron", "split": "random", "direction": "", "model": "finetune", "baseline": "pca_knn", "metric": m, "difference": -0.02, "low": -0.03, "high": -0.01, "outcome": "loss"}
        for m in ("accuracy", "macro_f1")
    ])  # fmt: skip
    assert {d.verdict for d in verdicts.paired_comparisons(means)} == {"level"}
    assert {d.verdict for d in verdicts.paired_comparisons(means, paired)} == {"behind"}
    unknown = verdicts.paired_comparisons(means, paired.assign(low=np.nan, high=np.nan, outcome="unknown"))
    assert verdicts.tally(unknown) == "0 wins, 0 ties, 0 losses, 2 with too few donors to say"
    assert verdicts.task_sentences(unknown)[0][1].startswith("Random cells, baron: too few donors to say")


def test_the_best_baseline_is_neither_ours_nor_an_untrained_encoder():
    means = score_tables.mean_scores(
        _scores(
            {
                "finetune": (0.9, 0.9),
                "knn": (0.95, 0.95),
                "knn@untrained": (0.94, 0.94),
                "pca_knn": (0.5, 0.4),
                "majority": (0.3, 0.1),
            }
        )
    )
    assert {d.baseline for d in verdicts.paired_comparisons(means)} == {"pca_knn"}


def test_a_baseline_that_wins_is_named_in_the_summary_and_comes_first():
    scores_ = pd.concat([
        _scores({"finetune": (0.95, 0.95), "hvg_logreg": (0.80, 0.80)}, group="easy"),
        _scores({"finetune": (0.50, 0.45), "hvg_logreg": (0.90, 0.88)}, group="hard"),
    ])  # fmt: skip
    run = results.RunResults(config=Config(), uris={}, tables={"scores": scores_})
    tones = [(b.tone, b.text) for b in summary.section(run).blocks]
    bad = [text for tone, text in tones if tone == "bad"]
    assert len(bad) == 1
    assert "hard" in bad[0]
    assert "a baseline beats the model" in bad[0]
    assert "0.450 (0.430–0.470) against 0.880 (0.860–0.900) of z-scored genes + logistic regression" in bad[0]  # noqa: RUF001
    assert [t for t, _ in tones].index("bad") < [t for t, _ in tones].index("good")
    assert any("macro F1 1 win, 0 ties, 1 loss" in text for _, text in tones)


def test_scores_of_several_seeds_are_averaged():
    both = pd.concat([_scores({"knn": (0.8, 0.6)}), _scores({"knn": (0.9, 0.8)}).assign(seed=1)])
    one = score_tables.mean_scores(both).set_index("metric")
    assert one.loc["accuracy", "value"] == pytest.approx(0.85)
    assert one.loc["macro_f1", ["low", "high"]].tolist() == pytest.approx([0.68, 0.72])
    assert set(one["seeds"]) == {2}


def test_a_transfer_is_named_by_its_direction():
    for direction in ("human>mouse", "human->mouse"):
        assert wording.task_label("species", "pancreas", direction) == "human → mouse (pancreas)"
    assert wording.task_label("random", "baron_human", "") == "baron_human"


def test_centroids_and_counterparts_on_a_case_by_hand():
    # alpha at 0°, beta at 90° in a; in b alpha at 10° and beta at 80°, so each nearest centroid is its counterpart
    def at(degrees):
        return np.tile([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], (5, 1))

    vectors = np.concatenate([at(0), at(90), at(10), at(80)])
    species, types = np.repeat(["a", "b"], 10), np.tile(np.repeat(["alpha", "beta"], 5), 2)
    table = embedding_measures.centroid_table(embedding_map.type_centroids(vectors, species, types), "a", "b")
    assert table.loc["alpha", "alpha"] == pytest.approx(1 - np.cos(np.radians(10)))
    assert table.loc["alpha", "beta"] == pytest.approx(1 - np.cos(np.radians(80)))
    assert embedding_measures.counterparts(table) == (2, 2)
    assert embedding_measures.counterparts(table[["beta", "alpha"]].set_axis(["alpha", "beta"], axis=1)) == (0, 2)
    assert embedding_map.type_centroids(vectors[1:], species[1:], types[1:]).keys() == {
        ("a", "beta"),
        ("b", "alpha"),
        ("b", "beta"),
    }


def test_species_apart_have_no_neighbours_of_the_other_kind():
    vectors = np.repeat(np.eye(2), 20, axis=0) + np.random.default_rng(0).normal(0, 0.01, (40, 2))
    apart = np.repeat(["a", "b"], 20)
    assert embedding_map.species_mixing(vectors, apart, k=5) == (0.0, pytest.approx(20 / 39))
    seen, expected = embedding_map.species_mixing(vectors, np.tile(["a", "b"], 20), k=19)
    assert seen == pytest.approx(10 / 19)
    assert expected == pytest.approx(20 / 39)


@pytest.mark.parametrize(
    ("donors", "said"),
    [(3, "smallest p that a test over donors can give is 0.25"), (8, "No gene passes an FDR of 5 % over 8 donors")],
)
def test_cell_level_significance_is_never_sold_as_a_hit(donors, said):
    lines = hits.summarise_screen(_genes(num_donors=donors), goal=True)
    assert any(tone == "warn" and said in text for tone, text in lines)
    assert any(
        tone == "warn" and "30 of 30 genes have a cell-level FDR" in text and "not replicates" in text
        for tone, text in lines
    )


def test_only_genes_that_move_cells_to_the_goal_are_named_as_such():
    genes = _genes(num_donors=8)
    genes["shift"] = [0.002] + [-0.001 * (k + 1) for k in range(len(genes) - 1)]
    towards, away = hits.summarise_screen(genes, goal=True)[0][1].split("; away from it: ")
    assert towards == f"Largest shifts towards the goal state: {genes['symbol'].iloc[0]} (+0.0020)"
    assert "+" not in away
    none = hits.summarise_screen(genes.assign(shift=-0.001), goal=True)[0][1]
    assert none.startswith("Largest shifts towards the goal state: none; away from it: ")


def test_a_hit_repeats_over_donors_and_is_unusual_for_its_rank():
    found = {"fdr_donor": [0.01] * 10 + [0.5] * 20, "null_percentile": [99.0, 1.0, 99.0] + [50.0] * 26 + [99.0]}
    genes = _genes(num_donors=8, **found, fdr_null=[0.01] * 2 + [0.06] * 27 + [0.01])
    assert set(hits.call_hits(genes)["symbol"]) == {"GENE0", "GENE1"}
    assert ("good", "2 of 30 genes are hits") in [
        (tone, text[:22]) for tone, text in hits.summarise_screen(genes, goal=True)
    ]
    said = " ".join(text for _, text in hits.summarise_screen(genes, goal=True))
    assert "last column objects to: none." in said
    assert "differ themselves" not in said
    marked = genes.assign(warnings=["", "differs itself between start and goal (t = 9.0)"] * 15)
    said = " ".join(text for _, text in hits.summarise_screen(marked, goal=True))
    assert "1 of 2 hits differ themselves between start and goal" in said
    assert "objects to: GENE0." in said
    assert hits.call_hits(genes.assign(role="null")).empty  # genes that are sampled as controls are no hits
    mixed = genes.assign(
        role=["target"] * 5 + ["null"] * 25, reference=[False] * 5 + [True] * 25
    )  # of the nulls 5 have an FDR of 1 %, and all a cell-level one
    text = " ".join(text for _, text in hits.summarise_screen(mixed, goal=True))
    assert "2 of 5 genes are hits" in text
    assert (
        "Of 25 genes that were drawn for comparison, whatever they do, 20% repeat over donors as well, and 100% are"
        in text
    )
    ordinary = hits.summarise_screen(genes.assign(hit=False), goal=True)
    assert any(
        tone == "warn" and "none of them lies beyond shifts that mean nothing" in text for tone, text in ordinary
    )


def test_a_perturbation_of_an_earlier_version_is_left_out_and_named(tmp_path, caplog):
    _artifact(f"{tmp_path}/perturb", "perturbation", {"genes.parquet": _genes().drop(columns="hit")})
    found = load.load_results(Config(output=str(tmp_path)), light=True)
    assert "genes" not in found.tables
    assert "perturb" not in found.records
    assert "is of an earlier version, without controls" in caplog.text


def test_what_so_few_donors_can_find_is_said():
    text = " ".join(text for _, text in hits.summarise_screen(_genes(num_donors=8), goal=True))
    assert re.search(r"own effect 1\.\d times the spread between donors is found in 80 % of cases", text)
    assert "no fewer than 5 genes can pass together, since no p is below 0.0078" in text  # 0.0078 x 30 genes / 5 < 0.05


def test_a_test_that_cries_wolf_on_nothing_is_named(config):
    rng = np.random.default_rng(3)
    nulls = pd.DataFrame(
        {"operation": "delete", "p_cell": rng.uniform(0, 0.09, 200), "p_donor": rng.uniform(0, 1, 200)}
    )
    tone, text = hits.calibration_sentence(nulls, 8)
    assert tone == "warn"
    assert re.search(
        r"[3-7]\.\d% of genes have a donor-level p of 0\.05 or less \(4\.7% would be right: p has few values over 8 donors\), and 5\d\.\d% a cell-level one",
        text,
    )
    run = load.load_results(config, light=True)
    with_nulls = perturbation.section(dataclasses.replace(run, tables=run.tables | {"nulls": nulls}))
    pictures = [b.caption for b in with_nulls.blocks if isinstance(b, elements.Figure)]
    assert (
        sum("the residuals of genes of similar rank were permuted" in caption for caption in pictures) == 1
    )  # `delete` only
    assert "could not be checked" in _text(with_nulls)  # `overexpress`


def test_responses_show_what_is_between_two_genes_and_that_it_is_no_regulation(config):
    run = load.load_results(config, light=True)
    rng = np.random.default_rng(5)
    rows = [
        {"operation": "delete", "gene": f"ENSG{k:05d}", "symbol": f"GENE{k}", "responding": f"ENSG{r:05d}", "responding_symbol": f"GENE{r}",
         "num_cells": 40, "change": 0.5, "num_same_rank": 20, "change_same_rank": 0.01 * (k + 1) * (r + 1) * (16 if (k, r) == (3, 7) else 1) * np.exp(rng.normal(0, 0.05)), "sd": 0.0}
        for k in range(30) for r in range(12) if k != r
    ]  # fmt: skip
    with_pairs = dataclasses.replace(run, tables=run.tables | {"responses": pd.DataFrame(rows)})
    section = perturbation.section(with_pairs)
    grid = next(b for b in section.blocks if isinstance(b, elements.Table) and b.head[0] == "Perturbed")
    assert [cell.text for cell in grid.rows[0][:2]] == ["GENE3", "GENE7"]
    assert grid.rows[0][3].order == pytest.approx(4, abs=0.3)
    assert "no evidence of regulation" in _text(section)
    assert (
        sum(
            "change of the contextual embedding of a gene" in b.caption
            for b in section.blocks
            if isinstance(b, elements.Figure)
        )
        == 1
    )
    assert "responses of other genes" not in _text(perturbation.section(run))
    many = dataclasses.replace(run.records["perturb"], counts=run.records["perturb"].counts | {"responses": 9_000_000})
    large = dataclasses.replace(run, records=run.records | {"perturb": many})
    assert "9,000,000 pairs) is too large for this page" in _text(perturbation.section(large))


def test_known_genes_stand_beside_the_baseline_that_finds_them_better(config):
    run = load.load_results(config, light=True)
    genes = run.tables["genes"].assign(de_statistic=np.tile(np.arange(30.0), 2))
    config = dataclasses.replace(
        run.config, perturb=Perturb(goal="x == 2", reference_genes=("GENE29", "GENE28", "GENE27"))
    )
    section = perturbation.section(dataclasses.replace(run, config=config, tables=run.tables | {"genes": genes}))
    assert any(
        block.tone == "bad" and "the best baseline (differential expression" in block.text
        for block in section.blocks
        if isinstance(block, elements.Text)
    )
    grid = section.blocks[-1]
    assert "3 reference genes among 30 scored genes" in grid.caption
    unknown = dataclasses.replace(config, perturb=Perturb(goal="x == 2", reference_genes=("NEVER",)))
    assert "none of them is among the 30 scored genes" in _text(
        perturbation.section(dataclasses.replace(run, config=unknown))
    )


def test_shifts_that_rank_explains_are_called_so():
    genes = _genes()
    lines = hits.summarise_screen(genes.assign(rank_expected=genes["shift"]), goal=True)
    assert (
        "warn",
        "What a gene's rank in the cell alone predicts explains much of the shifts (Spearman 1.00).",
    ) in lines


# sections and the page


def test_a_stage_that_has_not_run_is_said_plainly(tmp_path):
    config = Config(output=str(tmp_path / "none"))
    html = files.read_bytes(build.build_report(config, str(tmp_path / "report.html"))).decode()
    for stage in ("prepare", "pretrain", "embed", "classify", "perturb"):
        assert f"mixgf {stage} --output" in html
    assert run_text.summary(config) == "no stage has been run yet"


def test_every_warning_stands_beside_its_gene(config):
    run = load.load_results(config, light=True)
    section = perturbation.section(run)
    grids = [b for b in section.blocks if isinstance(b, elements.Table)]
    assert [g.sortable for g in grids] == [True, True]
    assert all(row[-1].text == "one donor carries it" for g in grids for row in g.rows)
    assert "FDR, cells (not replicated)" in grids[0].head
    assert "One thing to know." in _text(section)
    shifts = [row[1].order for row in grids[0].rows]
    assert shifts == sorted(shifts, reverse=True)


def test_dropped_cells_and_mapping_are_in_the_cells_section(config):
    text = _text(corpus.section(load.load_results(config)))
    assert "151 of 156 cells were kept; dropped: 4 depth out of range, 1 too few genes." in text
    assert "3.10%" in text
    assert "A, B" in text


def test_the_label_for_unknown_is_no_type(config):
    cells = load.load_results(config).tables["cells"]
    assert set(cells["type"]) == {"", *TYPES}
    assert cells["cells"].sum() == 151


def test_cells_are_counted_over_shards_with_categories_missing_labels_and_numeric_donors(tmp_path):
    shards = {
        "0.parquet": {"species": ["mouse", "mouse", "human"], "cell_type": ["a", None, "unknown"], "donor": [1.0, None, 2.0]},
        "1.parquet": {"species": ["human", "human", "human"], "cell_type": ["a", "a", "b"], "donor": [2.0, 2.0, 2.0]},
    }  # fmt: skip
    for name, columns in shards.items():
        table = pa.table(columns | {"source": ["s" + name[0]] * 3, "length": pa.array([2, 3, 3], pa.int32())})
        for column in ("species", "cell_type"):
            place = table.column_names.index(column)
            table = table.set_column(place, column, table[column].dictionary_encode())
        tables.write_table(files.join(str(tmp_path), "shards", name), table)
    record = artifacts.plan("corpus", 1, {}, {})
    record.details["shards"] = [{"name": name, "rows": 3} for name in shards]
    cells, lengths = load._cell_counts(Config(), str(tmp_path), record)
    assert cells.to_numpy().tolist() == [
        ["s0", "human", "", "2.0", 1],
        ["s0", "mouse", "", "", 1],
        ["s0", "mouse", "a", "1.0", 1],
        ["s1", "human", "a", "2.0", 2],
        ["s1", "human", "b", "2.0", 1],
    ]
    assert {name: counts.tolist() for name, counts in lengths.items()} == {"human": [0, 0, 1, 3], "mouse": [0, 0, 1, 1]}


def test_embeddings_of_another_corpus_are_not_shown(config, tmp_path):
    _artifact(str(tmp_path), "embeddings", {}, parents={"corpus": "another"})
    run = load.load_results(dataclasses.replace(config, inputs=Inputs(embeddings=str(tmp_path))))
    assert run.vectors_ND is None
    assert "of another corpus" in _text(embedding_map.section(run))


def test_a_step_run_twice_counts_once():
    history = pd.DataFrame({"step": [1, 2, 2, 3], "epoch": 0, "name": "loss", "value": [4.0, 9.0, 3.0, 2.0]})
    assert pretraining.curve(history, "loss")["value"].tolist() == [4.0, 3.0, 2.0]


def test_figures_on_one_page_share_no_ids_and_text_stays_text():
    frame = pd.DataFrame({"step": [1, 2, 3], "value": [3.0, 2.0, 1.0]})
    one, two = curves.panels({"Total loss": frame}, "one"), curves.panels({"Total loss": frame}, "two")
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', one)) <= ids[0]
    assert ">Total loss<" in one
    assert one == curves.panels({"Total loss": frame}, "one")


@pytest.mark.slow  # numba compiles umap
def test_the_map_depends_on_the_seed_alone_and_keeps_groups_together():
    kind = np.repeat([0, 1], 150)
    vectors = (np.eye(6)[kind] * 5 + np.random.default_rng(0).normal(0, 0.5, (300, 6))).astype(np.float32)
    one, method = umap.layout(vectors, 7)
    assert method.startswith("UMAP")
    np.testing.assert_array_equal(one, umap.layout(vectors, 7)[0])
    assert not np.array_equal(one, umap.layout(vectors, 8)[0])
    centre = np.stack([one[kind == k].mean(axis=0) for k in (0, 1)])
    nearest = np.hypot(*(one[:, None] - centre[None]).transpose(2, 0, 1)).argmin(axis=1)
    assert (nearest == kind).mean() > 0.99


def test_few_cells_are_shown_by_their_principal_components():
    vectors = np.array([[3.0, 0, 1], [-3, 0, 1], [0, 1, 1], [0, -1, 1]])
    xy, method = umap.layout(vectors, 0)
    assert method == "First two principal components"
    np.testing.assert_allclose(np.abs(xy), [[3, 0], [3, 0], [0, 1], [0, 1]], atol=1e-12)


def test_labels_are_pushed_apart():
    at = cell_maps._push_apart(np.zeros((6, 2)), 1.0)
    gaps = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1))[np.triu_indices(6, 1)]
    assert gaps.min() > 0.8


def test_the_report_is_one_file_that_asks_for_nothing_and_has_the_same_bytes_again(config, tmp_path):
    uri = build.build_report(config, str(tmp_path / "report.html"))
    data = files.read_bytes(uri)
    html = data.decode()
    assert len(data) < 5_000_000
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html), "nothing outside the file is referred to"
    assert not re.findall(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", html)
    for text in ("Summary", "Embedding map", "Baseline better:", "best baseline", "z-scored genes + logistic regression",
                 "Why it may be an artefact", "GENE0", "Configuration (JSON)", "By cell type", "true type (test cells)"):  # fmt: skip
        assert text in html, text
    for id_ in ("summary", "corpus", "pretraining", "embedding", "classification", "perturbation", "provenance"):
        assert html.count(f'<section id="{id_}">') == 1
    again = build.build_report(config, str(tmp_path / "again.html"))
    assert files.read_bytes(again) == data


def test_a_report_of_the_same_inputs_is_left_alone_and_of_others_is_made_again(tmp_path):
    config = Config(output=str(tmp_path / "none"))
    uri = build.build_report(config, str(tmp_path / "report.html"))
    files.write_bytes(uri, files.read_bytes(uri) + b"<!-- mark -->")
    build.build_report(config, uri)
    assert files.read_bytes(uri).endswith(b"<!-- mark -->")
    build.build_report(dataclasses.replace(config, seed=1), uri)
    assert not files.read_bytes(uri).endswith(b"<!-- mark -->")


@pytest.mark.parametrize(
    "changed", ["stats/donors.py", "perturbation/hits.py", "report/build.py", "resources/report.html.j2"]
)
def test_a_report_is_made_again_after_any_file_of_the_package_changes(tmp_path, monkeypatch, changed):
    package = tmp_path / "mixgf"
    shutil.copytree(Path(mixgf.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.h5ad"))
    monkeypatch.setattr(mixgf, "__file__", str(package / "__init__.py"))
    config = Config(output=str(tmp_path / "none"))
    uri = build.build_report(config, str(tmp_path / "report.html"))
    files.write_bytes(uri, files.read_bytes(uri) + b"<!-- mark -->")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_bytes(b"compiled")
    build.build_report(config, uri)
    assert files.read_bytes(uri).endswith(b"<!-- mark -->"), "compiled files do not count"
    (package / changed).write_bytes((package / changed).read_bytes() + b" ")
    build.build_report(config, uri)
    assert not files.read_bytes(uri).endswith(b"<!-- mark -->")


def test_text_from_the_data_is_escaped(config):
    run = load.load_results(config, light=True)
    genes = run.tables["genes"].assign(symbol="<script>alert(1)</script>", warnings="<b>bold</b>")
    html = build.render(dataclasses.replace(run, tables={"genes": genes}), "key")
    assert "<script>alert" not in html
    assert "<b>bold" not in html
    assert "&lt;script&gt;alert" in html


def test_the_summary_shows_every_model_and_marks_the_best(config):
    text = run_text.summary(config)
    assert "151 kept of 156" in text
    assert re.search(r"z-scored genes \+ logistic regression +1\.000 / 1\.000 \*\n", text)
    assert re.search(r"mixgf, fine-tuned +0\.700 / 0\.680\n", text)
    assert "WORSE" not in text
    assert "(0 of 30 genes are hits; there are no negative controls" in text


def test_the_summary_has_the_command_for_other_cells_in_one_line(config, monkeypatch):
    """However long the path of the classifier is."""
    found = load.load_results(config, light=True)
    uri = f"/{'long/' * 40}classifiers/baron_human"
    test = {"macro_f1": 0.9, "accuracy": 0.9, "cells": 3, "doubted": 0.0}
    kept = {"group": "pancreas", "model": "genes_vote", "candidates": [], "test": test, "uri": uri}
    found.records["classify"].details["classifiers"] = [kept]
    monkeypatch.setattr(run_text, "load_results", lambda *_, **__: found)
    assert f"    mixgf annotate my.h5ad --model {uri}\n" in run_text.summary(config)
    texts = [block.text for block in summary.section(found).blocks]
    assert f"Your own cells: `mixgf annotate my.h5ad --model {uri}`" in texts
    first, last = (texts.index(title) for title in (summary._CAN_DO, summary._RUN))
    assert first == 0
    assert first < texts.index(f"Your own cells: `mixgf annotate my.h5ad --model {uri}`") < last
