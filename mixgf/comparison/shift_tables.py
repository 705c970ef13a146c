"""Tables of matched shifts, in every space: encoders, expression, and ranks of one-to-one orthologs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from mixgf.arrays import Bools, Floats, Ints
from mixgf.classification import features
from mixgf.classification.encoders import EXPRESSION
from mixgf.classification.labels import UNKNOWN
from mixgf.comparison import shift_matching
from mixgf.comparison.encoder_sets import ComparisonContext, EncoderSet, donors_of
from mixgf.comparison.shift_matching import Shift
from mixgf.comparison.shift_selection import cells_of
from mixgf.corpus.reader import Corpus

RANKS = "ranks"
"""The space of within-cell rank scores of one-to-one orthologs."""
MIN_DETECTED = 0.01
"""Share of a shift's cells that must express a gene; rarer genes are left out for that shift."""


def match_shifts(context: ComparisonContext) -> dict[str, pd.DataFrame]:
    """Tables `pairs`, `shifts` (`shift_matching.match`) and `together` (`shift_matching.tag_agreement`) of all spaces."""
    found: dict[str, list[pd.DataFrame]] = {"pairs": [], "shifts": [], "together": []}
    if not context.config.compare.shifts:
        return {}
    settings, seed = context.config.compare, context.config.seed
    for encoder_set in context.encoder_sets:
        corpus = Corpus(encoder_set.paths.corpus)
        obs, shifts = corpus.obs(), encoder_set.shifts
        cells = cells_of(shifts)
        placed = [replace(s, rows_N=np.searchsorted(cells, s.rows_N)) for s in shifts]
        about = pd.DataFrame([_about(encoder_set, obs, corpus.lengths_N, s) for s in shifts])
        for space, vectors_ND, seen_KD in _spaces(context, encoder_set, cells, placed):
            pairs, table = shift_matching.match(
                placed, vectors_ND, num_permutations=settings.num_permutations, seed=seed, seen_KD=seen_KD
            )
            table = table.merge(about, on="shift")
            tags = shift_matching.tag_agreement(pairs, num_permutations=settings.num_permutations, seed=seed)
            for name, frame in (("pairs", pairs), ("shifts", table), ("together", tags)):
                found[name].append(frame.assign(space=space))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items()}


def _spaces(
    context: ComparisonContext, encoder_set: EncoderSet, cells: Ints, shifts: Sequence[Shift]
) -> Iterator[tuple[str, Floats, Bools | None]]:
    """Name, vectors (N, D), and columns used for each shift (K, D; None = all), space by space."""
    workspace = encoder_set.workspace(cells)
    for encoder in encoder_set.encoders:
        yield encoder_set.space_name(encoder), workspace.vectors(encoder, cells), None
    if encoder_set.name or not context.config.compare.controls:
        return
    counts, _ = workspace.counts(np.arange(len(cells)))
    detected = [np.asarray((counts[s.rows_N] > 0).mean(0)).ravel() >= MIN_DETECTED for s in shifts]
    genes = np.flatnonzero(np.any(detected, axis=0))
    seen_KD = np.stack(detected)[:, genes]
    yield EXPRESSION, features.log_normalise(counts)[:, genes].toarray(), seen_KD
    yield RANKS, features.rank_scores(counts, genes), seen_KD


def _about(
    encoder_set: EncoderSet, obs: pd.DataFrame, lengths_N: npt.NDArray[np.int32], shift: Shift
) -> dict[str, object]:
    """Possible confounders of a shift: donors of each condition, and the change of sentence length (log2)."""
    known = donors_of(encoder_set, obs.iloc[shift.rows_N])
    before, after = (set(known[shift.after_N == side].tolist()) - {UNKNOWN} for side in (False, True))
    weights_N = shift_matching.contrast_weights(shift.after_N, shift.strata_N)
    return {
        "shift": shift.name, "donors_before": len(before), "donors_after": len(after), "donors_shared": len(before & after),
        "log2_length": float(weights_N @ np.log2(lengths_N[shift.rows_N])),
    }  # fmt: skip
