"""How a cell becomes a vector: one stated reading for expression, for an encoder's vectors and for ranks.

| step | what happens |
|---|---|
| raw | log-normalised counts of chosen genes; or an encoder's vector; or the genes of the sentence, weighted by rank |
| centre | the mean of the cell's study is subtracted (study = data set and species) |
| scale | nothing (one scale for all columns); or z-scores within the study, where a model's authors have it so |
| components | nothing; or principal components |
| length | cells are scaled to length 1 for linear models. Cosines do not depend on it |

Columns are not z-scored by default: this enlarges the noise of columns that vary little. What is subtracted from a study without
training cells is stated by `Align`. Its cells to predict are seen, their labels are not.

Shape letters: N training cells, M cells to predict, G genes, H chosen genes or raw features, K components, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy import sparse

from mixgf.arrays import Bools, Floats, Ints
from mixgf.classification import study_shift
from mixgf.classification.features import log_normalise, principal_components, variable_genes
from mixgf.classification.models.protocol import CellSet, Measured, Problem, counts_of
from mixgf.classification.simple_classifiers import Head, Values, unit

RawKind: TypeAlias = Literal["expression", "vectors", "ranks"]


class Align(Enum):
    """What is subtracted from cells of a study without training cells."""

    NONE = "the mean of all training cells"
    OWN_MEAN = "the mean of the study's own cells"
    BY_TYPES = "the mean of all training cells and the study's shift, which does not depend on its shares of types (`study_shift`)"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """One block of a cell's vector, fitted on training cells."""

    raw: RawKind
    columns_H: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Genes that are read, as columns of the counts; empty = all columns."""
    centres: dict[str, Floats] = field(default_factory=dict)
    """Mean (H,) of each study of the training cells; empty = nothing is subtracted."""
    deviations: dict[str, Floats] = field(default_factory=dict)
    """With z-scores: reciprocal standard deviation (H,) of each study."""
    mean_H: Floats = field(default_factory=lambda: np.empty(0))
    """Mean of all training cells."""
    deviation_H: Floats = field(default_factory=lambda: np.empty(0))
    """With z-scores: reciprocal standard deviation of all training cells; else no numbers."""
    align: Align = Align.OWN_MEAN
    components_HK: Floats = field(default_factory=lambda: np.empty((0, 0)))
    """Principal components; no columns = none."""
    length: float = 0.0
    """Cells are scaled to length 1 (0), or divided by this number."""
    absent_H: Bools = field(default_factory=lambda: np.empty(0, dtype=bool))
    """Genes that the cells to predict do not have: they count as the mean. Empty = none."""

    def __call__(self, cells: CellSet[Any]) -> Values:
        """Values (M, H), or (M, K) with components."""
        raw_MH = _raw(self.raw, cells.x, self.columns_H)
        if not self.centres:
            return raw_MH
        out_MH: Floats = np.array(raw_MH, dtype=np.float32)
        for study in np.unique(cells.studies).tolist():
            mine = cells.studies == study
            mean_H, deviation_H = self._moments(study, out_MH[mine])
            out_MH[mine] -= mean_H
            if self.deviation_H.size:
                out_MH[mine] *= deviation_H
        if self.absent_H.size:
            out_MH[:, self.absent_H] = 0.0
        if self.components_HK.size:
            out_MH = out_MH @ self.components_HK
        return out_MH / self.length if self.length else unit(out_MH)

    def _moments(self, study: str, own_MH: Floats) -> tuple[Floats, Floats]:
        if study in self.centres:
            return self.centres[study], self.deviations.get(study, self.deviation_H)
        if self.align is not Align.OWN_MEAN:
            return self.mean_H, self.deviation_H
        return own_MH.mean(0), _reciprocal(own_MH.std(0)) if self.deviation_H.size else self.deviation_H


def fit_reading(
    problem: Problem[Any], raw: RawKind, *, z_scores: bool = False, components: bool = False, joint: bool = False,
    joint_genes: bool = False,
    length: Literal["cell", "common", "none"] = "cell",
) -> Reading:  # fmt: skip
    """Fit a reading on the training cells of a problem; for `expression`, of their variable genes.

    Args:
        problem: The cells. With `classify.align`, the cells to predict fix the centre of a study without training cells.
        raw: What is read.
        z_scores: Divide by the standard deviation within the study.
        components: Take principal components.
        joint: The cells to predict take part in the components.
        joint_genes: They also take part in the choice of variable genes, as where few cells have a label.
        length: `cell`: every cell has length 1. `common`: all are divided by the root of the training cells' mean squared length.
    """
    train, target, align = problem.train, problem.target, align_of(problem)
    columns_H = expression_genes(problem, joint=joint_genes) if raw == "expression" else np.empty(0, dtype=np.int64)
    if align is Align.OWN_MEAN and raw == "expression" and problem.by_types:
        align = Align.BY_TYPES
    raw_NH = np.asarray(_raw(raw, train.x, columns_H), dtype=np.float32)
    some = {study: raw_NH[train.studies == study] for study in np.unique(train.studies).tolist()}
    if align is Align.OWN_MEAN:
        for study in np.setdiff1d(target.studies, train.studies).tolist():
            some[study] = np.asarray(_raw(raw, target[target.studies == study].x, columns_H), dtype=np.float32)
    mean_H, centres = raw_NH.mean(0), {study: values.mean(0) for study, values in some.items()}
    if align is Align.BY_TYPES:
        centres |= {study: mean_H + shift_G[columns_H] for study, shift_G in study_shift.shifts(problem).items()}
    made = Reading(
        raw=raw, columns_H=columns_H, centres=centres, align=align,
        deviations={study: _reciprocal(values.std(0)) for study, values in some.items()} if z_scores else {},
        mean_H=mean_H, deviation_H=_reciprocal(raw_NH.std(0)) if z_scores else np.empty(0), length=1.0,
    )  # fmt: skip
    if components:
        several = [made(train)] + [made(target)] * (joint and len(target.species) > 0)
        made = replace(made, components_HK=principal_components(np.concatenate(several), problem.seed()))
    if length == "common":
        values_NK = np.asarray(made(train))
        return replace(made, length=float(np.sqrt(max((values_NK**2).sum(1).mean(), 1e-12))))
    return made if length == "none" else replace(made, length=0.0)


def _raw(kind: RawKind, x: Any, columns_H: Ints) -> Values:
    """Raw features (M, H)."""
    if kind == "ranks":
        return x.ranks
    if kind == "vectors":
        return np.asarray(x.vectors if isinstance(x, Measured) else x)
    return np.asarray(log_normalise(counts_of(x))[:, columns_H].toarray())


def _reciprocal(sd_H: Floats) -> Floats:
    return np.divide(1, sd_H, out=np.zeros_like(sd_H), where=sd_H > 1e-8)


def values_of(readings: Sequence[Reading], cells: CellSet[Any]) -> Values:
    """Values of several readings side by side (M, sum of H or K)."""
    several = [reading(cells) for reading in readings]
    if len(several) == 1:
        return several[0]
    if any(sparse.issparse(values) for values in several):
        return sparse.hstack([sparse.csr_matrix(values) for values in several], format="csr")
    return np.hstack(several)


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """Readings side by side, and a head on them."""

    readings: tuple[Reading, ...]
    head: Head
    weight: float = 1.0
    """Of its probabilities in the mean of all members."""

    def __call__(self, cells: CellSet[Any]) -> Floats:
        """Class probabilities (M, C)."""
        return self.head(values_of(self.readings, cells))


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """Members whose probabilities are averaged by weight; most have one. It is arrays and numbers only, so it can be stored."""

    members: tuple[Member, ...]

    def __call__(self, cells: CellSet[Any]) -> Floats:
        """Class probabilities (M, C)."""
        total = sum(member.weight for member in self.members)
        return np.asarray(sum(member.weight * member(cells) for member in self.members) / total)

    def places(self, cells: CellSet[Any]) -> Floats | sparse.csr_matrix:
        """The vectors in which distances to types are measured: the first reading of the first member."""
        return self.members[0].readings[0](cells)

    def map_readings(self, change: Callable[[Reading], Reading]) -> Classifier:
        """The classifier with every reading changed."""
        members = (replace(m, readings=tuple(change(reading) for reading in m.readings)) for m in self.members)
        return Classifier(members=tuple(members))


def align_of(problem: Problem[Any]) -> Align:
    """`classify.align` as `Align`."""
    return Align.OWN_MEAN if problem.config.classify.align else Align.NONE


def expression_genes(problem: Problem[Any], *, joint: bool = False) -> Ints:
    """The variable genes of the training cells, or of these and the cells to predict."""
    sets = (problem.train, problem.target) if joint else (problem.train,)
    counts = sparse.vstack([counts_of(cells.x) for cells in sets], format="csr")
    return variable_genes(log_normalise(counts), problem.config.classify.num_hvgs)
