"""Evaluation of an encoder during and after its training: zero-shot scores, fine-tuned scores, alignment and uniformity.

All arms of a sweep are evaluated on the same cells and splits with the same random draws, so differences between arms are
differences between encoders. The splits are those of `held_out`: `select` while arms are compared, `test` once at the end.

Shapes: N evaluation cells, M scored cells, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from mixgf.classification import finetune, metrics, registry, splits
from mixgf.classification.labels import Labelled
from mixgf.classification.models.finetuned import Finetune
from mixgf.classification.models.protocol import SentenceSet, problem_of
from mixgf.classification.splits import Split
from mixgf.config.classification import HEADS
from mixgf.config.run import Config
from mixgf.corpus.packed import Packed
from mixgf.corpus.reader import Corpus
from mixgf.encoder import embed
from mixgf.encoder.bert import Encoder
from mixgf.training import losses, views
from mixgf.training.worker_group import LocalContext

COLUMNS = ["split", "group", "direction", "model", "metric", "value"]
"""Columns of a table of scores."""
TRAINING = "training"
"""The model of rows of the training itself, such as its losses on held-out cells (`training.held_out_loss`)."""
SUBSAMPLE = 0.8
"""Share of the genes of a cell in its second view, for the alignment."""
_DRAW = 0x4A554447
"""Key of the random draws of cells and genes."""


def sample(table: Labelled, number: int, seed: int) -> Labelled:
    """At most `number` of the labelled cells (0 = all), drawn at random, with groups of equal size as far as possible."""
    if not number or number >= len(table):
        return table
    left, rows = number, []
    groups, counts = np.unique(table.groups, return_counts=True)
    for place, i in enumerate(np.argsort(counts, kind="stable")):
        share = left // (len(groups) - place)  # small groups leave room for large ones
        mine = np.flatnonzero(table.groups == groups[i])
        chosen = mine[splits.random_order(table.names[mine], _DRAW, seed, groups[i])[:share]]
        rows.append(chosen)
        left -= len(chosen)
    return table.only(np.sort(np.concatenate(rows)))


def zero_shot(
    encoder: Encoder, corpus: Corpus, table: Labelled, made: Sequence[Split], *, run: Config, seed: int
) -> pd.DataFrame:
    """Scores of classifiers on the frozen vectors for every split, and alignment and uniformity of the vectors.

    Args:
        encoder: The encoder in any state of training; it is not changed.
        corpus: Corpus with the sentences of the cells.
        table: The evaluation cells.
        made: Splits of these cells.
        run: Config of the arm: `embed` for the vectors, `classify` for the heads.
        seed: Seed of the second view, the same for all arms.

    Returns:
        One row per value: split, group, direction, model (a head, or `space`), metric, value. Metrics of a head are
        `macro_f1` and `accuracy`. Metrics of `space` are `alignment` (mean squared distance on the unit sphere between a cell and the
        same cell with 80 % of its genes; 0 is best) and `uniformity` (Wang and Isola 2020; lower is more uniform).
    """

    def embedded(sentences: embed.SentenceSource) -> npt.NDArray[np.float32]:
        return embed.embed_cells(
            encoder, sentences, table.cells, run.embed.pooling, run.embed.layer, run.train.micro_tokens
        )  # fmt: skip

    vectors_ND = embedded(corpus)
    a_ND, b_ND = torch.from_numpy(vectors_ND), torch.from_numpy(embedded(_GeneSubsample(corpus, seed)))
    figures = {"alignment": losses.alignment(a_ND, b_ND), "uniformity": losses.uniformity(a_ND)}
    rows: list[tuple[object, ...]] = [("all", "", "", "space", name, float(value)) for name, value in figures.items()]
    for split in made:
        problem = problem_of(table, split, run, vectors_ND[split.train], vectors_ND[split.test])
        for head in HEADS:
            p_MC = registry.parse(head).fit(problem).predict(problem.target)
            rows += _scored(split, head, table, p_MC)
    return pd.DataFrame(rows, columns=COLUMNS)


def finetuned(
    encoder: Encoder, corpus: Corpus, table: Labelled, made: Sequence[Split], *, run: Config, context: LocalContext
) -> pd.DataFrame:
    """Scores after fine-tuning on every split, in the layout of `zero_shot`. The encoder is changed.

    Args:
        encoder: The encoder from which each fine-tuning starts.
        corpus: Corpus with the sentences of the cells.
        table: The evaluation cells.
        made: Splits of these cells.
        run: Config of the arm; `classify` for the fine-tuning.
        context: The worker, with the device of the encoder.
    """
    rows: list[tuple[object, ...]] = []
    start = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for split in made:
        encoder.load_state_dict(start)
        train, tested = (SentenceSet(corpus, table.cells[rows_]) for rows_ in (split.train, split.test))
        problem = problem_of(table, split, run, train, tested)
        tuned = finetune.finetune(encoder, problem, config=run, context=context)
        rows += _scored(split, Finetune.head, table, tuned.predict(tested.cells))
    return pd.DataFrame(rows, columns=COLUMNS)


def _scored(split: Split, model: str, table: Labelled, p_MC: npt.NDArray[np.floating]) -> list[tuple[object, ...]]:
    """Rows of `COLUMNS` for class probabilities of the cells of `split.test`."""
    matrix = metrics.confusion(split.ids(table.labels[split.test]), p_MC.argmax(1).astype(np.int64), len(split.classes))
    totals = metrics.totals(matrix)
    key = split.kind, split.group, split.direction, model
    return [(*key, name, float(totals[name])) for name in ("macro_f1", "accuracy")]


class _GeneSubsample:
    """Sentences of a corpus without some of their genes; the same genes at every call."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._corpus, self._seed = corpus, seed

    @property
    def lengths_N(self) -> npt.NDArray[np.int32]:
        return self._corpus.lengths_N

    @property
    def cls(self) -> bool:
        return self._corpus.cls

    def tokens(self, cells: npt.ArrayLike) -> Packed:
        few = np.asarray(cells, dtype=np.int64)
        return views.subsample_genes(self._corpus.tokens(few), few, SUBSAMPLE, (self._seed, _DRAW))


def objective(found: pd.DataFrame, kinds: Sequence[str], head: str) -> float:
    """The score by which arms are ranked: macro F1 of a head, mean over tasks of a kind of split, then over kinds.

    Args:
        found: Rows of `zero_shot`.
        kinds: Kinds of splits to use; kinds without tasks are left out.
        head: `knn`, `probe` or `centroid`.
    """
    mine = found[(found["model"] == head) & (found["metric"] == "macro_f1") & found["split"].isin(kinds)]
    return float(mine.groupby("split")["value"].mean().mean())
