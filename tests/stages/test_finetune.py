"""`mixgf finetune` on a Ray Train group."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mixgf.classification import kept_classifier
from mixgf.config import parse, run, training
from mixgf.config.classification import Classify
from mixgf.config.data import Tokens
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import finetune
from mixgf.storage import artifacts, files, tables
from mixgf.training import checkpoints

CONFIG = run.Config(
    model=training.Model(num_layers=2, dim=32, num_heads=2, ffn_dim=64, max_positions=32),
    tokens=Tokens(max_len=32), tracking=run.Tracking(uri="off"), compute=run.Compute(num_workers=2),
    classify=Classify(epochs=2, lr=3e-3, warmup_steps=5, batch_cells=16, splits=("random",)),
)  # fmt: skip


@pytest.fixture(scope="module")
def config(make_corpus, tmp_path_factory):
    corpus = make_corpus(np.random.default_rng(0).integers(5, 20, 90), np.arange(90) % 2, [40, 50])
    found, uri = Corpus(corpus), str(tmp_path_factory.mktemp("model") / "pretrain")
    record = artifacts.plan(checkpoint.KIND, checkpoint.SCHEMA, {}, {"corpus": found.record.fingerprint})
    artifacts.begin(uri, record)
    model = MaskedModel(CONFIG.model, found.vocabulary.size, seed=3)
    checkpoint.publish_checkpoint(uri, record, model, vocabulary=found.vocabulary.hash, tokens=found.token_settings)
    return dataclasses.replace(CONFIG, inputs=run.Inputs(corpus=corpus, checkpoint=uri))


def losses(uri):
    rows = tables.read_table(f"{uri}/history.parquet").to_pylist()
    names = ("loss", "grad_norm", "val_loss", "val_accuracy")
    return {(row["step"], row["name"]): row["value"] for row in rows if row["name"] in names}


@pytest.mark.ray
def test_two_ray_workers_give_the_losses_and_scores_of_this_process(ray_local, config, tmp_path):
    alone, ours = (
        finetune.run(dataclasses.replace(config, output=f"{tmp_path}/{name}"), executor=executor)
        for name, executor in (("alone", LocalExecutor()), ("group", None))
    )
    expected, found = losses(alone), losses(ours)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    kept = [kept_classifier.load(kept_classifier.find(uri))[0] for uri in (alone, ours)]
    assert kept[0].about["test"]["accuracy"] == kept[1].about["test"]["accuracy"]
    heads = [one.classifier.members[0].head for one in kept]
    np.testing.assert_allclose(heads[1].weights_CH, heads[0].weights_CH, atol=1e-5)
    np.testing.assert_allclose(heads[1].bias_C, heads[0].bias_C, atol=1e-5)


def test_a_corpus_without_the_column_of_labels_is_refused_and_nothing_is_left(config, tmp_path):
    other = dataclasses.replace(
        config, output=str(tmp_path), classify=dataclasses.replace(config.classify, label="celltype")
    )
    with pytest.raises(UserError, match=r"classify.label = 'celltype': the corpus has no such column"):
        finetune.run(other, executor=LocalExecutor())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fine_tuning_whose_driver_is_ended_goes_on_with_the_bits_of_one_never_ended(config, tmp_path, number):
    """Two workers under Ray Train, by the command; the signal comes after some checkpoints, and the same command ends it."""
    train = dataclasses.replace(config.train, checkpoint_steps=7, log_steps=1)
    chosen = dataclasses.replace(config, train=train, classify=dataclasses.replace(config.classify, epochs=120))
    results = {}
    for name in ("whole", "ended"):
        mine = dataclasses.replace(chosen, output=f"{tmp_path}/{name}")
        path, uri = tmp_path / f"{name}.json", f"{tmp_path}/{name}/finetune"
        path.write_text(json.dumps(parse.to_dict(mine)))
        command = [sys.executable, "-m", "mixgf", "finetune", "--config", str(path)]
        if name == "ended":
            driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            give_up = time.monotonic() + 400
            while checkpoints.complete_steps(uri)[-1:] < [14]:
                assert driver.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.02)
            driver.send_signal(number)
            said = driver.communicate(timeout=100)[1]
            assert driver.returncode == (-9 if number == signal.SIGKILL else 143), said
            assert artifacts.find(uri) is None
            assert checkpoints.complete_steps(uri)[-1] >= 14
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        made = {file: files.sha256(f"{uri}/{file}") for file in files.list_dir(uri) if file.endswith(".safetensors")}
        assert made
        results[name] = losses(uri), made
    assert results["ended"] == results["whole"]
