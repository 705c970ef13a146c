"""Moved here from mixgf/config.py."""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.config.checks import _one_of, _require, split_named
from mixgf.config.classification import HEADS


@dataclass(frozen=True, kw_only=True, slots=True)
class Compare:
    """Across species: one space, transfer, model matching (paper section 3.4, spec section 10)."""

    encoders: tuple[str, ...] = ()
    """Further encoders: NAME=CHECKPOINT on the run's corpus, or NAME=CHECKPOINT@CORPUS where the vocabulary is another one
    (vocab.sharing = ortholog): a corpus of the same cells with that vocabulary."""
    models: tuple[str, ...] = ("knn", "probe")
    """Heads that carry labels to the other species: on the run's encoder, on an untrained one and on each of `encoders`."""
    controls: tuple[str, ...] = ("majority", "hvg_logreg", "pca_knn", "pseudobulk", "rank_pca")
    """Baselines on one-to-one orthologs that do the same."""
    cells: int = 3000
    """Labelled cells on which spaces are drawn and measured."""
    shifts: tuple[str, ...] = ()
    """Model matching: NAME=BEFORE -> AFTER with two expressions over `obs` that choose cells of one species; NAME#TAG says that
    shifts of that tag are expected to be alike. `=>` compares the sets as they are, not within types (one type against another);
    `-> half` sets two random halves of the first against each other, a control. Give several as a JSON list."""
    within: tuple[str, ...] = ("cell_type",)
    """Columns within whose values shifts are taken and labels permuted: a change of composition is no shift. Empty = none."""
    by_type: bool = False
    """Also match each shift type by type (types by classify.label)."""
    shift_cells: int = 400
    """Most cells of either condition of a shift, drawn with a key; 0 = all."""
    min_cells: int = 10
    """Fewest cells of either condition of a shift."""
    responses: tuple[str, ...] = ()
    """Two finished perturbations, SPECIES=URI each, whose one-to-one orthologs are set side by side; empty = none."""
    neighbours: int = 20
    """Nearest genes that make a gene's neighbourhood; 0 = gene networks are not compared."""
    num_permutations: int = 1000
    """Permutations behind p-values of matching, draws behind those of responses."""

    def __post_init__(self) -> None:
        for model in self.models:
            _one_of("compare.models", model, HEADS)
        _require(bool(self.models), "compare.models", self.models, "at least one head")
        names = [split_named(text)[0] for text in self.responses]
        _require(not names or (len(names) == 2 == len(set(names) - {""})), "compare.responses", self.responses,
                 "SPECIES=URI of two perturbations of different species")  # fmt: skip
        for name, least in (
            ("cells", 100),
            ("shift_cells", 0),
            ("min_cells", 2),
            ("num_permutations", 19),
            ("neighbours", 0),
        ):
            _require(getattr(self, name) >= least, f"compare.{name}", getattr(self, name), f"at least {least}")
