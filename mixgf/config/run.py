"""The config of a whole run: all sections, workers, inputs and tracking."""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.config.checks import require
from mixgf.config.classification import Classify
from mixgf.config.comparison import Compare
from mixgf.config.data import HUMAN, MOUSE, QC, Imports, Prepare, Source, SpeciesRow, Tokens, Vocab
from mixgf.config.fields import check, option, section
from mixgf.config.perturbation import Perturb
from mixgf.config.training import Embed, Model, Objective, Train
from mixgf.config.tuning import Tune


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Workers of the stages. RAY_ADDRESS decides on which cluster they run."""

    num_workers: int = option(2, least=1)
    """Workers of a training; in other stages, tasks or actors at a time."""
    min_workers: int = option(0, least=0)
    """Training continues with as few workers as this when a node is lost. 0: always num_workers."""
    resize_seconds: float = option(60.0, least=1, unit="s")
    """With `min_workers`: time between two checks for room for more workers. On a change of size the group restarts from its
    latest checkpoint."""
    cpus_per_worker: float = option(1.0, above=0)
    """CPUs that a worker reserves in Ray."""
    gpus_per_worker: float = option(0.0, least=0)
    """GPUs that a worker reserves in Ray; below 1, a share of one. 0: the CPU computes. A run stops if a GPU is missing."""
    max_failures: int = option(3, least=0)
    """Times that a lost group of training workers is restarted."""

    def __post_init__(self) -> None:
        check(self, "compute")
        require(
            self.min_workers <= self.num_workers,
            "compute.min_workers",
            self.min_workers,
            f"at most compute.num_workers ({self.num_workers})",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Artifacts of other runs to read. Empty: the artifact of that stage under `output`."""

    corpus: str = option("", path=True)
    """Corpus, made by prepare or import."""
    checkpoint: str = option("", path=True)
    """Checkpoint, made by pretrain or import-weights."""
    embeddings: str = option("", path=True)
    """Embeddings, made by embed."""
    classification: str = option("", path=True)
    """Classification, made by classify."""
    perturbation: str = option("", path=True)
    """Perturbation, made by perturb."""
    start: str = option("", path=True)
    """Checkpoint with the corpus' vocabulary whose weights `pretrain` starts from, with a new schedule and optimizer state.
    Empty: weights by `model.start`."""
    gene_vectors: str = option("", path=True)
    """Table of gene vectors for `model.start=table`: Parquet or CSV with a column `gene` of Ensembl ids, and numbers in the other
    columns, or a column `vector` of lists. `gene_vectors/vectors.parquet` of another run is one."""
    neighbours: str = option("", path=True)
    """Neighbours of the corpus' cells, made by `pretrain` with objective.view=neighbour. Empty: made under `output`."""

    def __post_init__(self) -> None:
        check(self, "inputs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """Experiment tracking in MLflow."""

    uri: str = option("")
    """Tracking server or database. Empty: MLFLOW_TRACKING_URI, else SQLite under `output` (for s3://, under ./mlflow). `off`: none."""
    experiment: str = option("mixgf")
    """Name of the experiment in MLflow."""
    register: str = option("")
    """Name in MLflow's model registry: the encoder of `pretrain` is registered under it, and each classifier that `classify`
    keeps as NAME-GROUP. Empty: models are logged, but not registered."""
    prices: str = option("")
    """URI of a JSON object, node type to price per node-hour, for the costs of a run. Empty: MIXGF_PRICES, else no prices."""

    def __post_init__(self) -> None:
        check(self, "tracking")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The config of one run. Sections of the role `corpus` decide the sentences of a corpus."""

    recipe: str = option("default", swept=False)
    """Name of the recipe that it began as."""
    output: str = option("runs/default", swept=False, path=True)
    """URI of the folder that receives every artifact of the run, local or s3://."""
    seed: int = option(0, swept=False, least=0)
    """Seed of every random draw."""
    species: tuple[SpeciesRow, ...] = option((HUMAN, MOUSE), role="corpus", swept=False)
    sources: tuple[Source, ...] = option((), role="corpus", swept=False)
    qc: QC = section(QC, role="corpus", stages=("prepare",))
    vocab: Vocab = section(Vocab, role="corpus", stages=("prepare", "import"))
    tokens: Tokens = section(Tokens, role="corpus", stages=("prepare", "import"))
    prepare: Prepare = section(Prepare, role="corpus", stages=("prepare", "import"))
    imports: Imports = section(Imports, stages=("import", "import-weights"))
    model: Model = section(Model, stages=("pretrain",))
    objective: Objective = section(Objective, stages=("pretrain",))
    train: Train = section(Train, stages=("pretrain",))
    embed: Embed = section(Embed, stages=("embed", "finetune"))
    classify: Classify = section(Classify, stages=("classify", "finetune"))
    perturb: Perturb = section(Perturb, swept=False, stages=("perturb",))
    compare: Compare = section(Compare, stages=("compare",))
    tune: Tune = section(Tune, swept=False, stages=("tune",))
    compute: Compute = section(Compute, swept=False)
    inputs: Inputs = section(
        Inputs,
        swept=False,
        stages=("pretrain", "import-weights", "embed", "classify", "finetune", "compare", "tune", "perturb", "report"),
    )
    tracking: Tracking = section(Tracking, swept=False)

    def __post_init__(self) -> None:
        check(self, "")
        names = tuple(row.name for row in self.species)
        require(len(set(names)) == len(names), "species", names, "rows with different names")
        for i, source in enumerate(self.sources):
            require(
                source.species in names,
                f"sources[{i}].species",
                source.species,
                "one of " + ", ".join(map(repr, names)),
            )
        require(self.output.strip() != "", "output", self.output, "a folder or an s3:// URI")
        for path, pooling in (
            ("objective.pooling", self.objective.pooling),
            ("embed.pooling", self.embed.pooling),
            ("perturb.variant", self.perturb.variant),
        ):
            require(pooling != "cls" or self.tokens.cls, path, pooling, "used with tokens.cls = true")
