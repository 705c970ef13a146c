"""One fine-tuning by a group of workers: numbers do not depend on their number, and a killed one goes on with the same bits.

The file is its own worker group: `PYTHONPATH=tests python tests/classification/test_finetune_group.py SPEC` imports torch once and forks the workers.
"""

import json
import os
import sys
from functools import partial

import numpy as np
import pytest
from forks import fork_workers, run_script

from mixgf.config import parse, run, training
from mixgf.config.classification import Classify
from mixgf.config.data import Tokens
from mixgf.storage import files, tables

CELLS = 90
CONFIG = run.Config(
    model=training.Model(num_layers=2, dim=32, num_heads=2, ffn_dim=64, max_positions=32),
    tokens=Tokens(max_len=32), tracking=run.Tracking(uri="off"),
    train=training.Train(micro_tokens=60, checkpoint_steps=3),
    classify=Classify(epochs=3, lr=3e-3, warmup_steps=5, batch_cells=16, splits=("random",)),
)  # fmt: skip
VARIANTS = {
    "all": {},
    "frozen": {"freeze_layers": 1, "layer": -2},
    "lora": {"lora_rank": 2, "layer": -2, "warm_start": True},
}
"""Fields of `classify` by variant; the last layer is read by none but the first."""
RUNS = {
    **{f"{variant} {size}": (variant, size, None) for variant in VARIANTS for size in (1, 2)},
    "all 3": ("all", 3, None),
    "all killed": ("all", 2, [1, 7]),
    "all elastic": ("all", 2, [0, 8]),
}
"""By name: variant, workers, and who kills itself at which step. The elastic one goes on with one worker."""


@pytest.fixture(scope="module")
def inputs(make_corpus, tmp_path_factory):
    """A corpus in which every other cell has genes of its own kind, and an untrained checkpoint."""
    from mixgf.corpus.reader import Corpus
    from mixgf.encoder import checkpoint
    from mixgf.encoder.bert import MaskedModel
    from mixgf.storage import artifacts

    corpus = make_corpus(np.random.default_rng(0).integers(5, 20, CELLS), np.arange(CELLS) % 2, [40, 50])
    found, uri = Corpus(corpus), str(tmp_path_factory.mktemp("model") / "pretrain")
    record = artifacts.plan(checkpoint.KIND, checkpoint.SCHEMA, {}, {"corpus": found.record.fingerprint})
    artifacts.begin(uri, record)
    model = MaskedModel(CONFIG.model, found.vocabulary.size, seed=3)
    checkpoint.publish_checkpoint(uri, record, model, vocabulary=found.vocabulary.hash, tokens=found.token_settings)
    return corpus, uri


@pytest.fixture(scope="module")
def outputs(inputs, tmp_path_factory):
    """Folders of all runs."""
    folder = tmp_path_factory.mktemp("group")
    spec = {"config": parse.to_dict(CONFIG), "corpus": inputs[0], "checkpoint": inputs[1], "folder": str(folder)}
    run_script(__file__, spec)
    return {name: f"{folder}/{name}" for name in RUNS}


def curves(uri):
    rows = tables.read_table(f"{uri}/history.parquet").to_pylist()
    names = ("loss", "grad_norm", "val_loss", "val_accuracy")
    return {(row["step"], row["name"]): row["value"] for row in rows if row["name"] in names}


def weights(uri):
    from mixgf.encoder.checkpoint import read_tensors

    return {name: tensor.numpy() for name, tensor in read_tensors(f"{uri}/model.safetensors").items()}


@pytest.mark.parametrize(
    ("name", "alone"), [("all 2", "all 1"), ("all 3", "all 1"), ("all elastic", "all 1"), ("frozen 2", "frozen 1"),
                        ("lora 2", "lora 1")],
)  # fmt: skip
def test_any_number_of_workers_gives_the_losses_and_scores_of_one(outputs, name, alone):
    ours, expected = curves(outputs[name]), curves(outputs[alone])
    assert ours.keys() == expected.keys()
    assert {step for step, _ in expected} >= {4, 8, 12}
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=1e-5), key
    ours, expected = (files.read_json(f"{outputs[n]}/classifier.json")["about"] for n in (name, alone))
    assert (ours["epoch"], ours["test"]["accuracy"]) == (expected["epoch"], expected["test"]["accuracy"])
    assert ours["test"]["cells"] == 18


def test_a_killed_training_goes_on_with_the_bits_of_one_that_was_not_killed(outputs):
    assert curves(outputs["all killed"]) == curves(outputs["all 2"])
    ours, expected = weights(outputs["all killed"]), weights(outputs["all 2"])
    assert ours.keys() == expected.keys()
    assert [name for name, value in expected.items() if not np.array_equal(ours[name], value)] == []


def test_layers_that_are_not_read_stay_as_they_were(outputs, inputs):
    before, after = weights(inputs[1]), weights(outputs["frozen 2"])
    assert np.array_equal(after["encoder.layers.1.qkv.weight"], before["encoder.layers.1.qkv.weight"])
    assert not np.array_equal(
        weights(outputs["all 2"])["encoder.layers.1.qkv.weight"], before["encoder.layers.1.qkv.weight"]
    )


def test_the_stage_gives_the_same_classifier_in_this_process_and_annotate_takes_it(outputs, inputs, tmp_path):
    import dataclasses

    from mixgf.classification import kept_classifier
    from mixgf.corpus.reader import Corpus
    from mixgf.errors import UserError
    from mixgf.execution import LocalExecutor
    from mixgf.stages import finetune

    config = dataclasses.replace(
        CONFIG, output=str(tmp_path), inputs=run.Inputs(corpus=inputs[0], checkpoint=inputs[1])
    )
    uri = finetune.run(config, executor=LocalExecutor())
    assert curves(uri) == curves(outputs["all 1"])
    ours, expected = weights(uri), weights(outputs["all 1"])
    assert [name for name, value in expected.items() if not np.array_equal(ours[name], value)] == []
    kept, vocabulary, record = kept_classifier.load(kept_classifier.find(str(tmp_path)))
    corpus = Corpus(inputs[0])
    p_NC = kept.probabilities(kept.cells(corpus, np.arange(CELLS), None, "human"))
    right = np.asarray(kept.classes)[p_NC.argmax(1)] == np.where(np.arange(CELLS) % 2, "alpha", "beta")
    assert right.mean() > 0.9
    assert (vocabulary.hash, record.counts) == (corpus.vocabulary.hash, {"classes": 2})
    assert files.list_dir(f"{uri}/steps") == []
    before = files.read_bytes(f"{uri}/record.json")
    assert finetune.run(config, executor=LocalExecutor()) == uri
    assert files.read_bytes(f"{uri}/record.json") == before
    other = dataclasses.replace(config, classify=dataclasses.replace(config.classify, lr=1e-3))
    with pytest.raises(UserError, match=r"holds another classifier: config.finetune.lr: 0.003 -> 0.001"):
        finetune.run(other, executor=LocalExecutor())


# the workers


def main(spec):
    import torch
    import torch.distributed as dist  # noqa: F401 (imported once, before the forks)

    from mixgf.classification import finetune_group  # noqa: F401

    torch.set_num_threads(1)
    for name, (_, size, dies) in RUNS.items():
        if dies is not None:
            ends = fork_workers(size, partial(worker, spec, name, size, dies, "killed"), f"{name} killed")
            assert ends[dies[0]] == -9, ends
        last = 1 if "elastic" in name else size
        assert fork_workers(last, partial(worker, spec, name, last, None, "last"), f"{name} last") == [0] * last


def worker(spec, name, size, dies, label, rank):  # noqa: PLR0917
    import dataclasses
    import signal

    import torch
    import torch.distributed as dist

    from mixgf.classification import finetune_group, labels
    from mixgf.classification.paths import ArtifactPaths
    from mixgf.classification.workspace import Workspace
    from mixgf.corpus.reader import Corpus
    from mixgf.training import loop
    from mixgf.training.worker_group import GroupContext

    config = parse.from_dict(run.Config, spec["config"])
    config = dataclasses.replace(config, classify=dataclasses.replace(config.classify, **VARIANTS[RUNS[name][0]]))
    uri = f"{spec['folder']}/{name}"
    dist.init_process_group(
        "gloo", init_method=f"file://{spec['folder']}/store-{name}-{label}", rank=rank, world_size=size
    )
    if dies is not None and rank == dies[0]:
        metrics, count = loop.LossTask.metrics, [0]

        def dying(self, sums, gathered):
            count[0] += 1
            if count[0] == dies[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return metrics(self, sums, gathered)

        loop.LossTask.metrics = dying
    table, split = finetune_group.one_split(labels.labelled(Corpus(spec["corpus"]), config.classify), config)
    paths = ArtifactPaths(corpus=spec["corpus"], checkpoint=spec["checkpoint"], output=uri)
    workspace = Workspace(config=config, paths=paths, table=table)
    finetune_group.train_classifier(workspace, split, uri, "a", GroupContext(torch.device("cpu")))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
