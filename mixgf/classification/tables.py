"""Tables of a classification, from the files of its predictions, and an AnnData file.

Every table is in long form; its first columns name the task: group, split, direction, seed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mixgf.classification import embedding_measures, encoders, metrics, registry
from mixgf.classification.labels import Labelled
from mixgf.classification.splits import Split
from mixgf.classification.workspace import Workspace, vector_column
from mixgf.stats import donors
from mixgf.storage import files
from mixgf.storage.tables import read_schema, read_table


def tables(workspace: Workspace, splits: Sequence[Split], spaces: Sequence[str]) -> dict[str, pd.DataFrame]:
    """All tables, by file name.

    Args:
        workspace: Of the classification; all its predictions are there.
        splits: All splits.
        spaces: Embeddings that were measured as a whole.

    Returns:
        `scores`, `per_class`, `confusion`, `predictions`, `comparisons` (against the best baseline of each task), `added` (against the same model without the encoder), `epochs`
        (of fine-tunings), `splits` (role of every cell), `efficiency` (scores by share of the training labels) and `rejection`
        (of types that were left out of training). With `spaces` also `integration` (their measures), `maps` (two coordinates
        per cell) and `centroids` (of each species and type in every space, against the run's own encoder).
    """
    settings, table = workspace.config.classify, workspace.table
    name_of = dict(zip(table.cells.tolist(), table.names.tolist(), strict=True))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("scores", "epochs", "efficiency", "rejection")}
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in ("per_class", "confusion", "predictions", "splits")}
    on_curve = registry.curve(settings) if settings.label_shares else ()
    for split in splits:
        if split.whole:
            frames["splits"] += _members(table, split, name_of)
        for model in registry.scored(settings, split):
            made = read_table(workspace.paths.prediction(split, model.name))
            meta = json.loads(made.schema.metadata[b"mixgf"])
            mine: dict[str, Any] = {**split.task, "model": model.name}
            scored = _scores(split, mine, meta)
            if split.unseen:
                more = {"unseen": split.unseen, "num_unseen": int((made["true"].to_numpy() == split.unseen).sum())}
                rows["rejection"] += [row | more for row in scored]
                continue
            if model in on_curve and split.kind == "random":
                rows["efficiency"] += [row | {"share": split.share} for row in scored]
            if not split.whole:
                continue
            rows["scores"] += scored
            rows["epochs"] += [
                mine | epoch | {"chosen": epoch["epoch"] == meta["epoch"]} for epoch in meta.get("history", [])
            ]
            frame = made.to_pandas()
            for name, found in _by_class(table, split, mine, frame).items():
                frames[name].append(found)
            frames["predictions"].append(frame.assign(number=frame["cell"], cell=frame["cell"].map(name_of), **mine))
    out = {name: pd.concat(several, ignore_index=True) for name, several in frames.items()}
    out |= {name: pd.DataFrame(found) for name, found in rows.items()}
    order = ["group", "split", "direction", "seed", "model", "cell", "number", "true", "predicted", "probability"]
    out["predictions"] = out["predictions"][order]
    out["comparisons"] = comparisons(table, splits, out, workspace.config.seed)
    out["added"] = added(table, splits, out, workspace.config.seed)
    return out | (_spaces(workspace, spaces, name_of) if spaces else {})


def _spaces(workspace: Workspace, names: Sequence[str], name_of: dict[int, str]) -> dict[str, pd.DataFrame]:
    """The tables of whole embeddings."""
    table, rows = workspace.table, workspace.sample()
    base = pd.DataFrame({
        "cell": [name_of[c] for c in table.cells[rows].tolist()], "species": table.species[rows], "group": table.groups[rows],
        "type": table.labels[rows],
    })  # fmt: skip
    measures: list[dict[str, Any]] = []
    maps, spaces = [], {}
    for name in names:
        uri = workspace.integration_uri(name)
        made = read_table(uri)
        known, called = facts(uri), encoders.space_name(name)
        measures += [
            {"space": called, "metric": metric, "value": value, "low": low, "high": high, "interval_by": by, "num_cells": len(rows)}
            for metric, (value, low, high, by) in known["measures"].items()
        ]  # fmt: skip
        xy = made.select(["x", "y"]).to_pandas()
        maps.append(base.assign(space=called, x=xy["x"], y=xy["y"], map=known["map"]))
        spaces[called] = (xy.to_numpy(), vector_column(made))
    kinds_N = np.char.add(np.char.add(table.species[rows], "\x1f"), table.labels[rows])
    return {
        "integration": pd.DataFrame(measures),
        "maps": pd.concat(maps, ignore_index=True),
        "centroids": _centroids(spaces, kinds_N),
    }


def _centroids(spaces: dict[str, tuple[Any, Any]], kinds_N: Any) -> pd.DataFrame:
    """Each type's centroid against its position in the space of the run's own encoder, in maps and in the spaces themselves.

    `umap` takes both maps as they are drawn; `umap_aligned` first rotates the other map onto that of the run's own encoder.
    """
    own = encoders.space_name(encoders.CHECKPOINT)
    kinds, counts = np.unique(kinds_N, return_counts=True)
    enough = counts >= embedding_measures.MIN_CELLS
    kinds, counts = kinds[enough], counts[enough]
    columns = [
        "space",
        "species",
        "type",
        "num_cells",
        "umap",
        "umap_aligned",
        "distance_correlation",
        "distance_difference",
    ]
    if own not in spaces or not len(kinds):
        return pd.DataFrame(columns=columns)
    ours_N2, vectors_ND = spaces[own]
    ours, profile = (
        embedding_measures.centroids(ours_N2, kinds_N, kinds),
        embedding_measures.profiles(vectors_ND, kinds_N, kinds),
    )
    rows = []
    for name, (xy_N2, other_ND) in spaces.items():
        if name == own:
            continue
        other = embedding_measures.profiles(other_ND, kinds_N, kinds)
        same = embedding_measures.agreement(profile, other)
        away, turned = (
            np.hypot(*(embedding_measures.centroids(at, kinds_N, kinds) - ours).T) for at in (xy_N2, embedding_measures.aligned(xy_N2, ours_N2))
        )  # fmt: skip
        change = np.abs(profile - other).sum(1) / max(len(kinds) - 1, 1)
        for i, kind in enumerate(kinds.tolist()):
            species, label = kind.split("\x1f")
            rows.append([name, species, label, int(counts[i]), away[i], turned[i], same[i], change[i]])
    return pd.DataFrame(rows, columns=columns)


def facts(uri: str) -> dict[str, Any]:
    """Facts stored in a file of predictions: scores, what was resampled, seconds, epochs of a fine-tuning."""
    return dict(json.loads(read_schema(uri).metadata[b"mixgf"]))


def figures(found: dict[str, Any]) -> dict[str, float]:
    """`facts` as metrics: each score with the ends of its interval, and seconds."""
    ends = {
        f"{name}_{end}": value
        for name, (_, *both) in found["scores"].items()
        for end, value in zip(("low", "high"), both, strict=True)
    }
    return {name: one[0] for name, one in found["scores"].items()} | ends | {"seconds": found["seconds"]}


def _members(table: Labelled, split: Split, name_of: dict[int, str]) -> list[pd.DataFrame]:
    """Role of each cell: train, validation or test."""
    members = {"train": np.setdiff1d(split.train, split.validation), "validation": split.validation, "test": split.test}
    return [
        pd.DataFrame({**split.task, "part": part, "cell": [name_of[c] for c in table.cells[rows].tolist()]})
        for part, rows in members.items()
    ]


def _scores(split: Split, mine: dict[str, Any], meta: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per metric."""
    sizes = {"num_train": len(split.train), "num_test": len(split.test), "num_classes": len(split.classes)}
    return [
        mine
        | {"metric": metric, "value": value, "low": low, "high": high}
        | sizes
        | {"interval_by": meta["interval_by"]}
        for metric, (value, low, high) in meta["scores"].items()
    ]


def _by_class(table: Labelled, split: Split, mine: dict[str, Any], frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Scores per class, and the confusion matrix as (true, predicted, count)."""
    classes = np.asarray(split.classes)
    true_M, predicted_M = (split.ids(frame[c].to_numpy().astype(np.str_)) for c in ("true", "predicted"))
    matrix = metrics.confusion(true_M, predicted_M, len(classes))
    num_train = np.bincount(split.ids(table.labels[split.train]), minlength=len(classes))
    sizes = {"num_test": matrix.sum(1), "num_train": num_train}
    per_class = pd.DataFrame(mine | {"class": split.classes} | metrics.class_scores(matrix) | sizes)
    true, predicted = np.nonzero(matrix)
    counts = {"true": classes[true], "predicted": classes[predicted], "count": matrix[true, predicted]}
    return {"per_class": per_class, "confusion": pd.DataFrame(mine | counts)}


TASK = ["group", "split", "direction"]


def comparisons(
    table: Labelled, splits: Sequence[Split], found: dict[str, pd.DataFrame], seed: int
) -> pd.DataFrame:  # fmt: skip
    """Every model of an encoder against the best baseline of each task, on the same cells, over the seeds that both have.

    Columns besides the task: model, baseline, metric, difference (model minus baseline), low, high, p, p_mcnemar, seeds,
    interval_by, p_holm, outcome; see `metrics.compare` and `with_outcomes`.

    The best baseline is chosen on the test cells, which favours baselines: it has the highest mean difference of its macro F1
    to the model's, over the seeds that both have.

    Args:
        table: The labelled cells.
        splits: All splits.
        found: `scores` and `predictions`.
        seed: Of the bootstrap resamples.
    """

    def best_baseline(model: str, by_seed: pd.DataFrame) -> list[str]:
        if registry.is_baseline(model):
            return []
        baselines = [m for m in by_seed if registry.is_baseline(m)]
        ahead = by_seed[baselines].sub(by_seed[model], axis=0).mean().dropna()
        return [max(ahead.index, key=lambda m: (ahead[m], m))] if len(ahead) else []  # none: no seed in common

    return _paired(table, splits, found, seed, best_baseline)


def added(table: Labelled, splits: Sequence[Split], found: dict[str, pd.DataFrame], seed: int) -> pd.DataFrame:
    """What the pretrained encoder adds: each model of the run's encoder against the same without it (`registry.controls`).

    Columns and arguments as of `comparisons`; `baseline` is the control: the same model without an encoder, or on random weights.
    """

    def controls(model: str, by_seed: pd.DataFrame) -> list[str]:
        return [m for m in registry.controls(model) if m in by_seed and by_seed[[model, m]].notna().all(axis=1).any()]

    return _paired(table, splits, found, seed, controls)


def _paired(
    table: Labelled, splits: Sequence[Split], found: dict[str, pd.DataFrame], seed: int,
    against: Callable[[str, pd.DataFrame], list[str]],
) -> pd.DataFrame:  # fmt: skip
    """Models against others of the same task.

    `against` gives the other models of a model, from the macro F1 of the task by seed (rows) and model (columns).
    """
    macro = found["scores"][found["scores"]["metric"] == "macro_f1"]
    donor_of = dict(zip(table.cells.tolist(), table.donors.tolist(), strict=True))
    classes: dict[tuple[str, str, str], set[str]] = {}
    for s in [s for s in splits if s.whole]:  # seeds that hold out other donors may have other types
        classes.setdefault((s.group, s.kind, s.direction), set()).update(s.classes)
    rows = []
    for task, part in macro.groupby(TASK, sort=False):
        by_seed = part.pivot(index="seed", columns="model", values="value")[part["model"].unique()]
        here = found["predictions"]
        here = here[(here["group"] == task[0]) & (here["split"] == task[1]) & (here["direction"] == task[2])]
        by_model = {m: frame.sort_values(["seed", "number"]) for m, frame in here.groupby("model", sort=False)}
        code = {name: i for i, name in enumerate(sorted(classes[task]))}
        for model, baseline in [(m, other) for m in by_seed for other in against(m, by_seed)]:
            seeds = by_seed.index[by_seed[[model, baseline]].notna().all(axis=1)]  # expensive models have fewer
            mine, rival = (one[one["seed"].isin(seeds)] for one in (by_model[model], by_model[baseline]))
            paired = metrics.compare(
                true_M=mine["true"].map(code).to_numpy(np.int64), model_M=mine["predicted"].map(code).to_numpy(np.int64),
                baseline_M=rival["predicted"].map(code).to_numpy(np.int64), cells_M=mine["number"].to_numpy(np.int64),
                donors_M=np.array([donor_of[c] for c in mine["number"]], dtype=np.str_), seeds_M=mine["seed"].to_numpy(np.int64),
                num_classes=len(code), rng=np.random.default_rng([seed, 11]), held_out=task[1] == "donor",
            )  # fmt: skip
            rows += [
                dict(zip(TASK, task, strict=True)) | {
                    "model": model, "baseline": baseline, "metric": metric, "difference": one.value, "low": one.low,
                    "high": one.high, "p": one.p, "p_mcnemar": paired.p_mcnemar, "seeds": mine["seed"].nunique(), "interval_by": paired.by,
                }
                for metric, one in (("accuracy", paired.accuracy), ("macro_f1", paired.macro_f1))
            ]  # fmt: skip
    return with_outcomes(pd.DataFrame(rows))


def with_outcomes(comparisons: pd.DataFrame) -> pd.DataFrame:
    """Add `p_holm`, p corrected (Holm) for the rows of a model and a metric, and `outcome` by it (`metrics.outcomes`)."""
    if comparisons.empty:
        return comparisons
    corrected = comparisons.groupby(["model", "metric"])["p"].transform(lambda p: donors.holm(p.to_numpy(float)))
    found = metrics.outcomes(comparisons["difference"].to_numpy(float), corrected.to_numpy(float))
    return comparisons.assign(p_holm=corrected, outcome=found)


def write_cells(uri: str, workspace: Workspace, found: dict[str, pd.DataFrame]) -> str:
    """Write an AnnData of the labelled cells, with predictions for the test cells of seed 0.

    Predictions are of the model of the run's own encoder with the highest mean macro F1 on the first kind of split.

    Returns:
        The model's name; empty when none of the encoder's models was scored.
    """
    import anndata  # noqa: PLC0415 (slow to import)

    settings, table, board = workspace.config.classify, workspace.table, found["scores"]
    easy = board[(board["metric"] == "macro_f1") & (board["split"] == settings.splits[0])]
    easy = easy[easy["model"].map(registry.is_own).astype(bool)]
    if easy.empty:
        return ""
    model = str(easy.groupby("model")["value"].mean().sort_values().index[-1])
    one = found["predictions"]
    one = one[(one["model"] == model) & (one["seed"] == 0) & (one["split"] == settings.splits[0])].drop_duplicates(
        "number"
    )
    obs = pd.DataFrame(
        {"species": table.species, "source": table.sources, settings.label: table.labels},
        index=pd.Index(table.names.tolist(), dtype=str),
    )
    place = one.set_index("cell")
    obs["predicted"] = place["predicted"].reindex(obs.index).astype("category")
    obs["probability"] = place["probability"].reindex(obs.index)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        anndata.AnnData(obs=obs, uns={"mixgf": {"model": model, "split": settings.splits[0]}}).write_h5ad(path)
        files.upload(path, uri)
    return model
