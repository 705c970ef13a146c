"""The protocol of a classification model: what it is given, what it returns, and what the stages ask of it.

A model is fitted on the training cells of one split and predicts any cells of the same kind:

    fitted = model.fit(problem)                          # never sees a label of the cells to predict
    probabilities_MC = fitted.predict(problem.target)    # [cells, classes]

To add a model, write one class that extends `CountsModel` or `EncoderModel` in a file of its own, and list it in
`mixgf.classification.registry.MODELS`. `mixgf.classification.models.genes_centroid` is a short example.

Shape letters: N training cells, M cells to predict, G genes, D width of a vector, C classes, V tokens of the vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from scipy import sparse

from mixgf import rng
from mixgf.arrays import Bools, Floats, Ints, Names
from mixgf.classification.labels import Labelled
from mixgf.classification.splits import Split
from mixgf.config.classification import Classify
from mixgf.config.fields import names
from mixgf.config.run import Config
from mixgf.config.training import LayerChoice
from mixgf.corpus.reader import Corpus
from mixgf.encoder.bert import Encoder

if TYPE_CHECKING:
    from mixgf.classification.readings import Classifier

X = TypeVar("X")
"""A model's input: `CountMatrix`, vectors (N, D) or `SentenceSet`."""

CountMatrix: TypeAlias = sparse.csr_matrix
"""Raw counts (N, G). Between species G are one-to-one orthologs."""

FEWEST_SECONDS = 0.1
"""Seconds of one core for any prediction, roughly."""


class Needs(Enum):
    """What a model reads of a cell."""

    COUNTS = "raw counts"
    """`CountMatrix` (N, G)."""
    SENTENCES = "sentences"
    """`SentenceSet`; no encoder reads them."""
    VECTORS = "frozen vectors of an encoder"
    """float32 (N, D)."""
    COUNTS_AND_VECTORS = "raw counts, and frozen vectors of an encoder"
    """`Measured`."""
    ENCODER = "an encoder and sentences"
    """`SentenceSet`; the model trains the encoder itself (`Problem.load_encoder`)."""


@dataclass(frozen=True, eq=False)
class SentenceSet:
    """Tokenised cells of a corpus."""

    corpus: Corpus
    cells: Ints
    """Their numbers in the corpus (N,)."""

    def __getitem__(self, rows: Any) -> SentenceSet:
        return SentenceSet(self.corpus, self.cells[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Several kinds of input of the same cells; None = not there."""

    counts: CountMatrix | None = None
    vectors: Floats | None = None
    ranks: CountMatrix | None = None
    """Genes of the sentences weighted by rank (N, V)."""

    def __getitem__(self, rows: Any) -> Measured:
        one = {name: getattr(self, name) for name in ("counts", "vectors", "ranks")}
        return Measured(**{name: None if value is None else value[rows] for name, value in one.items()})


def counts_of(x: Any) -> CountMatrix:
    """Raw counts (N, G) of a model's input, alone or beside other kinds."""
    return x.counts if isinstance(x, Measured) else x


@dataclass(frozen=True, eq=False)
class CellSet(Generic[X]):
    """Cells as a model sees them, without labels."""

    x: X
    """One row per cell, of the kind that the model `needs`."""
    species: Names
    """Species of each cell (N,)."""
    datasets: Names | None = None
    """Data set of each cell (N,); None = one for each species."""

    def __getitem__(self, rows: Any) -> CellSet[X]:
        datasets = None if self.datasets is None else self.datasets[rows]
        return CellSet(self.x[rows], self.species[rows], datasets)  # type: ignore[index] # matrices and SentenceSet take rows

    @cached_property
    def studies(self) -> Names:
        """Species and data set of each cell (N,): cells of one study are centred together."""
        if self.datasets is None:
            return self.species
        return np.char.add(np.char.add(self.species, " "), self.datasets)


def _no_encoder() -> Encoder:
    raise AssertionError("this problem has no encoder")


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem(Generic[X]):
    """One split as a model sees it. Labels of the cells to predict are not in it."""

    config: Config
    """`config.classify` has the settings of models."""
    name: str = ""
    """Of the split, for messages."""
    train: CellSet[X]
    """All training cells (N), those for validation included."""
    labels: Ints
    """Class ids of the training cells (N,), each class at least once."""
    num_classes: int
    is_validation: Bools
    """Training cells (N,) on which a model that trains by epochs chooses the epoch. It leaves them out of training."""
    target: CellSet[X]
    """The cells to predict (M). A model may read their species and inputs, as anyone could who has no labels."""
    split_seed: int = 0
    load_encoder: Callable[[], Encoder] = _no_encoder
    """A new copy of the model's encoder, on `device`."""
    by_types: bool = False
    """Expression of a study without training cells is centred by types in every model (`readings.Align.BY_TYPES`); else each model
    decides. It has no effect with `classify.align` = false."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def across(self) -> bool:
        """Whether cells of more than one species meet."""
        return len(np.union1d(self.train.species, self.target.species)) > 1

    @property
    def learning(self) -> CellSet[X]:
        """The training cells without those for validation."""
        return self.train[~self.is_validation]

    @property
    def validation(self) -> CellSet[X]:
        """The training cells for validation."""
        return self.train[self.is_validation]

    def seed(self, *key: int) -> int:
        """A seed below 2^31 that depends on the run, the split and `key` only."""
        return int(rng.hashed(self.config.seed, self.split_seed, *key)) & 0x7FFFFFFF


def problem_of(
    table: Labelled, split: Split, config: Config, train: X, target: X, *,
    load_encoder: Callable[[], Encoder] = _no_encoder, device: torch.device | None = None,
) -> Problem[X]:  # fmt: skip
    """A split as a problem.

    Args:
        table: The labelled cells.
        split: Rows of `table` that train, validate and are predicted.
        config: The whole config.
        train: Input of `split.train`, in its order.
        target: Input of `split.test`, in its order.
        load_encoder: See `Problem`.
        device: Where an encoder is trained; None = the CPU.
    """
    return Problem(
        config=config, name=split.name, train=CellSet(train, table.species[split.train], table.datasets[split.train]),
        labels=split.ids(table.labels[split.train]), num_classes=len(split.classes),
        is_validation=np.isin(split.train, split.validation),
        target=CellSet(target, table.species[split.test], table.datasets[split.test]),
        split_seed=split.seed, load_encoder=load_encoder, device=device or torch.device("cpu"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted(Generic[X]):
    """A trained model."""

    predict: Callable[[CellSet[X]], Floats]
    """Class probabilities [cells, classes]; every row sums to 1."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Plain facts that are stored beside the predictions, such as the epochs of a training."""
    classifier: Classifier | None = None
    """The same as arrays, which `mixgf annotate` can use; None = there is none."""
    encoder: Encoder | None = None
    """The trained encoder whose vectors the classifier reads; None = it reads none, or the vectors it was given."""
    layer: LayerChoice | None = None
    """Hidden layer of `encoder` that is pooled; None = `embed.layer`."""
    max_len: int = 0
    """Longest sentence that is read; 0 = as long as the encoder reads."""
    vectors: Callable[[Ints], Floats] | None = None
    """Vectors by `encoder` of cells of the corpus that are computed already; None = none are."""


class Model(Protocol):
    """A way to predict cell types, by itself or on an encoder."""

    head: ClassVar[str]
    """Name in `classify.models`; `HEAD@ENCODER` puts an encoder model on another encoder."""
    label: ClassVar[str]
    """Name in reports."""
    needs: ClassVar[Needs]
    seconds: ClassVar[float] = FEWEST_SECONDS
    """Seconds per 1,000 training cells on an EPYC core, roughly. Only the projected time and the progress bar use them."""
    package: ClassVar[str] = ""
    """Optional module that it imports; without it the model is left out."""
    can_keep: ClassVar[bool] = True
    """Whether `Fitted.classifier` is there."""
    by_types: ClassVar[bool] = False
    """Whether it centres a study without training cells by types (`study_shift`), as `mixgf annotate` does with a file."""
    chosen_on_public: ClassVar[bool] = False
    """Whether a number that is the same on all data (a penalty, a rate) was chosen with scores of public data sets in sight. The
    user guide lists these numbers. The others are usual values, or those of the method's authors."""

    @property
    def encoder(self) -> str | None:
        """Name of the encoder that it reads or trains; "" = the run's own; None = it uses no encoder."""
        ...

    @abstractmethod
    def fit(self, problem: Problem[Any]) -> Fitted[Any]:
        """Train on one split."""

    @abstractmethod
    def reads(self, run: dict[str, Any]) -> dict[str, Any]:
        """The part of a config, as plain data, that decides what it predicts on a given split.

        Split, corpus and encoder decide too; they are recorded elsewhere.
        """

    def epochs(self, config: Config) -> int:
        """Times that it passes the training cells through the encoder; 0 = its cost is `seconds`."""
        return 0

    @property
    def name(self) -> str:
        """Name in `classify.models` and in tables: HEAD, or HEAD@ENCODER."""
        return f"{self.head}@{self.encoder}" if self.encoder else self.head

    @property
    def reads_counts(self) -> bool:
        """Whether it reads raw counts."""
        return self.needs in {Needs.COUNTS, Needs.COUNTS_AND_VECTORS}

    @property
    def reads_vectors(self) -> bool:
        """Whether it reads frozen vectors of an encoder."""
        return self.needs in {Needs.VECTORS, Needs.COUNTS_AND_VECTORS}

    @property
    def trains_encoder(self) -> bool:
        """Whether it changes the encoder's weights: slow, on a GPU if there is one, and it needs validation cells."""
        return self.needs is Needs.ENCODER

    @property
    def skipped(self) -> str:
        """Why it cannot run here; empty when it can."""
        if not self.package or find_spec(self.package) is not None:
            return ""
        return f"{self.name} is not installed (pip install 'mixgf[baselines]')"


@dataclass(frozen=True)
class CountsModel(Model):
    """A baseline: it reads raw counts and uses no encoder."""

    needs: ClassVar[Needs] = Needs.COUNTS

    @property
    def encoder(self) -> None:
        """None."""
        return

    def reads(self, run: dict[str, Any]) -> dict[str, Any]:
        """Variable genes, neighbours, alignment and the table of orthologs."""
        return counts_settings(run)


def counts_settings(run: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide how raw counts are read."""
    settings = {name: run["classify"][name] for name in names(Classify, role="heads")}
    return settings | {"orthologs": run["vocab"]["orthologs"]}


@dataclass(frozen=True)
class EncoderModel(Model):
    """A model that reads vectors of an encoder, or trains it."""

    without: ClassVar[str] = ""
    """Name of the same model without an encoder; empty = there is none."""
    encoder: str = ""
