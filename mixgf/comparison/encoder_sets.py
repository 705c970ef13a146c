"""Encoders that a comparison uses, with their corpora and classifications."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from mixgf.arrays import Ints, Names
from mixgf.classification import encoders, registry
from mixgf.classification.encoders import CHECKPOINT, EXPRESSION, UNTRAINED, named_uris
from mixgf.classification.labels import UNKNOWN, Labelled, names_of
from mixgf.classification.models.protocol import Needs
from mixgf.classification.paths import ArtifactPaths
from mixgf.classification.workspace import Workspace
from mixgf.comparison.shift_matching import Shift
from mixgf.comparison.shift_selection import select_shifts
from mixgf.config.parse import to_dict
from mixgf.config.run import Config, Inputs
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.storage import artifacts, files


@dataclass(frozen=True, kw_only=True)
class EncoderSet:
    """The encoders of one corpus, and the classification in which they are compared."""

    name: str
    """Name of its encoder; empty for the run's own corpus and checkpoint."""
    config: Config
    """Config of its classification; `inputs` has the corpus and the checkpoint."""
    classification: str
    """URI of its classification."""
    paths: ArtifactPaths
    """Paths of its corpus, checkpoint and intermediate results."""

    @property
    def encoders(self) -> list[str]:
        """Names of the encoders whose vectors are compared, for `encoders.load`."""
        return registry.encoders_of(registry.models(self.config.classify), [Needs.VECTORS])

    @property
    def trained(self) -> dict[str, ArtifactPaths]:
        """Trained encoders: name in the tables to paths."""
        uris = {CHECKPOINT: self.paths.checkpoint} | named_uris(self.config.classify)
        return {self.space_name(name): replace(self.paths, checkpoint=uri) for name, uri in uris.items()}

    @cached_property
    def shifts(self) -> list[Shift]:
        """The shifts of `compare.shifts` among the cells of its corpus.

        Raises:
            UserError: A shift cannot be used (`select_shifts`).
        """
        return select_shifts(self.config, Corpus(self.paths.corpus).obs())

    def space_name(self, encoder: str) -> str:
        """Name of an encoder or space in the tables."""
        if not self.name or encoder in (self.name, EXPRESSION):
            return encoders.space_name(encoder)
        return f"{self.name}_{encoder}" if encoder and encoder != encoders.space_name(CHECKPOINT) else self.name

    def model_name(self, name: str) -> str:
        """Name of a model in the tables."""
        model = registry.parse(name)
        if model.encoder is None or not self.name:
            return name
        return registry.on_encoder(model, self.space_name(model.encoder)).name

    def workspace(self, cells: Ints) -> Workspace:
        """Some cells of the corpus, with the intermediate files of the comparison."""
        few = Corpus(self.paths.corpus).obs().iloc[cells]
        none = np.full(len(few), UNKNOWN)
        table = Labelled(
            cells=cells, names=few["cell"].to_numpy().astype(np.str_), labels=none, species=few["species"].to_numpy().astype(np.str_),
            groups=none, donors=none, datasets=none, transfer=none, sources=few["source"].to_numpy().astype(np.str_),
        )  # fmt: skip
        return Workspace(config=self.config, paths=self.paths, table=table)


@dataclass(frozen=True, kw_only=True)
class ComparisonContext:
    """What every part of a comparison gets."""

    config: Config
    uri: str
    """URI of the comparison."""
    encoder_sets: tuple[EncoderSet, ...]
    """The run's own set is first."""


def encoder_sets(config: Config, uri: str) -> tuple[EncoderSet, ...]:
    """The run's corpus with all encoders of its vocabulary, then one set for each encoder with a corpus of its own.

    Raises:
        UserError: A name or a checkpoint of `compare.encoders` cannot be used.
    """
    given, settings = config.inputs, config.compare
    own = Inputs(
        corpus=given.corpus or files.join(config.output, "corpus"), embeddings=given.embeddings,
        checkpoint=given.checkpoint or files.join(config.output, "pretrain"),
    )  # fmt: skip
    named_uris(replace(config.classify, encoders=settings.encoders))  # the same rules for names
    for name, weights in settings.encoders.items():
        if "@" in weights and not files.exists(weights):  # NAME=CHECKPOINT@CORPUS of earlier versions
            uri_, _, corpus = weights.partition("@")
            msg = f"compare.encoders: {name}={weights}: no such checkpoint; its corpus is named by compare.corpora: {name}={uri_} and compare.corpora={name}={corpus}"
            raise UserError(msg)
    same = {name: weights for name, weights in settings.encoders.items() if name not in settings.corpora}
    others = {
        name: Inputs(corpus=corpus, checkpoint=settings.encoders[name]) for name, corpus in settings.corpora.items()
    }
    found = [_encoder_set(config, uri, "", own, same)]
    if config.inputs.classification:
        found = [replace(found[0], classification=config.inputs.classification)]
    elif _is_sufficient(there := files.join(config.output, "classify"), found[0]):
        found = [replace(found[0], classification=there)]
    return (
        *found,
        *(_encoder_set(config, files.join(uri, "encoders", name), name, inputs, {}) for name, inputs in others.items()),
    )


def _encoder_set(config: Config, folder: str, name: str, inputs: Inputs, others: Mapping[str, str]) -> EncoderSet:
    """A set whose classification, with splits between species only, is made in `folder`."""
    names = named_uris(replace(config.classify, encoders=others))
    heads = [
        registry.on_encoder(registry.parse(head), encoder).name
        for encoder in (CHECKPOINT, UNTRAINED, *names)
        for head in config.compare.models
    ]
    controls = () if name else config.compare.controls
    wanted = replace(
        config.classify, splits=("species",), models=(*heads, *controls), encoders=others, label_shares=(), unseen_types=0,
        curve_models=(), integration_cells=config.compare.cells, keep=False,
    )  # fmt: skip
    paths = ArtifactPaths(corpus=inputs.corpus, checkpoint=inputs.checkpoint, output=folder)
    run = replace(config, output=folder, inputs=inputs, classify=wanted)
    return EncoderSet(name=name, config=run, classification=files.join(folder, "classify"), paths=paths)


def _is_sufficient(uri: str, encoder_set: EncoderSet) -> bool:
    """Whether a finished classification at `uri` has the models and encoders of the set, on the same cells."""
    there, run = artifacts.find(uri), encoder_set.config
    if there is None or "species" not in there.config["asked"]["splits"]:
        return False
    wanted = to_dict(run.classify)
    if any(wanted[name] != value for name, value in ({"merge": {}} | there.config["cells"]).items()):
        return False
    used = registry.encoders_of(registry.models(run.classify))
    found = encoders.records(run.inputs.checkpoint, run, Corpus(run.inputs.corpus), used)
    mine = {f"encoder {name}" if name else "checkpoint": one.fingerprint for name, one in found.items()}
    return {*run.classify.models, "integration"} <= set(
        there.config["models"]
    ) and mine.items() <= there.parents.items()


def read_classification(encoder_set: EncoderSet, name: str) -> pd.DataFrame:
    """A table of the set's classification."""
    return artifacts.read_artifact_table(encoder_set.classification, name).to_pandas()


def donors_of(encoder_set: EncoderSet, obs: pd.DataFrame) -> Names:
    """Donor of every row of `obs`, (N,); `labels.UNKNOWN` where it is not given."""
    settings = encoder_set.config.classify
    if settings.donor not in obs:
        return np.full(len(obs), UNKNOWN)
    return names_of(obs[settings.donor].tolist(), unknown=settings.unlabelled)
