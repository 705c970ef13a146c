"""Moved here from mixgf/config.py."""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.config.checks import _one_of, _require

GENE_TABLES = (".tsv", ".csv", ".txt", ".parquet", ".tsv.gz", ".csv.gz", ".txt.gz")
"""Endings by which an entry of perturb.reference_genes is a table, not a gene."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturb:
    """In silico perturbation (paper section 4.2, spec section 9)."""

    start: str = ""
    """Cells that are perturbed, as an expression over `obs`, for example cell_type == 'alpha' and species == 'human'."""
    goal: str = ""
    """Cells that define the goal state; empty = no goal, the shift is 1 - cos(original, perturbed)."""
    alternatives: tuple[str, ...] = ()
    """Expressions of further states whose shifts are reported too, each and on average."""
    unrelated: int = 6
    """With a goal and no `alternatives`: so many states that have nothing to do with the question stand in for them, so that
    an effect that goes everywhere is seen. They are the values of classify.label with the most cells (at least 20) and no
    cell of start or goal, in the start cells' own files where these have two such values. 0 = none."""
    operations: tuple[str, ...] = ("delete", "overexpress")
    """`delete`, `overexpress`, `inhibit`, `activate`."""
    rank_share: float = 0.25
    """How far inhibit and activate move a gene, as a share of the sentence."""
    genes: tuple[str, ...] = ()
    """Ensembl ids or symbols; `+` joins genes that are perturbed together; empty = all detected genes."""
    null_genes: int = -1
    """Genes that others are compared with. Beside named `genes`: scored for that only, matched to them in rank and coverage;
    without some 100 of them a named gene has nothing to be unusual among. After a `screen`: like the chosen genes in rank and
    coverage, drawn among all genes whatever their estimates, as the chosen ones are all extreme. -1 = 100 after a screen, else 0."""
    anchor: str = ""
    """A gene that is perturbed together with each of the others (pairs), and once alone; empty = none."""
    min_coverage: float = 0.05
    """Genes in the sentences of fewer start cells are not tested."""
    max_genes: int = 0
    """0 = all; else only the genes with the highest coverage."""
    max_cells: int = 200
    """Start cells that are perturbed, drawn with a key, balanced over donors; 0 = all. States always use all cells."""
    variant: str = "remaining"
    """Embedding compared: mean over the `remaining` genes (V1, the paper), over `all` positions (V2), or `cls`."""
    layer: int = -1
    """Hidden layer that is compared: -1 = the last, -2 = the one before it."""
    donor: str = "donor"
    """Column of `obs` over whose values effects must repeat."""
    insert_absent: bool = True
    """Overexpress a gene in cells whose sentence lacks it, too; false = only where it is detected (published, cheaper)."""
    response: int = 0
    """Columns of a matrix of what each perturbation does to every other gene's contextual embedding (1 - cos): the genes in
    most of the perturbed cells, say 200 (`responses.parquet`, some ten bytes a pair of genes); 0 = no matrix."""
    block_genes: int = 64
    """Genes per work unit."""
    block_cells: int = 16
    """Cells per work unit."""
    micro_tokens: int = 16_384
    """Most tokens in one forward pass. Changes speed and memory, no result."""
    num_permutations: int = 10_000
    """Sign flips of donors at most; fewer where there are not so many."""
    test: str = "donor"
    """`donor`: effects must repeat over donors; `published`: the published rank-sum test against the pooled shifts, the gene itself included."""
    reference_genes: tuple[str, ...] = ()
    """Genes known to drive the change, to be found again: Ensembl ids, symbols, or tables (.tsv, .csv, .txt, .parquet) with a
    column gene or symbol, and perhaps `hit` (a screen: true or false). Only read: another list needs no new perturbation."""
    published: str = ""
    """Print the paper's Table 4 beside the run: `dkd`, `adpkd` or `alzheimer`; empty = none. Only read, too."""
    screen: int = 0
    """Genes per operation that are scored exactly, after a cheap estimate of all of them; 0 = all genes are. Needs a goal."""
    direction: str = "both"
    """What a screen looks for: genes that move cells `towards` the goal, `away` from it, or `both` (half of `screen` each)."""
    screen_grid: int = 8
    """Ranks per cell at which the estimate is exact. More is better and slower."""
    screen_sample: int = 64
    """Genes drawn at random that are scored exactly as well: on them the estimate is checked."""
    screen_agreement: float = 0.8
    """Least rank correlation of estimated and exact shifts of these genes; below it, all genes are scored exactly."""
    budget_hours: float = 0.0
    """Worker-hours (of compute.cpus_per_worker and gpus_per_worker) to spend, all submissions together; 0 = no bound.
    Genes that are not reached are listed; the same command with more continues."""
    budget_cost: float = 0.0
    """The same as money, at perturb.price; 0 = no bound."""
    price: float = 0.0
    """Of one worker-hour, in your currency; 0 = not known."""
    worker_flops: float = 0.0
    """FLOP/s of a worker, for --dry-run; 0 = a probe of some seconds measures it."""

    def __post_init__(self) -> None:
        for operation in self.operations:
            _one_of("perturb.operations", operation, ("delete", "overexpress", "inhibit", "activate"))
        _one_of("perturb.variant", self.variant, ("remaining", "all", "cls"))
        _one_of("perturb.test", self.test, ("donor", "published"))
        _one_of("perturb.published", self.published, ("", "dkd", "adpkd", "alzheimer"))
        _one_of("perturb.direction", self.direction, ("both", "towards", "away"))
        _require(
            self.null_genes >= -1, "perturb.null_genes", self.null_genes, "at least 0, or -1 = as many as are needed"
        )
        _require(self.response >= 0, "perturb.response", self.response, "at least 0")
        _require(self.unrelated >= 0, "perturb.unrelated", self.unrelated, "at least 0")
        _require(self.layer < 0, "perturb.layer", self.layer, "negative, counted from the last layer")
        for name in ("screen", "budget_hours", "budget_cost", "price", "worker_flops"):
            _require(getattr(self, name) >= 0, f"perturb.{name}", getattr(self, name), "at least 0")
        for name, least in (("screen_grid", 2), ("screen_sample", 10)):
            _require(getattr(self, name) >= least, f"perturb.{name}", getattr(self, name), f"at least {least}")
        if self.screen:
            _require(bool(self.goal.strip()), "perturb.screen", self.screen,
                     "0 without perturb.goal: a response without direction has no cheap estimate")  # fmt: skip
            _require(
                not self.anchor, "perturb.screen", self.screen, "0 with perturb.anchor: pairs have no cheap estimate"
            )
            for operation in self.operations:
                _require(operation in {"delete", "overexpress"}, "perturb.screen", self.screen,
                         f"0 with {operation}: only delete and overexpress have a cheap estimate")  # fmt: skip
        if self.budget_cost:
            _require(
                self.price > 0,
                "perturb.budget_cost",
                self.budget_cost,
                "0 without perturb.price, the price of a worker-hour",
            )
