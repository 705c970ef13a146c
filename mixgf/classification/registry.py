"""All classification models, and the ones that a config asks for.

This is the only module that takes a model's name apart. A name is HEAD (`hvg_logreg`, `probe`) or HEAD@ENCODER (`probe@mlm`), where
ENCODER is `untrained` or a name in `classify.encoders`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mixgf.classification.encoders import CHECKPOINT, UNTRAINED, named_uris
from mixgf.classification.models.baselines import (
    GenesLogisticRegression,
    GenesRanks,
    GenesVote,
    HvgLogisticRegression,
    JointPcaCentroid,
    JointPcaNeighbours,
    Majority,
    PcaLogisticRegression,
    PcaNeighbours,
    Pseudobulk,
    RankPca,
)
from mixgf.classification.models.celltypist import CellTypist, CellTypistVote
from mixgf.classification.models.finetuned import Finetune, FinetuneLinearStart, Lora
from mixgf.classification.models.frozen import Centroid, EncoderPca, Neighbours, Probe
from mixgf.classification.models.genes_centroid import GenesCentroid
from mixgf.classification.models.protocol import EncoderModel, Model, Needs
from mixgf.classification.models.scdeepsort import ScDeepSort
from mixgf.classification.models.scvi import Scvi
from mixgf.classification.splits import Split
from mixgf.config.classification import Classify
from mixgf.errors import UserError

MODELS: dict[str, type[Model]] = {
    kind.head: kind
    for kind in (
        *(Finetune, FinetuneLinearStart, Lora),
        *(EncoderPca, Probe, Neighbours, Centroid),
        *(
            Majority,
            HvgLogisticRegression,
            PcaNeighbours,
            Pseudobulk,
            GenesVote,
            GenesLogisticRegression,
            GenesCentroid,
        ),
        *(GenesRanks, JointPcaNeighbours, JointPcaCentroid, PcaLogisticRegression, RankPca),
        *(CellTypist, CellTypistVote, ScDeepSort, Scvi),
    )
}
"""Class of each head, in the order of reports. A new model is one more class here."""

FROZEN = (Needs.VECTORS, Needs.COUNTS_AND_VECTORS)
"""What models need that read frozen vectors."""
OWN = tuple(head for head, kind in MODELS.items() if issubclass(kind, EncoderModel))
"""Names of models on the run's own encoder, in the order of reports."""
BASELINES = tuple(head for head in MODELS if head not in OWN)
"""Names of models that use no encoder, in the order of reports."""

PREFERRED = ("genes_vote", "genes_logreg", *BASELINES, *OWN)
"""The order in which models are kept that validation cannot tell apart: those first that do well with few cells of a type. It was
found on donors and halves of six data sets other than the bundled ones."""


def find(name: str) -> Model | None:
    """The model of a name; None where there is no such head, or the head takes no encoder."""
    head, at, encoder = name.partition("@")
    kind = MODELS.get(head)
    if kind is None:
        return None
    if issubclass(kind, EncoderModel):
        return kind(encoder) if encoder or not at else None
    return None if at else kind()


def parse(name: str) -> Model:
    """The model of a name that was checked (`require`)."""
    model = find(name)
    assert model is not None, name
    return model


def on_encoder(model: Model, encoder: str) -> Model:
    """The same head on another encoder."""
    assert isinstance(model, EncoderModel), model.name
    return replace(model, encoder=encoder)


def controls(name: str) -> list[str]:
    """Names of the models that show what the run's own encoder adds to a model: the same without an encoder, and on random weights."""
    model = find(name)
    if not isinstance(model, EncoderModel) or model.encoder != CHECKPOINT:
        return []
    without = without_encoder(name)
    return [without] * bool(without) + [on_encoder(model, UNTRAINED).name]


def without_encoder(name: str) -> str:
    """Name of the same model without an encoder; empty where there is none."""
    model = find(name)
    return model.without if isinstance(model, EncoderModel) else ""


def models(settings: Classify) -> tuple[Model, ...]:
    """The models of `classify.models`, in its order."""
    return tuple(parse(name) for name in settings.models)


def require(settings: Classify) -> None:
    """Raise a `UserError` for an unknown model in `classify.models` or `classify.seeds_per_model`."""
    for name in settings.models:
        _require_known(settings, "classify.models", name)
    for name in settings.seeds_per_model:
        _require_known(settings, "classify.seeds_per_model", name)


def _require_known(settings: Classify, where: str, name: str) -> None:
    model, encoders = find(name), (CHECKPOINT, UNTRAINED, *named_uris(settings))
    if model is None:
        msg = f"{where}: {name!r} is not known; there are {', '.join(MODELS)}, and HEAD@ENCODER"
        raise UserError(msg)
    if model.encoder is not None and model.encoder not in encoders:
        msg = f"{where}: {name!r}: no encoder {model.encoder!r}; there are {', '.join(encoders[1:])}; name it with classify.encoders={model.encoder}=URI"
        raise UserError(msg)


def skipped(names: Iterable[str]) -> dict[str, str]:
    """Models among `names` that cannot run here, with the reason: an optional package is not installed."""
    return {name: why for name in names if (why := parse(name).skipped)}


def curve(settings: Classify) -> tuple[Model, ...]:
    """Models of the label-efficiency curve and of the types that are left out of training."""
    if settings.curve_models:
        return tuple(parse(name) for name in settings.curve_models)
    return tuple(model for model in models(settings) if not model.trains_encoder)


def scored(settings: Classify, split: Split) -> tuple[Model, ...]:
    """The models that are scored on a split."""
    number = seeds(settings)
    return tuple(
        model
        for model in (models(settings) if split.whole else curve(settings))
        if split.seed < number[model.name] and (not model.trains_encoder or len(split.validation))
    )


def seeds(settings: Classify) -> dict[str, int]:
    """How many seeds each model has, by its name."""
    fewer = settings.seeds_per_model
    return {name: min(settings.seeds, fewer.get(name, settings.seeds)) for name in settings.models}


def encoders_of(several: Iterable[Model], needs: Iterable[Needs] = (*FROZEN, Needs.ENCODER)) -> list[str]:
    """Names of the encoders that models with one of these needs use, sorted, each once."""
    wanted = tuple(needs)
    return sorted({m.encoder for m in several if m.needs in wanted and m.encoder is not None})


# Names in tables, which may come from other versions or other runs


def is_baseline(name: str) -> bool:
    """Whether a model, by its name in a table, uses no encoder. Unknown models count as baselines."""
    model = find(name)
    return model is None or model.encoder is None


def chosen_on_public(name: str) -> bool:
    """Whether a number of a model, by its name in a table, was chosen with scores of public data sets in sight."""
    model = find(name)
    return model is not None and model.chosen_on_public


def is_own(name: str) -> bool:
    """Whether a model, by its name in a table, uses the run's own encoder."""
    model = find(name)
    return model is not None and model.encoder == CHECKPOINT


def is_untrained(name: str) -> bool:
    """Whether a model, by its name in a table, uses an encoder with random weights."""
    model = find(name)
    return model is not None and (model.encoder or "").endswith(UNTRAINED)


def encoder_of(name: str) -> str:
    """The encoder of a model by its name in a table; empty for the run's own and for baselines."""
    model = find(name)
    return "" if model is None else model.encoder or ""


def label(name: str) -> str:
    """A model's name for readers."""
    model = find(name)
    if model is None:
        return name.replace("_", " ")
    if model.encoder is None:
        return model.label
    return f"{f'{model.encoder} encoder' if model.encoder else 'mixgf'}, {model.label}"
