"""Sections on classification and embedding spaces: sentences agree with tables, and published values with the paper."""

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mixgf.config.run import Config
from mixgf.report import build, elements, published_tables, results, score_tables, verdicts, wording
from mixgf.report.sections import classification_models, embedding_spaces, published_accuracy, summary
from mixgf.storage import artifacts

SIZES = {"num_train": 80, "num_test": 20, "num_classes": 3, "interval_by": "cell"}


def scores(values: dict[tuple[str, str, str, str], float], *, half: float = 0.01, seed: int = 0) -> pd.DataFrame:
    """(split, group, direction, model) to one value for every metric."""
    return pd.DataFrame([
        {"split": s, "group": g, "direction": d, "model": m, "seed": seed, "metric": metric, "value": v, "low": v - half, "high": v + half} | SIZES
        for (s, g, d, m), v in values.items() for metric in ("accuracy", "macro_f1", "balanced_accuracy", "ece")
    ])  # fmt: skip


GROUPS = {
    "baron": {"species": ["human"], "tissues": ["pancreas"]},
    "jaitin": {"species": ["mouse"], "tissues": ["spleen"]},
    "baron_mouse": {"species": ["mouse"], "tissues": ["pancreas"]},
}


def run(**tables: pd.DataFrame) -> results.RunResults:
    record = artifacts.plan("classification", 2, {}, {})
    record.details.update({"groups": GROUPS})
    return results.RunResults(config=Config(), uris={}, records={"classify": record}, tables=tables)


def grids(section: elements.Section) -> list[elements.Table]:
    return [b for b in section.blocks if isinstance(b, elements.Table)]


def row(grid: elements.Table, start: str) -> list[str]:
    return next([c.text for c in cells] for cells in grid.rows if cells[0].text.startswith(start))


def text(section: elements.Section) -> str:
    return "\n".join(b.text for b in section.blocks if isinstance(b, elements.Text))


def test_headlines_speak_of_the_training_that_validation_cells_prefer_whatever_the_test_cells_say() -> None:
    means = scores({
        ("random", g, "", m): v for g in ("baron", "jaitin")
        for m, v in {"finetune": 0.9, "finetune_linear_start": 0.6, "knn": 0.95, "hvg_logreg": 0.8}.items()
    })  # fmt: skip
    epochs = pd.DataFrame([
        {"split": "random", "group": g, "direction": "", "seed": 0, "model": m, "epoch": e, "loss": loss, "chosen": chosen}
        for g in ("baron", "jaitin") for m, e, loss, chosen in (("finetune", 1, 0.1, False), ("finetune", 2, 0.5, True), ("finetune_linear_start", 0, 0.4, True))
    ])  # fmt: skip
    assert verdicts.best_own_model(means, epochs) == "finetune_linear_start"
    assert verdicts.best_own_model(means) == "finetune"
    alone = epochs[(epochs["model"] != "finetune") | (epochs["group"] == "jaitin")]  # on the splits of both only
    alone = pd.concat([alone, epochs[epochs["model"] == "finetune_linear_start"].assign(seed=1, loss=9.0)])
    assert verdicts.best_own_model(means, alone) == "finetune_linear_start"
    said = run(scores=means, epochs=epochs)
    said_first = [block.text for block in summary.section(said).blocks if "against the best baseline" in block.text]
    assert said_first[0].startswith("Random cells held out (the paper's split). mixgf, fine-tuned from a convex start")
    brief = text(summary.section(said))
    assert "mixgf, fine-tuned, against the best baseline of each task: accuracy 2 wins" in brief
    assert brief.count("a baseline beats the model") == 2


def test_published_figures_are_those_of_the_paper() -> None:
    source = Path(os.environ.get("MIXGF_SHARED", "/nowhere")) / "paper.txt"
    if not source.is_file():
        pytest.skip("the paper's text is not here (MIXGF_SHARED)")
    lines = [line.split("\t") for line in source.read_text().splitlines() if line.count("\t") >= 5]
    found = {
        (published_tables.tissue(line[0]), tuple(float(v) for v in line[1:]))
        for line in lines
        if re.fullmatch(r"\d+", line[1])
    }
    ours = {
        (r.tissue, (float(r.num_types), *r.fine_tuned, *r.zero_shot))
        for _, rows in published_tables.TABLES.values()
        for r in rows
    }
    types = {r.tissue: r.num_types for r in published_tables.TABLES["mouse"][1]}
    ours |= {(tissue, (float(types[tissue]), *values)) for tissue, values in published_tables.CONVENTIONAL.items()}
    assert ours == found
    assert len(ours) == 27


def test_ours_stand_in_the_papers_row_of_the_same_tissue_and_species() -> None:
    means = scores({
        ("random", "baron", "", "finetune"): 0.876, ("random", "baron", "", "knn"): 0.5, ("random", "baron", "", "knn@mlm"): 0.25,
        ("random", "jaitin", "", "finetune"): 0.75, ("random", "jaitin", "", "scvi"): 0.625,
    })  # fmt: skip
    section = published_accuracy.section(run(scores=means))
    table1, table3, table2 = grids(section)
    assert "Table 1" in table1.caption
    assert "Table 3" in table3.caption
    assert "Table 2" in table2.caption
    assert row(table3, "pancreas (baron)") == [
        "pancreas (baron)",
        "15",
        "93.0",
        "92.2",
        "90.0",
        "52.3",
        "42.5",
        "52.3",
        "3",
        "87.6",
        "50.0",
        "25.0",
    ]
    assert table3.head[-3:] == [
        "mixgf, fine-tuned",
        "mixgf, frozen 5-NN (“zero-shot”)",
        "mlm encoder, frozen 5-NN (“zero-shot”)",
    ]
    assert row(table3, "liver")[-4:] == ["–", "–", "–", "–"]
    assert row(table1, "spleen (jaitin)")[1:3] == ["10", "98.7"]
    assert row(table2, "spleen (jaitin)")[1:] == ["98.7", "98.7", "81.0", "76.5", "3", "75.0", "62.5"]
    assert "measured on other cells" in text(section)
    assert sum(len(cells) > 1 for cells in table3.rows) == 9


def test_the_gap_is_taken_on_the_same_cells() -> None:
    """The donor split of one set is held against that set's random split, a transfer against the tested species'."""
    raw = scores({
        ("random", "baron", "", "knn"): 0.9, ("random", "jaitin", "", "knn"): 0.2, ("random", "baron_mouse", "", "knn"): 0.8,
        ("donor", "baron", "", "knn"): 0.7, ("dataset", "spleen mouse", "jaitin", "knn"): 0.15,
        ("species", "pancreas", "human>mouse", "knn"): 0.5,
    })  # fmt: skip
    gap = (
        score_tables.split_gaps(score_tables.mean_scores(raw), GROUPS)
        .set_index("split")[["tasks", "random", "harder", "gap"]]
        .round(6)
    )
    assert gap.loc["donor"].tolist() == [1, 0.9, 0.7, 0.2]
    assert gap.loc["dataset"].tolist() == [1, 0.2, 0.15, 0.05]
    assert gap.loc["species"].tolist() == [1, 0.8, 0.5, 0.3]
    section = classification_models.section(run(scores=raw))
    assert row(grids(section)[1], "● mixgf, frozen 5-NN") == [
        "● mixgf, frozen 5-NN (“zero-shot”)",
        "0.900",
        "0.700",
        "+0.200",
    ]


def test_averages_and_wins_ties_losses_by_hand() -> None:
    means = scores({
        ("random", "a", "", "probe"): 0.9, ("random", "b", "", "probe"): 0.7, ("random", "c", "", "probe"): 0.5,
        ("random", "a", "", "pca_knn"): 0.8, ("random", "b", "", "pca_knn"): 0.7, ("random", "c", "", "pca_knn"): 0.7,
        ("random", "a", "", "probe@mlm"): 0.1,
    })  # fmt: skip
    section = classification_models.section(run(scores=pd.concat([means, means.assign(seed=1)])))
    ours, other, baseline = (
        row(grids(section)[0], name) for name in ("● mixgf, frozen + log", "○ mlm encoder", "□ PCA")
    )
    assert ours[-2:] == ["1 / 1 / 1", "3 × 2"]
    assert ours[2] == "0.700"
    assert other[-2:] == ["0 / 0 / 1", "1 × 2"]
    assert baseline[2] == "0.733 ★"
    assert other[4] == "0.100 ★"  # of calibration errors the lowest is best
    assert baseline[-2] == "–"


def test_labels_in_doubt_are_those_that_two_unlike_models_reject_alike() -> None:
    """Of six cells labelled T both call four NK; one is called NK by one model only, one rightly T. Seeds do not count twice."""
    cells = [f"c{i}" for i in range(6)]
    says = {"probe": ["NK"] * 5 + ["T"], "hvg_logreg": ["NK"] * 4 + ["B", "T"]}
    predictions = pd.concat([
        pd.DataFrame({"group": "blood", "split": "random", "direction": "", "seed": seed, "model": model, "cell": cells, "true": "T",
                      "predicted": predicted, "probability": 0.75})
        for model, predicted in says.items() for seed in (0, 1)
    ])  # fmt: skip
    found = score_tables.label_disagreements(predictions, "probe", "hvg_logreg")
    assert found[["group", "label", "both_say", "cells", "of"]].to_numpy().tolist() == [["blood", "T", "NK", 4, 6]]
    means = scores(
        {
            ("random", "blood", "", "probe"): 0.5,
            ("random", "blood", "", "hvg_logreg"): 0.6,
            ("random", "blood", "", "majority"): 0.1,
        }
    )
    section = classification_models.section(run(scores=means, predictions=predictions))
    assert row(grids(section)[-1], "blood") == ["blood", "T", "NK", "4", "67%", "0.75"]
    none = classification_models.section(run(scores=means, predictions=predictions[predictions["cell"] > "c1"]))
    assert "For no label do mixgf, frozen + logistic probe and z-scored genes + logistic regression agree" in text(none)


def test_models_stand_ours_first_then_other_encoders_then_baselines() -> None:
    models = ["pca_knn", "knn@untrained", "finetune", "probe@mlm", "knn@mlm", "majority", "knn"]
    assert wording.order_models(models) == [
        "finetune",
        "knn",
        "knn@mlm",
        "probe@mlm",
        "knn@untrained",
        "majority",
        "pca_knn",
    ]


def test_few_labels_and_unknown_types_are_said_in_words_and_numbers() -> None:
    base = scores({("random", "a", "", "probe"): 0.9, ("random", "a", "", "hvg_logreg"): 0.95})
    few = scores({("random", "a", "", "probe"): 0.6, ("random", "a", "", "hvg_logreg"): 0.4})
    curve = pd.concat([base.assign(share=1.0), few.assign(share=0.01)])
    open_ = pd.DataFrame([
        {"group": "a", "seed": 0, "model": "probe", "unseen": kind, "metric": metric, "value": value}
        for kind, auroc, rejected in (("x", 0.9, 0.5), ("y", 0.7, 0.25)) for metric, value in (("auroc", auroc), ("rejected", rejected))
    ])  # fmt: skip
    section = classification_models.section(run(scores=base, efficiency=curve, rejection=open_))
    assert (
        "With 1% of the labels mixgf, frozen + logistic probe scores highest: 0.600; with all of them z-scored genes + logistic regression: 0.950"
        in text(section)
    )
    assert any("1 %" in b.svg and "100 %" in b.svg for b in section.blocks if isinstance(b, elements.Figure))
    assert row(grids(section)[-1], "●")[1:] == ["0.800 (0.70–0.90)", "38%"]
    assert "2 types left out of training" in grids(section)[-1].caption


def test_few_labels_are_told_beside_a_baseline_that_reads_the_unlabelled_cells() -> None:
    curve = [
        scores({("random", "a", "", "probe"): probe, ("random", "a", "", "joint_pca_centroid"): joint}).assign(
            share=share
        )
        for share, probe, joint in ((1.0, 0.9, 0.8), (0.01, 0.45, 0.74), (0.05, 0.57, 0.82))
    ]
    section = classification_models.section(run(scores=curve[0], efficiency=pd.concat(curve)))
    assert (
        "Frozen vectors + logistic probe, and PCA of all cells + nearest centroid without an encoder: 0.450 and 0.740 with 1%, 0.570 and 0.820 with 5%."
        in text(section)
    )


def frames() -> dict[str, pd.DataFrame]:
    measure = [
        ("trained", "species_probe", 0.9, 0.85, 0.95),
        ("mlm", "species_probe", 0.5, 0.45, 0.55),
        ("mlm", "type_ari", 0.25, np.nan, np.nan),
    ]
    rng = np.random.default_rng(0)
    maps = [
        {"space": space, "species": species, "type": kind, "x": rng.normal(), "y": rng.normal(), "map": "UMAP (15 cosine neighbours)"}
        for space in ("trained", "mlm") for species in ("human", "mouse") for kind in ("alpha", "beta") for _ in range(6)
    ]  # fmt: skip
    away = [("alpha", 0.5, 0.25), ("beta", 1.5, 0.75), ("delta", 4.0, 3.0), ("gamma", 8.0, 0.5)]
    return {
        "integration": pd.DataFrame(measure, columns=["space", "metric", "value", "low", "high"]).assign(num_cells=24, interval_by="cell"),
        "maps": pd.DataFrame(maps),
        "centroids": pd.DataFrame([
            {"space": "mlm", "species": "human", "type": kind, "num_cells": 6, "umap": drawn, "umap_aligned": turned,
             "distance_correlation": 0.5 + i / 10, "distance_difference": 0.1} for i, (kind, drawn, turned) in enumerate(away)
        ]),
    }  # fmt: skip


def test_the_claim_of_one_unit_is_answered_as_drawn_and_turned() -> None:
    section = embedding_spaces.section(run(**frames()))
    said = text(section)
    assert "mlm encoder 25% as drawn, 75% after rotation, correlation 0.65" in said
    assert (
        "The species can be predicted from the embedding: a linear probe reaches a balanced accuracy of 0.900 (0.850–0.950)"
        in said
    )
    measures, centroids, worst = grids(section)
    assert row(measures, "mlm encoder")[1:] == ["0.250", "0.500 (0.450–0.550)"]
    assert row(centroids, "mlm encoder")[1:] == ["4", "25%", "2.8", "75%", "0.6", "0.65", "0.100"]
    assert worst.rows[0][2].text == "alpha"
    svg = next(b.svg for b in section.blocks if isinstance(b, elements.Figure))
    assert "mlm encoder" in svg
    assert "1  alpha" in svg


def test_what_was_not_measured_says_how() -> None:
    assert "mixgf classify" in text(classification_models.section(results.RunResults(config=Config(), uris={})))
    assert "mixgf classify" in text(embedding_spaces.section(results.RunResults(config=Config(), uris={})))
    assert "classify.integration_cells=4000" in text(embedding_spaces.section(run()))


def test_the_page_holds_both_sections(monkeypatch) -> None:
    made = run(
        scores=scores({("random", "baron", "", "knn"): 0.5, ("random", "baron", "", "majority"): 0.1}), **frames()
    )
    monkeypatch.setattr(
        build, "SECTIONS", (classification_models.section, published_accuracy.section, embedding_spaces.section)
    )
    html = build.render(made, "key")
    assert '<section id="models">' in html
    assert '<section id="spaces">' in html
    assert "Table 3" in html


def test_models_with_numbers_that_were_chosen_with_public_scores_in_sight_are_named() -> None:
    models = ("finetune_linear_start", "knn", "probe@untrained", "genes_vote", "hvg_logreg", "majority")
    said = text(classification_models.section(run(scores=scores({("random", "baron", "", m): 0.5 for m in models}))))
    (line,) = [one for one in said.splitlines() if "public data sets in sight" in one]
    named = line.partition("in sight: ")[2].partition(". On those")[0].split("; ")
    assert named == [
        "mixgf, fine-tuned from a convex start", "untrained encoder, frozen + logistic probe", "regression and pseudobulk, mean of both",
    ]  # fmt: skip
    usual = classification_models.section(run(scores=scores({("random", "baron", "", "hvg_logreg"): 0.5})))
    assert "in sight" not in text(usual)
