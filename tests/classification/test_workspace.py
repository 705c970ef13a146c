"""A workspace travels to other processes, and gives each model its inputs, on the device that computes."""

import pickle

import numpy as np
import pytest
import torch
from scipy import sparse

from mixgf.classification import finetune, workspace
from mixgf.classification.labels import Labelled
from mixgf.classification.models.finetuned import Finetune
from mixgf.classification.models.frozen import Probe
from mixgf.classification.paths import ArtifactPaths
from mixgf.classification.splits import Split
from mixgf.classification.workspace import Workspace
from mixgf.config.run import Compute, Config
from mixgf.errors import UserError

SAME = np.full(6, "x")
TABLE = Labelled(cells=np.arange(6), names=np.array(list("abcdef")), labels=np.array(["p", "q"] * 3), species=SAME, groups=SAME,
                 donors=SAME, datasets=SAME, transfer=SAME, sources=SAME)  # fmt: skip
SPLIT = Split(group="x", kind="random", direction="", seed=0, classes=("p", "q"), train=np.arange(4), validation=np.arange(1, 3),
              test=np.array([4, 5]))  # fmt: skip


def made(gpus: float = 0.0) -> Workspace:
    paths = ArtifactPaths(corpus="corpus", checkpoint="weights", output="out")
    return Workspace(config=Config(compute=Compute(gpus_per_worker=gpus)), paths=paths, table=TABLE)


class Loaded(Exception):
    pass


@pytest.fixture
def devices(monkeypatch):
    """Devices that encoders are loaded to; no corpus is opened."""
    found = []
    monkeypatch.setattr(workspace.encoders, "load", lambda *args: found.append(args[4]))
    monkeypatch.setattr(workspace, "Corpus", lambda _: None)
    return found


def stop(*_, **__):
    raise Loaded


@pytest.mark.parametrize("gpus", [0.0, 1.0])
@pytest.mark.parametrize("available", [False, True])
def test_finetuning_and_embedding_compute_on_the_gpu_that_is_asked_for_or_stop(devices, monkeypatch, gpus, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    contexts = []
    monkeypatch.setattr(finetune, "finetune", lambda *_, context, **__: contexts.append(context.device) or stop())
    monkeypatch.setattr(workspace.embed, "embed_cells", stop)
    missing = gpus and not available
    works = (
        lambda: Finetune().fit(made(gpus).problem(SPLIT, Finetune())),
        lambda: made(gpus).write_vectors("", 0, np.arange(2)),
    )
    for work in works:
        with pytest.raises(UserError if missing else Loaded, match="gpus_per_worker = 1: no GPU" if missing else None):
            work()
    expected = torch.device("cuda" if gpus else "cpu")
    assert devices == ([] if missing else [expected] * 2)
    assert contexts == ([] if missing else [expected])


def test_a_probe_reads_vectors_that_are_there_and_needs_no_gpu(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Workspace, "vectors", lambda self, encoder, cells: np.eye(6, dtype=np.float32)[cells])
    problem = made(1.0).problem(SPLIT, Probe())
    fitted = Probe().fit(problem)
    assert devices == []
    assert fitted.encoder is None
    np.testing.assert_array_equal(problem.train.x.argmax(1), np.arange(4))
    assert fitted.predict(problem.target).shape == (2, 2)


def test_genes_that_a_data_set_never_detects_are_left_out_where_data_sets_meet():
    counts = sparse.csr_matrix(np.array([[1, 0, 2], [3, 0, 0], [0, 5, 1]], dtype=np.float32))
    assert workspace.common_genes(counts, np.array(["a", "a", "b"])).tolist() == [False, False, True]
    assert workspace.common_genes(counts, np.array(["a", "a", "a"])).all()


def test_an_open_corpus_stays_in_its_process(devices):
    one = made()
    one.corpus  # noqa: B018 (opens it)
    two = pickle.loads(pickle.dumps(one))
    assert "corpus" in vars(one)
    assert vars(two).keys() == {"config", "paths", "table"}
    assert (two.config, two.paths) == (one.config, one.paths)
    np.testing.assert_array_equal(two.table.names, TABLE.names)


def test_a_problem_has_no_labels_of_the_cells_to_predict_and_its_validation_cells_are_training_cells(devices):
    problem = made().problem(SPLIT, Finetune())
    assert problem.labels.tolist() == [0, 1, 0, 1]
    assert problem.learning.x.cells.tolist() == [0, 3]
    assert problem.validation.x.cells.tolist() == [1, 2]
    assert problem.target.x.cells.tolist() == [4, 5]
    assert not problem.across
