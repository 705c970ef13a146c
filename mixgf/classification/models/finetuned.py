"""Models that train the encoder (`mixgf.classification.finetune`). They differ in settings only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mixgf.classification import finetune
from mixgf.classification.finetune import Tuned
from mixgf.classification.models.protocol import EncoderModel, Fitted, Needs, Problem, SentenceSet
from mixgf.classification.readings import Classifier, Member, Reading
from mixgf.classification.simple_classifiers import LinearHead
from mixgf.config.classification import Classify
from mixgf.config.fields import names
from mixgf.config.run import Config
from mixgf.config.training import Train
from mixgf.training.worker_group import LocalContext

LORA_RANK = 8
"""Rank of `lora` where `classify.lora_rank` is 0."""
_LINEAR_START: dict[str, Any] = {
    "layer": "all", "gene_weights": True, "warm_start": True, "epochs": 2, "min_steps": 0, "warmup_steps": 20,
    "batch_cells": 16,
}  # fmt: skip
"""Fields of `classify` for a training that begins with a fitted linear layer (`linear_start`).

Two epochs suffice: with more genes than cells, the linear layer leaves no training error and further steps change little. Where
they raise the validation loss, the linear layer predicts.
"""


class Finetune(EncoderModel):
    """Fine-tuning by the settings of `classify`, by default those of the paper (section 4.3)."""

    head, label = "finetune", "fine-tuned"
    needs: ClassVar[Needs] = Needs.ENCODER
    sets: ClassVar[dict[str, Any]] = {}
    """Fields of `classify` that the model sets, whatever the config says."""

    def changes(self, lora_rank: int) -> dict[str, Any]:
        """Fields of `classify` that the model sets, given `classify.lora_rank`."""
        return self.sets

    def recipe(self, config: Config) -> Config:
        """The config that the training works by."""
        return replace(config, classify=replace(config.classify, **self.changes(config.classify.lora_rank)))

    def epochs(self, config: Config) -> int:
        """`classify.epochs`, or as the model sets it."""
        return self.recipe(config).classify.epochs

    def reads(self, run: dict[str, Any]) -> dict[str, Any]:
        """Settings of the training and alignment; with `classify.align` the table of orthologs too."""
        train = {name: run["train"][name] for name in names(Train, role="finetune")}
        tuning = run["classify"] | self.changes(run["classify"]["lora_rank"])
        rest = {name: tuning[name] for name in ("align", *names(Classify, role="finetune"))}
        orthologs = run["vocab"]["orthologs"] if tuning["align"] else []
        return rest | {"embed": run["embed"], "train": train, "orthologs": orthologs}

    def fit(self, problem: Problem[SentenceSet]) -> Fitted[SentenceSet]:
        config = self.recipe(problem.config)
        context = LocalContext(problem.device)
        tuned = finetune.finetune(problem.load_encoder(), problem, config=config, context=context)
        return Fitted(
            predict=lambda cells: tuned.predict(cells.x.cells), notes=tuned.notes(), classifier=classifier_of(tuned),
            encoder=tuned.model.encoder, layer=config.classify.layer,
            max_len=finetune.longest_read(tuned.model.encoder, config.classify),
        )  # fmt: skip


class FinetuneLinearStart(Finetune):
    """Fine-tuning that begins with the linear layer fitted to the untouched encoder and the genes of the sentences."""

    head, label, chosen_on_public = "finetune_linear_start", "fine-tuned from a convex start", True
    without: ClassVar[str] = "genes_ranks"
    sets: ClassVar[dict[str, Any]] = _LINEAR_START | {"lr": 3e-4}


class Lora(Finetune):
    """Low-rank adapters (LoRA, Hu et al. 2022) that begin with the same linear layer."""

    head, label, chosen_on_public = "lora", "LoRA from a convex start", True
    without: ClassVar[str] = "genes_ranks"
    sets: ClassVar[dict[str, Any]] = _LINEAR_START | {"lr": 1e-3}

    def changes(self, lora_rank: int) -> dict[str, Any]:
        """With adapters of rank `classify.lora_rank`, or 8 where that is 0; the encoder's own weights are not trained."""
        return self.sets | {"lora_rank": lora_rank or LORA_RANK, "freeze_layers": 0}


def classifier_of(tuned: Tuned) -> Classifier:
    """The class head on the trained encoder's vectors and, with `gene_weights`, on the genes of the sentence."""
    head_CD, bias_C, genes_CV = tuned.model.linear()
    readings = (Reading(raw="vectors"), Reading(raw="ranks"))[: 2 if genes_CV.shape[1] else 1]
    head = LinearHead(np.hstack([head_CD, genes_CV]), bias_C)
    return Classifier(members=(Member(readings=readings, head=head),))
