"""Settings of `mixgf compare`: embeddings, label transfer and responses across species."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mixgf.config.checks import require
from mixgf.config.classification import HEADS
from mixgf.config.expressions import MAX_LENGTH, check_expression
from mixgf.config.fields import check, option, required


@dataclass(frozen=True, kw_only=True, slots=True)
class ShiftSpec:
    """Two sets of cells of one species; the shift is from the mean vector of the first to that of the second."""

    name: str = required()
    """Name in tables and figures, unique."""
    before: str = required(longest=MAX_LENGTH, lines=True)
    """Expression over `obs` that chooses the first set."""
    after: str | None = required(longest=MAX_LENGTH, lines=True)
    """Expression that chooses the second set. null: two random halves of `before` are compared, as a control."""
    tag: str = option("")
    """Shifts of the same tag are expected to be alike. Empty: no expectation."""
    within: bool = option(True)
    """Take the shift within the values of `compare.within`. False: compare the sets as they are, such as two cell types."""

    def __post_init__(self) -> None:
        check(self, "compare.shifts[]")
        for field in ("name", "before", "after"):
            value = getattr(self, field)
            require(value is None or value.strip() != "", f"compare.shifts[].{field}", value, "given")
        check_expression(self.before, f"compare.shifts: {self.name}: before")
        check_expression(self.after or "", f"compare.shifts: {self.name}: after")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compare:
    """Comparison across species: embedding, transfer of labels, model matching (paper section 3.4)."""

    encoders: Mapping[str, str] = option({}, path=True)
    """Further encoders: name to URI of a checkpoint."""
    corpora: Mapping[str, str] = option({}, path=True, omit_default=True)
    """Name of an encoder to URI of a corpus, for encoders with another vocabulary (vocab.sharing = ortholog): a corpus of the
    same cells with that vocabulary. The other encoders read the run's corpus."""
    models: tuple[str, ...] = option(("knn", "probe"), choices=HEADS)
    """Heads that carry labels to the other species, on the run's encoder, on an untrained one and on each of `encoders`."""
    controls: tuple[str, ...] = option(("majority", "hvg_logreg", "pca_knn", "pseudobulk", "rank_pca"))
    """Baselines on one-to-one orthologs that do the same."""
    cells: int = option(3000, least=100)
    """Labelled cells on which embeddings are drawn and scored."""
    shifts: tuple[ShiftSpec, ...] = option(())
    """Model matching: shifts to compare across species, as a JSON list of objects. name, before, after: two expressions over
    `obs` that choose cells of one species. Optional: tag (shifts of one tag are expected to be alike) and within (false: the
    sets are compared as they are, not within types). after = null compares two random halves of `before`, as a control."""
    within: tuple[str, ...] = option(("cell_type",))
    """Columns of `obs`. Shifts are taken, and labels permuted, within their values, so that a change of composition is not
    taken for a shift. Empty: none."""
    by_type: bool = option(False)
    """Also match each shift type by type (types of classify.label)."""
    shift_cells: int = option(400, least=0)
    """Most cells of either condition of a shift, drawn at random. 0: all cells."""
    min_cells: int = option(10, least=2)
    """Fewest cells of either condition of a shift."""
    responses: Mapping[str, str] = option({}, path=True)
    """Species to URI of a finished perturbation, for two species whose one-to-one orthologs are compared. Empty: none."""
    neighbours: int = option(20, least=0)
    """Nearest genes that form a gene's neighbourhood. 0: gene networks are not compared."""
    num_permutations: int = option(1000, least=19)
    """Permutations behind the p-values of model matching, and random draws behind those of responses."""

    def __post_init__(self) -> None:
        check(self, "compare")
        require(bool(self.models), "compare.models", self.models, "at least one head")
        require(
            len(self.responses) in (0, 2),
            "compare.responses",
            self.responses,
            "perturbations of two species, SPECIES=URI each",
        )
        for name in self.corpora:
            require(name in self.encoders, "compare.corpora", name, "the name of one of compare.encoders")
        shifts = [shift.name for shift in self.shifts]
        require(len(set(shifts)) == len(shifts), "compare.shifts", shifts, "shifts with different names")
