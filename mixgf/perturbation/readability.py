"""In how many start cells each gene can be read, and how much of a sentence the encoder would have to read to see it.

An encoder reads the first genes of a sentence, those of the highest rank values. Transcription factors often stand behind them.

Letters: N start cells, K targets, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from mixgf.arrays import Float64s, Ints
from mixgf.corpus.reader import Corpus
from mixgf.perturbation import group_design
from mixgf.perturbation.group_design import Design

SHARE = 0.9
"""Share of the start cells that hold a gene, in which `reading_length` shows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Readability:
    """Counts of start cells by target, (K,)."""

    start_K: Ints
    """Perturbed start cells of the target's species."""
    readable_K: Ints
    """Those whose sentence, as it is read, holds all its genes."""
    stored_K: Ints
    """Those whose stored sentence holds them."""
    length_K: Float64s
    """Tokens that would show them in `SHARE` of the latter; NaN = in no stored sentence."""

    def columns(self) -> dict[str, object]:
        """Columns of the table of genes."""
        return {
            "start_cells": self.start_K,
            "readable_cells": self.readable_K,
            "expressing_cells": self.stored_K,
            "reading_length": self.length_K,
        }


def measure(corpus: Corpus, plan: Design, *, block: int = 512) -> Readability:
    """Where the targets stand in the stored sentences of the perturbed cells."""
    num, size = len(plan.targets), corpus.vocabulary.size
    genes_KM = plan.genes_KM
    owned_KS = group_design.targets_by_species(plan, corpus)
    last_KN = np.full((num, len(plan.cells_N)), -1, dtype=np.int32)
    for start in range(0, len(plan.cells_N), block):
        cells = plan.cells_N[start : start + block]
        ids_T, offsets_B1 = corpus.tokens(cells, whole=True)
        for n, (a, b) in enumerate(itertools.pairwise(offsets_B1)):
            place_V = np.full(size + 1, -1, dtype=np.int64)
            place_V[ids_T[a:b]] = np.arange(b - a)
            place_KM = np.where(genes_KM >= 0, place_V[genes_KM], 0)
            last_KN[:, start + n] = np.where((place_KM >= 0).all(axis=1), place_KM.max(axis=1), -1)
    mine_KN = owned_KS[:, corpus.species_N[plan.cells_N]]
    held_KN = mine_KN & (last_KN >= 0)
    read_KN = held_KN & (last_KN < corpus.lengths_N[plan.cells_N][None, :])
    length_K = np.array(
        [
            np.quantile(row[held], SHARE, method="inverted_cdf") + 1 if held.any() else np.nan
            for row, held in zip(last_KN, held_KN, strict=True)
        ],
        dtype=np.float64,
    )
    return Readability(
        start_K=mine_KN.sum(axis=1), readable_K=read_KN.sum(axis=1), stored_K=held_KN.sum(axis=1), length_K=length_K
    )


def warnings(plan: Design, found: Readability, max_len: int) -> list[str]:
    """A line on targets that are readable in fewer than half of the cells that hold them; none where there are none.

    Args:
        plan: the design.
        found: of its targets.
        max_len: tokens that the encoder reads.
    """
    asked_K = np.array([not target.null for target in plan.targets])
    hidden = np.flatnonzero(asked_K & (2 * found.readable_K < found.stored_K))
    if not len(hidden):
        return []
    worst = hidden[np.argsort(found.readable_K[hidden] - found.stored_K[hidden], kind="stable")][:3]
    shown = ", ".join(
        f"{plan.targets[k].symbol} in {found.readable_K[k]} of the {found.stored_K[k]} start cells that hold it"
        for k in worst
    )
    need = int(np.nanmax(found.length_K[hidden]))
    return [
        (
            f"{len(hidden):,} of {int(asked_K.sum()):,} genes can be read in fewer than half of the start cells that hold them, as the encoder "
            f"reads {max_len:,} tokens: {shown}. An encoder with model.max_positions = {need:,} would show them"
        )
    ]


def cut_warning(corpus: Corpus, plan: Design, operations: tuple[str, ...]) -> str:
    """A line on sentences that are cut, where genes are deleted; empty where there are none."""
    read_N = corpus.lengths_N[plan.cells_N]
    num = int((corpus.stored_N[plan.cells_N] > read_N).sum())
    if "delete" not in operations or not num:
        return ""
    return (
        f"{num:,} of {len(plan.cells_N):,} sentences are cut to {int(read_N.max()):,} tokens: a deletion makes them shorter and "
        "does not pull the next gene in, as in the published code"
    )
