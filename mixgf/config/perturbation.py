"""Settings of `mixgf perturb`: the question, the genes, the test, the screen and its budget."""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.config.checks import require
from mixgf.config.expressions import MAX_LENGTH, check_expression
from mixgf.config.fields import check, option
from mixgf.config.training import LAYERS

GENE_TABLES = (".tsv", ".csv", ".txt", ".parquet", ".tsv.gz", ".csv.gz", ".txt.gz")
"""Endings by which an entry of perturb.reference_genes is a table, not a gene."""
SCREENED = ("delete", "overexpress")
"""Operations that a screen can estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturb:
    """In silico perturbation (paper sections 4.2 and 4.5)."""

    start: str = option("", longest=MAX_LENGTH, lines=True)
    """Cells that are perturbed, as an expression over `obs`, for example cell_type == 'alpha' and species == 'human'."""
    goal: str = option("", longest=MAX_LENGTH, lines=True)
    """Cells that define the goal state. Empty: no goal; the shift is then 1 - cos(original, perturbed)."""
    alternatives: tuple[str, ...] = option((), longest=MAX_LENGTH, lines=True)
    """Expressions of further states. Shifts towards each of them, and towards their average, are reported too."""
    unrelated: int = option(6, least=0)
    """States that are added as controls where there is a goal and no `alternatives`: they show effects that go everywhere.
    They are values of classify.label with at least 20 cells and without start or goal cells, those with the most cells first.
    Where the start cells' own files hold two such values, they come from these files. 0: none."""
    operations: tuple[str, ...] = option(
        ("delete", "overexpress"), choices=("delete", "overexpress", "inhibit", "activate")
    )
    """What is done to a gene: `delete`, `overexpress`, `inhibit`, `activate`."""
    rank_share: float = option(0.25, above=0, most=1)
    """How far inhibit and activate move a gene, as a share of the sentence."""
    genes: tuple[str, ...] = option(())
    """Ensembl ids or symbols; `+` joins genes that are perturbed together. Empty: all detected genes."""
    null_genes: int | None = option(None, least=0, word="null")
    """Comparison genes, matched to the tested genes in rank and coverage: without some 100 of them, named `genes` and the genes
    of a `screen` cannot be told from usual ones. null: 100 after a screen, else 0."""
    anchor: str = option("")
    """A gene that is perturbed together with each of the others (pairs), and once alone. Empty: none."""
    min_coverage: float = option(0.05, least=0, most=1)
    """Genes in the sentences of a smaller share of the start cells are not tested."""
    max_genes: int = option(0, least=0)
    """Test only this many genes, those with the highest coverage. 0: all."""
    max_cells: int = option(200, least=0)
    """Start cells that are perturbed, drawn at random and balanced over donors. 0: all. A screen takes as many others, or,
    where there are too few, half of them. States always use all their cells."""
    variant: str = option("remaining", choices=("remaining", "all", "cls"))
    """Embedding that is compared: mean over the `remaining` genes (V1, the paper), over `all` positions (V2), or `cls`."""
    layer: int = option(-1, below=0, named=LAYERS)
    """Hidden layer that is compared: -1 the last, -2 or `second_last` the one before it."""
    donor: str = option("donor")
    """Column of `obs` with the donors over which an effect must repeat."""
    insert_absent: bool = option(True)
    """Overexpress a gene also in cells whose sentence lacks it. False: only where it is detected (published; cheaper)."""
    response: int = option(0, least=0)
    """Columns of the response matrix (`responses.parquet`): what each perturbation does to the contextual embeddings of this
    many other genes, those in most of the perturbed cells (1 - cos). About ten bytes a pair of genes. 0: no matrix."""
    controls: bool = option(True)
    """Negative controls beside the hits: the same genes by an untrained twin of the encoder, which takes as long as the run
    itself, and towards false goals, which take no time. The error rate of hits is taken from the false goals."""
    block_genes: int = option(64, least=1)
    """Genes per work unit."""
    block_cells: int = option(16, least=1)
    """Cells per work unit."""
    micro_tokens: int = option(16_384, result=False, least=1, unit="tokens")
    """Most tokens in one forward pass. Changes speed and memory only."""
    num_permutations: int = option(10_000, least=1)
    """Most sign flips of donors in a test. Fewer donors allow fewer."""
    test: str = option("donor", choices=("donor", "published"))
    """`donor`: an effect must repeat over donors. `published`: the published rank-sum test against the pooled shifts of all
    genes, the tested gene included."""
    reference_genes: tuple[str, ...] = option((), result=False, path_endings=GENE_TABLES)
    """Genes known to drive the change, to see whether they are found: Ensembl ids, symbols, or tables (.tsv, .csv, .txt,
    .parquet) with a column gene or symbol, and optionally `hit` (true or false). Another list needs no new perturbation."""
    published: str = option("", result=False, choices=("", "dkd", "adpkd", "alzheimer"))
    """Print the paper's Table 4 beside the run: `dkd`, `adpkd` or `alzheimer`. Empty: none."""
    screen: int = option(0, least=0)
    """Genes per operation that are scored exactly, chosen by a cheap estimate of all genes. Needs a goal. 0: no screen, all
    genes are scored exactly."""
    direction: str = option("both", choices=("both", "towards", "away"))
    """What a screen selects: genes that move cells `towards` the goal, `away` from it, or `both` (half of `screen` each)."""
    screen_grid: int = option(2, least=2)
    """Ranks per cell at which the moves of ranks are computed exactly. Each beyond the first takes one pass of the encoder."""
    screen_sample: int = option(64, least=10)
    """Genes drawn at random that are scored exactly as well, to check the estimate."""
    screen_agreement: float = option(0.8, least=-1, most=1)
    """Least rank correlation of estimated and exact shifts of these genes. Below it, all genes are scored exactly."""
    budget_hours: float = option(0.0, result=False, least=0, unit="h")
    """Worker-hours to spend over all runs together (a worker has compute.cpus_per_worker and gpus_per_worker). Genes that are
    not reached are listed; the same command with a larger budget continues. 0: no limit."""
    budget_cost: float = option(0.0, result=False, least=0)
    """The same limit as money, at perturb.price. 0: no limit."""
    price: float = option(0.0, result=False, least=0, unit="per worker-hour")
    """Price of one worker-hour, in your currency. 0: not known."""
    worker_flops: float = option(0.0, result=False, least=0, most=1e21, unit="FLOP/s")
    """Speed of a worker, for the estimate of --dry-run. 0: it is measured, in a few seconds."""

    @property
    def num_nulls(self) -> int:
        """Comparison genes that are drawn: `null_genes`, or its default."""
        return self.null_genes if self.null_genes is not None else 100 if self.screen else 0

    def __post_init__(self) -> None:
        check(self, "perturb")
        for field in ("start", "goal"):
            check_expression(getattr(self, field), f"perturb.{field}")
        for text in self.alternatives:
            check_expression(text, "perturb.alternatives")
        if self.screen:
            require(
                bool(self.goal.strip()),
                "perturb.screen",
                self.screen,
                "0 without perturb.goal: a shift without direction has no cheap estimate",
            )
            require(
                not self.anchor, "perturb.screen", self.screen, "0 with perturb.anchor: pairs have no cheap estimate"
            )
            for operation in self.operations:
                require(
                    operation in SCREENED,
                    "perturb.screen",
                    self.screen,
                    f"0 with {operation}: only {' and '.join(SCREENED)} have a cheap estimate",
                )
        require(
            not self.budget_cost or self.price > 0,
            "perturb.budget_cost",
            self.budget_cost,
            "0 without perturb.price, the price of a worker-hour",
        )
