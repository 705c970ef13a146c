"""Config, the root; compute, inputs, tracking."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixgf.config.checks import _one_of, _require
from mixgf.config.classification import Classify
from mixgf.config.comparison import Compare
from mixgf.config.data import HUMAN, MOUSE, QC, Imports, Prepare, Source, SpeciesRow, Tokens, Vocab
from mixgf.config.perturbation import Perturb
from mixgf.config.training import Embed, Model, Objective, Train
from mixgf.config.tuning import Tune


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Workers of the distributed stages. Where they run is Ray's business (RAY_ADDRESS)."""

    num_workers: int = 2
    """Workers of a training; elsewhere, tasks or actors at a time."""
    min_workers: int = 0
    """Training goes on with as few workers as this when a node is lost; 0 = num_workers (not elastic)."""
    resize_seconds: float = 60.0
    """With `min_workers`: how often to look whether more workers can train now. A change of size starts the group again
    from its latest checkpoint."""
    cpus_per_worker: float = 1.0
    """CPUs that a worker asks Ray for."""
    gpus_per_worker: float = 0.0
    """GPUs that a worker asks Ray for; below 1 = a share of one; 0 = the CPU computes. Where none is found, the run stops."""
    max_failures: int = 3
    """Times that a lost training worker group is started again."""

    def __post_init__(self) -> None:
        _require(self.num_workers >= 1, "compute.num_workers", self.num_workers, "at least 1")
        _require(
            0 <= self.min_workers <= self.num_workers,
            "compute.min_workers",
            self.min_workers,
            "between 0 and num_workers",
        )
        _require(self.resize_seconds >= 1, "compute.resize_seconds", self.resize_seconds, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Artifacts made by other runs; empty = the artifact of that stage under `output`."""

    corpus: str = ""
    """Of prepare or import."""
    checkpoint: str = ""
    """Of pretrain or import-weights."""
    embeddings: str = ""
    """Of embed."""
    classification: str = ""
    """Of classify."""
    perturbation: str = ""
    """Of perturb."""
    start: str = ""
    """A checkpoint on the corpus' vocabulary whose weights `pretrain` starts from (schedule and moments begin anew); empty =
    random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """MLflow."""

    uri: str = ""
    """Tracking server or database; empty = MLFLOW_TRACKING_URI, else SQLite under `output` (or under . for s3://)."""
    experiment: str = "mixgf"
    """Name of the experiment in MLflow."""
    prices: str = ""
    """URI of a JSON object, node type to price per node-hour, for the cost ledger; empty = MIXGF_PRICES, else no prices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run of mixgf, whole."""

    recipe: str = "default"
    output: str = "runs/default"
    """URI of the folder that receives every artifact of the run, local or s3://."""
    seed: int = 0
    species: tuple[SpeciesRow, ...] = (HUMAN, MOUSE)
    sources: tuple[Source, ...] = ()
    qc: QC = field(default_factory=QC)
    vocab: Vocab = field(default_factory=Vocab)
    tokens: Tokens = field(default_factory=Tokens)
    prepare: Prepare = field(default_factory=Prepare)
    imports: Imports = field(default_factory=Imports)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    train: Train = field(default_factory=Train)
    embed: Embed = field(default_factory=Embed)
    classify: Classify = field(default_factory=Classify)
    perturb: Perturb = field(default_factory=Perturb)
    compare: Compare = field(default_factory=Compare)
    tune: Tune = field(default_factory=Tune)
    compute: Compute = field(default_factory=Compute)
    inputs: Inputs = field(default_factory=Inputs)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        names = tuple(row.name for row in self.species)
        _require(len(set(names)) == len(names), "species", names, "rows with different names")
        for i, source in enumerate(self.sources):
            _one_of(f"sources[{i}].species", source.species, names)
        _require(self.output.strip() != "", "output", self.output, "a folder or an s3:// URI")
        for path, pooling in (
            ("objective.pooling", self.objective.pooling),
            ("embed.pooling", self.embed.pooling),
            ("perturb.variant", self.perturb.variant),
        ):
            _require(pooling != "cls" or self.tokens.cls, path, pooling, "used with tokens.cls = true")
