"""One classifier, fine-tuned by a group of workers, with its limits, as `mixgf annotate` uses it.

Shapes: N cells of the classification, D width of a vector.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mixgf.arrays import Floats, Ints
from mixgf.classification import finetune, kept_classifier, splits
from mixgf.classification.finetune import Tuned
from mixgf.classification.labels import Labelled
from mixgf.classification.models.finetuned import Finetune, classifier_of
from mixgf.classification.models.protocol import Fitted, SentenceSet, problem_of
from mixgf.classification.splits import Split
from mixgf.classification.workspace import Workspace
from mixgf.config.classification import Classify
from mixgf.config.run import Config
from mixgf.encoder import embed
from mixgf.training.worker_group import Context

GROUP = "all"
"""Name of the group that all labelled cells form."""
KINDS = ("random", "donor")
"""Splits that a single classifier can be trained on."""


def kind_of(settings: Classify) -> str:
    """How cells are divided into training and test cells: the first of `classify.splits` that keeps to one group."""
    return next((kind for kind in settings.splits if kind in KINDS), KINDS[0])


def one_split(table: Labelled, config: Config) -> tuple[Labelled, Split]:
    """All labelled cells as one group, and the split that a classifier of all types is trained and tested on."""
    whole = replace(table, groups=np.full(len(table), GROUP))
    settings = replace(
        config.classify, splits=(kind_of(config.classify),), seeds=1, label_shares=(), unseen_types=0, group=GROUP
    )
    return whole, splits.make(whole, settings, seed=config.seed)[0]


def train_classifier(workspace: Workspace, split: Split, uri: str, identity: str, context: Context) -> None:
    """One worker's part: fine-tune, choose the epoch, score the test cells once; the first worker writes the files.

    Args:
        workspace: Labelled cells of one group, the corpus and the checkpoint.
        split: Which cells train, validate and are tested.
        uri: Folder of the classifier and of the checkpoints of its training.
        identity: Fingerprint of the training.
        context: This worker.
    """
    config, table = workspace.config, workspace.table
    train, tested = (SentenceSet(workspace.corpus, table.cells[rows]) for rows in (split.train, split.test))
    problem = problem_of(table, split, config, train, tested, device=context.device)
    encoder = workspace.load_encoder("", context.device)
    tuned = finetune.finetune(encoder, problem, config=config, context=context, uri=uri, identity=identity)
    cells = np.concatenate([part.x.cells for part in (problem.learning, problem.validation, problem.target)])
    fitted = _fitted(tuned, workspace, cells, context)
    if context.rank == 0:
        fit = kept_classifier.Fit(workspace, split, Finetune(), problem, fitted)
        found = kept_classifier.validate(fit)
        kept = kept_classifier.assemble(fit, found, test={})
        about = {"epoch": tuned.epoch, "history": tuned.history, "num_steps": tuned.num_steps}
        about |= {"test": kept_classifier.test_scores(kept, fit), "why": "the only model", "candidates": []}
        kept_classifier.save(uri, replace(kept, about=kept.about | about), workspace.corpus.vocabulary)
    context.barrier()


def _fitted(tuned: Tuned, workspace: Workspace, cells: Ints, context: Context) -> Fitted[SentenceSet]:
    """The trained encoder and class head, with vectors of the cells; every worker computes a part of these."""
    config, encoder = workspace.config, tuned.model.encoder
    layer, max_len = config.classify.layer, finetune.longest_read(encoder, config.classify)
    mine = slice(context.rank, None, context.world_size)
    some = embed.embed_cells(
        encoder, workspace.corpus, cells[mine], config.embed.pooling, layer, config.train.micro_tokens, max_len=max_len
    )
    vectors_ND: Floats = np.zeros((len(cells), some.shape[1]), dtype=np.float32)
    vectors_ND[mine] = some
    vectors_ND, order = finetune.sum_over_workers(vectors_ND, context), np.argsort(cells)
    return Fitted(
        predict=lambda some: tuned.predict(some.x.cells), classifier=classifier_of(tuned), encoder=encoder, layer=layer,
        max_len=max_len, vectors=lambda some: vectors_ND[order[np.searchsorted(cells[order], some)]],
    )  # fmt: skip
