"""`finetune`: an encoder fine-tuned to one classifier of labelled cells, by a worker group or in this process.

A killed training goes on from its latest checkpoint, with the same bits at the same number of workers. The artifact is a classifier
as `mixgf classify` keeps them.
"""

from __future__ import annotations

from functools import partial

from mixgf.classification import encoders, finetune, finetune_group, kept_classifier, labels, splits
from mixgf.classification.models.finetuned import Finetune
from mixgf.classification.paths import ArtifactPaths
from mixgf.classification.workspace import Workspace
from mixgf.config.fields import content_of
from mixgf.config.parse import to_dict
from mixgf.config.run import Config
from mixgf.console import say
from mixgf.corpus.reader import Corpus
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.metrics import watch
from mixgf.encoder.device import pick_device
from mixgf.execution import Executor
from mixgf.stages.pretrain import ProcessContext
from mixgf.storage import artifacts, files, layout
from mixgf.storage.artifacts import Record
from mixgf.tracking import mlflow_runs, model_card, packaged_model


def run(config: Config, *, executor: Executor | None = None) -> str:
    """Fine-tune the encoder on the labelled cells of a corpus; returns the URI of the classifier.

    `executor` says where: in this process if it is local, else in a worker group of Ray; None = Ray.
    """
    executor = executor or RayExecutor(config)
    uri = files.join(config.output, "finetune")
    paths, record = _plan(config, uri)
    table = splits.capped(labels.labelled(Corpus(paths.corpus), config.classify), config.classify, seed=config.seed)
    table, split = finetune_group.one_split(table, config)
    if not artifacts.begin(uri, record):
        say(f"finetune: {uri} is already there")
        return uri
    workspace = Workspace(config=config, paths=paths, table=table)
    learning = len(split.train) - len(split.validation)
    num_steps = finetune.count_steps(config.classify, learning)
    say(
        f"finetune: {len(split.classes)} types, {learning:,} training cells, {len(split.validation):,} for the choice of the epoch, "
        f"{len(split.test):,} test cells, {num_steps:,} steps, {config.compute.num_workers} workers"
    )
    job = partial(finetune_group.train_classifier, workspace, split, uri, record.fingerprint)
    with (
        executor.session(),
        mlflow_runs.stage(config, "finetune", record.config, record.fingerprint) as tracked,
        watch(config, "finetune", tracked, uri) as watched,
    ):
        tracked.corpus(paths.corpus, "training")
        if executor.local:
            context = ProcessContext(pick_device(config.compute.gpus_per_worker), "finetune", num_steps, tracked)
            try:
                job(context)
            finally:
                context.close()
        else:
            from mixgf.distributed import train_group

            train_group.run_group(job, config, stage="finetune", num_steps=num_steps, tracked=tracked)
        watched.made(cells=len(table))
        about = kept_classifier.finish(uri, record)
        tracked.summary({f"test/{name}": float(value) for name, value in about["test"].items()})
        packed = packaged_model.classifier(
            uri, model_card.classifier(kept_classifier.facts(uri)), {"test/accuracy": about["test"]["accuracy"]}
        )  # fmt: skip
        name = f"{config.tracking.register}-finetuned" if config.tracking.register else ""
        tracked.model("classifier", packed, register=name)
    layout.remove_own(uri, kept_classifier.KIND, scratch=True)
    test = about["test"]
    say(
        f"finetune: accuracy {test['accuracy']:.3f} and macro F1 {test['macro_f1']:.3f} on test cells; classifier in {uri}"
    )
    return uri


def _plan(config: Config, uri: str) -> tuple[ArtifactPaths, Record]:
    """Inputs of the stage and the record of its artifact."""
    corpus_uri = config.inputs.corpus or files.join(config.output, "corpus")
    checkpoint_uri = config.inputs.checkpoint or files.join(config.output, "pretrain")
    corpus = artifacts.require(corpus_uri, "corpus")
    trained = encoders.records(checkpoint_uri, config, Corpus(corpus_uri), [])[encoders.CHECKPOINT]
    content = {
        "cells": content_of(config.classify, role="cells"),
        "split": finetune_group.kind_of(config.classify),
        "seed": config.seed,
        "finetune": Finetune().reads(to_dict(config)),
    }
    parents = {"corpus": corpus.fingerprint, "checkpoint": trained.fingerprint}
    paths = ArtifactPaths(corpus=corpus_uri, checkpoint=checkpoint_uri, output=uri)
    return paths, artifacts.plan(kept_classifier.KIND, kept_classifier.SCHEMA, content, parents)
