"""Validation of a model inside the training cells, by which the classifier to keep is chosen and its doubts are calibrated.

Training cells are divided into folds by data set if there are several, else by donor if there are several, else at random within
types. Each fold is predicted by the model fitted to the others. So a model is evaluated as it will be used: on donors or data sets
that it has not seen. Test cells take no part. No fold has more than `MOST_LEFT_OUT` of the cells, because the kept model is fitted
to all of them, and other models do well with few cells. Where each donor has types of its own, as with a cell line per donor, folds
are of cells.

A model that trains an encoder is fitted once. It is evaluated on the split's validation cells, and compared there with the chosen
one of the other models (`choose`).

Shape letters: N training cells, C classes, K folds, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf.arrays import Bools, Floats, Ints, Names
from mixgf.classification import linear_start, metrics
from mixgf.classification.labels import UNKNOWN
from mixgf.classification.models.protocol import CellSet, Fitted, Measured, Model, Problem, SentenceSet
from mixgf.classification.places import Places
from mixgf.classification.workspace import as_column, vector_column
from mixgf.config.run import Config
from mixgf.corpus import packed
from mixgf.encoder import embed
from mixgf.storage import tables

MAX_FOLDS = 5
MOST_LEFT_OUT = 0.4
"""Largest share of the training cells in a fold of donors or data sets; where one is larger, folds are of cells."""
FEWEST_KNOWN = 0.5
"""Least share of the training cells whose type is in another fold of donors or data sets, too; where fewer are, folds are of cells."""
RESAMPLES = 200
"""Bootstrap resamples of the standard error of a difference."""
FOLD, SPLIT = "fold", "validation"
"""How a cell was predicted: left out with its fold, or as one of the split's validation cells."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Validation:
    """Predictions of training cells by a model that was not fitted to them."""

    by: str
    """What was left out together: `data set`, `donor` or `cell`."""
    rows_N: Ints
    """Places in the training cells."""
    labels_N: Ints
    probabilities_NC: Floats
    distance_N: Floats
    """Distance to the predicted type (`places.Places`)."""
    part_N: Names
    """`fold` or `validation`."""
    fold_N: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Number of the fold with which the cell was left out; no numbers = not known."""

    def of(self, part: str) -> Validation:
        """The predictions of one part."""
        mine = self.part_N == part
        return Validation(
            by=self.by, rows_N=self.rows_N[mine], labels_N=self.labels_N[mine], distance_N=self.distance_N[mine],
            probabilities_NC=self.probabilities_NC[mine], part_N=self.part_N[mine], fold_N=self.fold_N[mine[: len(self.fold_N)]],
        )  # fmt: skip

    @property
    def main(self) -> Validation:
        """The folds; the split's validation cells where there are none."""
        folded = self.of(FOLD)
        return folded if len(folded.rows_N) else self.of(SPLIT)

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the types of these cells."""
        return _macro_f1(self.labels_N, self.probabilities_NC.argmax(1))

    @property
    def accuracy(self) -> float:
        """Share of these cells that are predicted correctly."""
        return float((self.probabilities_NC.argmax(1) == self.labels_N).mean())


def folds_of(datasets_N: Names, donors_N: Names, labels_N: Ints, seed: int) -> tuple[str, Ints]:
    """What is left out together, and the fold of each training cell (N,); -1 = never left out."""
    for by, units_N in (("data set", datasets_N), ("donor", donors_N)):
        names, sizes = np.unique(units_N, return_counts=True)
        if len(names) < 2 or (by == "donor" and UNKNOWN in names):
            continue
        fold_of, load = {}, np.zeros(min(MAX_FOLDS, len(names)))
        for name in names[np.argsort(-sizes, kind="stable")].tolist():  # the largest first, into the smallest fold
            fold = int(load.argmin())
            fold_of[name], load[fold] = fold, load[fold] + (units_N == name).sum()
        fold_N = np.array([fold_of[name] for name in units_N.tolist()], dtype=np.int64)
        if load.max() > MOST_LEFT_OUT * len(units_N) or _share_known(labels_N, fold_N) < FEWEST_KNOWN:
            continue
        return by, fold_N
    return "cell", linear_start.folds(labels_N, seed, MAX_FOLDS)


def _share_known(labels_N: Ints, fold_N: Ints) -> float:
    """Share of the cells whose type has cells in another fold: the others cannot be predicted when their fold is left out."""
    has_CK = np.zeros((int(labels_N.max()) + 1, int(fold_N.max()) + 1), dtype=bool)
    has_CK[labels_N, fold_N] = True
    return float((has_CK.sum(axis=1) > 1)[labels_N].mean())


def validate(
    model: Model, problem: Problem[Any], fitted: Fitted[Any], fold_N: Ints, *, by: str, also_split: bool
) -> Validation:  # fmt: skip
    """Predict training cells that the model was not fitted to.

    Args:
        model: The model.
        problem: Of a split, with all its training cells.
        fitted: The model on this problem. One that trains an encoder is not fitted again.
        fold_N: Fold of each training cell.
        by: What is left out together.
        also_split: Predict the split's validation cells as well, by the model fitted to the others.
    """
    if model.trains_encoder:
        return _gather("cell", [_left_out(fitted, problem, problem.is_validation, SPLIT)])
    wanted = [(fold_N == fold, FOLD, int(fold)) for fold in np.unique(fold_N[fold_N >= 0])]
    wanted += [(problem.is_validation, SPLIT, -1)] * (also_split and bool(problem.is_validation.any()))
    found = []
    for out_N, part, fold in wanted:
        known = np.isin(problem.labels, problem.labels[~out_N])  # a type of this fold only cannot be predicted
        if not (out_N & known).any() or len(np.unique(problem.labels[~out_N])) < 2:
            continue
        rest = replace(
            problem, train=problem.train[~out_N], labels=problem.labels[~out_N], target=problem.train[out_N & known],
            is_validation=np.zeros(int((~out_N).sum()), dtype=bool),
        )  # fmt: skip
        found.append(_left_out(model.fit(rest), problem, out_N & known, part, fold=fold, learned=rest))
    return _gather(by, found)


def _left_out(
    fitted: Fitted[Any],
    problem: Problem[Any],
    out_N: Bools,
    part: str,
    *,
    fold: int = -1,
    learned: Problem[Any] | None = None,
) -> dict[str, Any]:
    cells = problem.train[out_N]
    assert fitted.classifier is not None, "a model to keep has arrays"
    if learned is None:
        train, labels_N = problem.learning, problem.labels[~problem.is_validation]
    else:
        train, labels_N = learned.train, learned.labels
    p_NC = fitted.predict(cells)
    train, cells = (measured(fitted, some, problem.config) for some in (train, cells))
    where = Places.fit(fitted.classifier.places(train), labels_N, problem.num_classes)
    distance_N = where.distances(fitted.classifier.places(cells), p_NC.argmax(1))
    return {
        "fold": np.full(len(p_NC), fold), "rows": np.flatnonzero(out_N), "labels": problem.labels[out_N], "p": p_NC, "distance": distance_N,
        "part": np.full(len(p_NC), part),
    }  # fmt: skip


def measured(fitted: Fitted[Any], cells: CellSet[Any], config: Config) -> CellSet[Any]:
    """Cells as the arrays of `Fitted.classifier` read them: sentences become vectors of the trained encoder, and ranks of genes."""
    if not isinstance(cells.x, SentenceSet):
        return cells
    corpus, vectors_ND = cells.x.corpus, None
    if fitted.vectors is not None:
        vectors_ND = fitted.vectors(cells.x.cells)
    elif fitted.encoder is not None:
        layer = config.embed.layer if fitted.layer is None else fitted.layer
        vectors_ND = embed.embed_cells(
            fitted.encoder, corpus, cells.x.cells, config.embed.pooling, layer, config.train.micro_tokens,
            max_len=fitted.max_len,
        )  # fmt: skip
    ranks_NV = linear_start.gene_rows(
        *packed.truncate(*corpus.tokens(cells.x.cells), fitted.max_len), corpus.vocabulary.size
    )
    return CellSet(Measured(vectors=vectors_ND, ranks=ranks_NV), cells.species, cells.datasets)


def _gather(by: str, found: Sequence[dict[str, Any]]) -> Validation:
    rows, labels, p, distance, part, fold = (
        np.concatenate([one[name] for one in found]) for name in ("rows", "labels", "p", "distance", "part", "fold")
    )
    return Validation(
        by=by,
        rows_N=rows,
        labels_N=labels,
        probabilities_NC=p,
        distance_N=distance,
        part_N=part.astype(np.str_),
        fold_N=fold,
    )


def _macro_f1(labels_N: Ints, predicted_N: Ints) -> float:
    size = int(max(labels_N.max(), predicted_N.max())) + 1
    return float(metrics.totals(metrics.confusion(labels_N, predicted_N, size))["macro_f1"])


def standard_error(labels_N: Ints, first_N: Ints, second_N: Ints, seed: int) -> float:
    """Standard error of the difference in macro F1 of two predictions of the same cells, by a bootstrap over cells within types."""
    rng = np.random.default_rng([seed, 17])
    order = np.argsort(labels_N, kind="stable")
    starts = np.flatnonzero(np.diff(labels_N[order], prepend=-1))
    sizes = np.diff([*starts, len(order)])
    draws = []
    for _ in range(RESAMPLES):
        pick = np.concatenate(
            [order[s : s + n][rng.integers(0, n, n)] for s, n in zip(starts.tolist(), sizes.tolist(), strict=True)]
        )
        draws.append(_macro_f1(labels_N[pick], first_N[pick]) - _macro_f1(labels_N[pick], second_N[pick]))
    return float(np.std(draws))


def choose(found: Mapping[str, Validation], order: Sequence[str], seed: int) -> tuple[str, str]:
    """The model to keep, and why in words.

    Of the models with folds, the first of `order` whose macro F1 is within one standard error of the best (the one-standard-error
    rule: Hastie et al. 2009, section 7.10). The error is the larger one of that over cells (`standard_error`) and that over folds
    (`fold_error`): models can differ by donor more than cells tell. A model that trains an encoder takes its place if it is better on the split's
    validation cells by more than one standard error.

    Args:
        found: Validation of each model, by name; not empty.
        order: Names of models, those first that are preferred where they are equally good.
        seed: Of the resamples.
    """
    ranked = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    folded = {name: found[name].of(FOLD) for name in ranked if len(found[name].of(FOLD).rows_N)}
    chosen, why = "", ""
    if folded:
        best = max(folded, key=lambda name: (folded[name].macro_f1, -ranked.index(name)))
        for name, one in folded.items():
            gap = folded[best].macro_f1 - one.macro_f1
            error = 0.0 if name == best else _paired_error(folded[best], one, seed)
            if gap <= error:
                chosen = name
                break
        one = folded[chosen]
        why = f"macro F1 {one.macro_f1:.3f} on training cells, left out by {one.by}"
        if chosen != best:
            why += f"; {best} has {folded[best].macro_f1:.3f}, which is within one standard error"
    for name in [name for name in ranked if name not in folded]:
        mine = found[name].of(SPLIT)
        rival = found[chosen].of(SPLIT) if chosen else None
        if rival is None or not len(rival.rows_N):
            chosen, why = (name, _of_split(mine)) if not chosen else (chosen, why)
            continue
        if mine.macro_f1 - rival.macro_f1 > _paired_error(mine, rival, seed):
            chosen, why = name, _of_split(mine)
    return chosen, why


def _of_split(mine: Validation) -> str:
    return f"macro F1 {mine.macro_f1:.3f} on {len(mine.rows_N):,} validation cells"


def _paired_error(first: Validation, second: Validation, seed: int) -> float:
    _, mine, theirs = np.intersect1d(first.rows_N, second.rows_N, return_indices=True)
    said = first.probabilities_NC.argmax(1)[mine], second.probabilities_NC.argmax(1)[theirs]
    over_cells = standard_error(first.labels_N[mine], *said, seed)
    if not len(first.fold_N):
        return over_cells
    return max(over_cells, fold_error(first.labels_N[mine], *said, first.fold_N[mine]))


def fold_error(labels_N: Ints, first_N: Ints, second_N: Ints, fold_N: Ints) -> float:
    """Standard error of the mean difference in macro F1 of two predictions, over folds (sets of donors or studies); 0 with one fold."""
    folds = np.unique(fold_N)
    if len(folds) < 2:
        return 0.0
    rows = [fold_N == fold for fold in folds]
    gaps = [_macro_f1(labels_N[mine], first_N[mine]) - _macro_f1(labels_N[mine], second_N[mine]) for mine in rows]
    return float(np.std(gaps, ddof=1) / len(gaps) ** 0.5)


def save(uri: str, found: Validation) -> None:
    """Write a validation as Parquet."""
    frame = pd.DataFrame(
        {"row": found.rows_N, "label": found.labels_N, "distance": found.distance_N, "part": found.part_N}
    ).assign(**({"fold": found.fold_N} if len(found.fold_N) else {}))
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.append_column("p", as_column(found.probabilities_NC))
    tables.write_table(uri, table.replace_schema_metadata({"by": found.by}))


def load(uri: str) -> Validation:
    """Read what `save` wrote."""
    table = tables.read_table(uri)
    return Validation(
        by=table.schema.metadata[b"by"].decode(), rows_N=table["row"].to_numpy(), labels_N=table["label"].to_numpy(),
        distance_N=table["distance"].to_numpy(), probabilities_NC=vector_column(table, "p"),
        part_N=np.asarray(table["part"].to_pylist(), dtype=np.str_),
        fold_N=table["fold"].to_numpy() if "fold" in table.column_names else np.empty(0, dtype=np.int64),
    )  # fmt: skip
