"""A training worker that kills itself, in a module that spawned processes can import (pytest's own modules they cannot)."""

import json
import os
import signal
from pathlib import Path
from unittest import mock

import torch

from mixgf.corpus import reader
from mixgf.distributed import train_group
from mixgf.encoder.bert import MaskedModel
from mixgf.training import loop
from mixgf.training.pretraining import Pretraining
from mixgf.training.worker_group import LocalContext


def _write(settings, kind, rows):
    with Path(f"{settings.output}/{kind}.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def worker_session(settings, dies):
    """What a training worker does; it may kill itself when the figures of step 4 to 6 are to be logged."""

    class Context(train_group.RayContext):
        asked, agree = LocalContext.asked, LocalContext.agree  # there is no Ray here

        def commit(self, rows):
            if dies and rows[0][0] == 4:
                if dies == "amid":
                    super().commit([row for row in rows if row[0] == 4 and row[2] in ("loss", "lr")])
                os.kill(os.getpid(), signal.SIGKILL)
            super().commit(rows)

    class Board:
        """The driver's board; rows go to a file, where they outlive this process."""

        class report:
            remote = staticmethod(lambda step, figures: None)

        class commit:
            remote = staticmethod(lambda rows: _write(settings, "committed", rows))

        class recover:
            remote = staticmethod(lambda rows: _write(settings, "recovered", rows))

    store = f"{settings.output}/store{dies}"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        corpus = reader.Corpus(settings.inputs.corpus)
        model = MaskedModel(settings.model, corpus.vocabulary.size, seed=settings.seed)
        context = Context(torch.device("cpu"), Board, "run0")
        with mock.patch.object(train_group.ray, "get", lambda reference: reference):
            loop.fit(model, Pretraining(settings, corpus), settings.train, context, uri=f"{settings.output}/pretrain")
    finally:
        torch.distributed.destroy_process_group()
