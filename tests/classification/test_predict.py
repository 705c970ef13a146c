"""Where models and encoders compute."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixgf.classification import finetune, intermediates, predict, probes, registry
from mixgf.config.run import Compute, Config
from mixgf.errors import UserError

PLACES = SimpleNamespace(checkpoint="weights", corpus="corpus", embeddings="", parts="parts", output="")
GPU = Config(compute=Compute(gpus_per_worker=1.0))


class Loaded(Exception):
    pass


@pytest.fixture
def devices(monkeypatch):
    """Devices that encoders are loaded to; no corpus is opened."""
    found = []
    monkeypatch.setattr(registry, "load", lambda *args: found.append(torch.device(args[4]) if len(args) > 4 else "cpu"))
    for module in (predict, intermediates):
        monkeypatch.setattr(module, "Corpus", lambda uri: None)
    return found


def stop(*_, **__):
    raise Loaded


@pytest.mark.parametrize("gpus", [0.0, 1.0])
@pytest.mark.parametrize("available", [False, True])
def test_finetuning_and_embedding_compute_on_the_gpu_that_is_asked_for_or_stop(devices, monkeypatch, gpus, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    contexts = []
    monkeypatch.setattr(finetune, "finetune", lambda *_, context, **__: contexts.append(context.device) or stop())
    monkeypatch.setattr(intermediates.embed, "embed_cells", stop)
    run = Config(compute=Compute(gpus_per_worker=gpus))
    split = SimpleNamespace(whole=False)
    missing = gpus and not available
    works = (
        lambda: predict._probabilities(run, PLACES, None, split, "finetune"),
        lambda: intermediates.embed_block(run, PLACES, "", 0, np.arange(2)),
    )
    for work in works:
        with pytest.raises(UserError if missing else Loaded, match="gpus_per_worker = 1: no GPU" if missing else None):
            work()
    expected = torch.device("cuda" if gpus else "cpu")
    assert devices == ([] if missing else [expected] * 2)
    assert contexts == ([] if missing else [expected])


def test_a_kept_probe_reads_vectors_that_are_there_and_needs_no_gpu(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(intermediates, "vectors", lambda *_: np.zeros((1, 2), np.float32))
    monkeypatch.setattr(predict, "_keep", lambda *_: None)
    monkeypatch.setattr(predict.classifier, "wanted", lambda *_: True)
    monkeypatch.setattr(probes, "frozen", stop)
    split = SimpleNamespace(whole=True, train=[0], test=[0])
    with pytest.raises(Loaded):
        predict._probabilities(GPU, PLACES, SimpleNamespace(cells=np.arange(1)), split, "probe")
    assert devices == ["cpu"]
