"""Ray's part of the chaos: SIGKILL to training workers, to the driver, and to a node, against the run never disturbed.

Slow (minutes): Ray needs seconds to notice a death and to start a group. What a worker does between two deaths is tested
in training/test_killed_workers.py, in every run of the tests.
"""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import killing
import numpy as np
import pytest

from mixgf.config import parse, run, training
from mixgf.config.classification import Classify
from mixgf.config.data import Tokens
from mixgf.corpus import reader
from mixgf.encoder.bert import MaskedModel
from mixgf.storage import files, tables
from mixgf.training import checkpoints, loop, worker_group
from mixgf.training.pretraining import Pretraining

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
LOSSES = ("loss", "mlm", "contrast", "grad_norm", "lr", "alignment", "uniformity")
STEPS = 150
PATIENCE = 400  # seconds that a step may take to come on a busy machine


@pytest.fixture(scope="module")
def settings(make_corpus, tmp_path_factory):
    rng = np.random.default_rng(0)
    uri = make_corpus(rng.integers(60, 200, 300), np.arange(300) % 2, [100, 150, 50], genes=200)
    return run.Config(
        output=str(tmp_path_factory.mktemp("run")),
        model=training.Model(num_layers=2, dim=64, num_heads=4, ffn_dim=64, max_positions=200),
        tokens=Tokens(max_len=200),
        train=training.Train(
            epochs=10, batch_cells=20, lr=1e-3, warmup_steps=10, log_steps=1, checkpoint_steps=5, max_steps=STEPS
        ),
        inputs=run.Inputs(corpus=uri),
        compute=run.Compute(num_workers=2, max_failures=5),
    )


def result(uri):
    """The trace of losses by (step, name), and the hash of the final weights."""
    rows = tables.read_table(f"{uri}/history.parquet").to_pylist()
    trace = {(row["step"], row["name"]): row["value"] for row in rows if row["name"] in LOSSES}
    assert len(trace) == sum(row["name"] in LOSSES for row in rows) == STEPS * len(LOSSES)  # every step, and none twice
    return trace, files.sha256(f"{uri}/model.safetensors")


def reached(uri, step):
    """Wait until a checkpoint of at least this step is complete; returns the latest."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        steps = checkpoints.complete_steps(uri)
        if steps and steps[-1] >= step:
            return steps[-1]
        time.sleep(0.02)
    msg = f"no checkpoint of step {step}"
    raise AssertionError(msg)


def training_workers():
    """The live processes of a Ray Train group under this process."""
    return killing.workers(os.getpid(), "RayTrainWorker")


@pytest.fixture(scope="module")
def undisturbed(ray_local, settings):
    from mixgf.stages import pretrain

    return result(pretrain.run(settings))


def test_killed_workers_give_the_bits_of_the_run_never_killed(ray_local, settings, undisturbed, tmp_path):
    from mixgf.stages import pretrain

    chosen, rng = dataclasses.replace(settings, output=str(tmp_path)), np.random.default_rng(1)
    killed, uri = [], f"{tmp_path}/pretrain"

    def kill():
        for after in (int(rng.integers(5, 40)), int(rng.integers(60, 110))):
            at = reached(uri, after)
            workers = training_workers()
            victim = workers[int(rng.integers(len(workers)))]
            victim.kill()
            killed.append((victim.pid, at))

    thread = threading.Thread(target=kill)
    thread.start()
    pretrain.run(chosen)
    thread.join()
    assert len({pid for pid, _ in killed}) == 2
    assert all(at < STEPS for _, at in killed)
    assert result(uri) == undisturbed


def test_a_killed_driver_goes_on_with_the_bits_of_the_run_never_killed(settings, undisturbed, tmp_path):
    chosen = dataclasses.replace(settings, output=str(tmp_path))
    path, uri = tmp_path / "config.json", f"{tmp_path}/pretrain"
    path.write_text(json.dumps(parse.to_dict(chosen)))
    command = [sys.executable, "-m", "mixgf", "pretrain", "--config", str(path), "--debug"]
    rng = np.random.default_rng(2)
    ends = []
    for after in (int(rng.integers(5, 40)), int(rng.integers(60, 110))):
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ends.append(reached(uri, after))
        driver.kill()
        assert driver.wait() == -9
    assert ends[1] < STEPS
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert result(uri) == undisturbed


def test_a_driver_that_gets_sigterm_writes_a_checkpoint_and_goes_on_with_the_bits_of_the_run_never_stopped(
    settings, undisturbed, tmp_path
):
    """One line and exit code 143 within half a minute; the checkpoint is of the step at which the signal came."""
    train = dataclasses.replace(settings.train, checkpoint_steps=60)
    chosen = dataclasses.replace(settings, output=str(tmp_path), train=train)
    path, uri = tmp_path / "config.json", f"{tmp_path}/pretrain"
    path.write_text(json.dumps(parse.to_dict(chosen)))
    command = [sys.executable, "-m", "mixgf", "pretrain", "--config", str(path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reached(uri, 60) == 60
    sent = time.monotonic()
    driver.terminate()
    said = driver.communicate(timeout=PATIENCE)[1].strip().splitlines()
    assert driver.returncode == 143, said
    assert time.monotonic() - sent < 30
    assert said[-1] == "mixgf: stopped by SIGTERM; the same command continues where it stopped"
    assert not any("Traceback" in line for line in said)
    step = checkpoints.complete_steps(uri)[-1]
    assert 60 < step < STEPS
    assert step != 120, "a checkpoint of its own"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert result(uri) == undisturbed


def alone(chosen):
    """Losses of the loop alone, by (step, name)."""
    corpus = reader.Corpus(chosen.inputs.corpus)
    model = MaskedModel(chosen.model, corpus.vocabulary.size, seed=chosen.seed)
    rows = loop.fit(model, Pretraining(chosen, corpus), chosen.train, worker_group.LocalContext())
    return {(step, name): value for step, _, name, value in rows if name in LOSSES}


def trained_on(chosen, how, stage="pretrain"):
    """Train in a process of its own on a cluster that changes; returns the numbers of workers."""
    done = subprocess.run(
        [sys.executable, __file__, how, json.dumps(parse.to_dict(chosen)), stage], capture_output=True, text=True, check=False,
        env=os.environ | {
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10" if how == "lose" else "60", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("{"))  # Ray has words of its own there
    return json.loads(said)


def resized(chosen, how):
    """Pretrain on a cluster that changes; returns the numbers of workers, and the losses."""
    return trained_on(chosen, how), result(f"{chosen.output}/pretrain")[0]


def assert_near(losses, expected):
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        # the contrast is exp(cosine / temperature) to first order: its relative error is that of a cosine / temperature
        near = 1e-4 / training.Objective().temperature if key[1] in ("alignment", "contrast") else 1e-4
        assert losses[key] == pytest.approx(value, rel=near), key


def test_a_lost_node_makes_the_group_smaller_and_the_run_goes_on_with_the_same_batches(settings, tmp_path):
    """Three nodes in one machine, of which a training node is lost: from two workers to one; against the loop alone."""
    chosen = dataclasses.replace(
        settings, output=str(tmp_path), compute=run.Compute(num_workers=2, min_workers=1, max_failures=5)
    )
    sizes, losses = resized(chosen, "lose")
    assert sizes == {"before": 2, "after": 1}
    assert_near(losses, alone(chosen))


def test_a_new_node_makes_the_group_larger_and_the_run_goes_on_with_the_same_batches(settings, tmp_path):
    """A cluster with room for one of two workers gets a node while it trains: from one worker to two, in the same run."""
    chosen = dataclasses.replace(
        settings, output=str(tmp_path), model=training.Model(num_layers=4, dim=128, num_heads=4, ffn_dim=256, max_positions=200),
        compute=run.Compute(num_workers=2, min_workers=1, max_failures=0, resize_seconds=2),
    )  # fmt: skip
    sizes, losses = resized(chosen, "grow")
    assert sizes == {"before": 1, "after": 2}
    assert_near(losses, alone(chosen))


def test_a_training_writes_a_checkpoint_before_a_drained_node_is_lost(settings, tmp_path):
    """Ray tells of a node that it drains, as before a spot machine is taken away; the group goes on without it from that step."""
    chosen = dataclasses.replace(
        settings, output=str(tmp_path), model=training.Model(num_layers=4, dim=128, num_heads=4, ffn_dim=256, max_positions=200),
        compute=run.Compute(num_workers=2, min_workers=1, max_failures=5), train=dataclasses.replace(settings.train, checkpoint_steps=50),
    )  # fmt: skip
    found, losses = resized(chosen, "drain")
    assert found["saved"] % 50, "a checkpoint of its own"
    assert (found["before"], found["after"]) == (2, 1)
    assert_near(losses, alone(chosen))


def test_a_node_lost_and_replaced_gives_the_bits_of_the_run_never_disturbed_in_object_storage(
    settings, undisturbed, s3_bucket
):
    """Two nodes of one worker each, and S3 on loopback: a node is killed, and another one comes."""
    chosen = dataclasses.replace(
        settings,
        output=f"{s3_bucket}/lost",
        compute=run.Compute(num_workers=2, max_failures=5),
        tracking=run.Tracking(uri="off"),
    )
    assert trained_on(chosen, "replace")["before"] == 2
    assert result(f"{chosen.output}/pretrain") == undisturbed


def fine_tuned(uri):
    """Losses and validation scores of a fine-tuning by (step, name), and hashes of its weights."""
    rows = tables.read_table(f"{uri}/history.parquet").to_pylist()
    names = ("loss", "grad_norm", "val_loss", "val_accuracy")
    trace = {(row["step"], row["name"]): row["value"] for row in rows if row["name"] in names}
    weights = [name for name in files.list_dir(uri) if name.endswith(".safetensors")]
    assert weights
    return trace, {name: files.sha256(f"{uri}/{name}") for name in weights}


def test_a_fine_tuning_that_loses_a_node_gives_the_bits_of_one_never_disturbed_in_object_storage(
    ray_local, settings, undisturbed, s3_bucket, tmp_path
):
    from mixgf.stages import finetune

    inputs = dataclasses.replace(settings.inputs, checkpoint=f"{settings.output}/pretrain")
    classify = Classify(epochs=15, lr=1e-3, warmup_steps=5, batch_cells=16, splits=("random",))
    chosen = dataclasses.replace(
        settings, inputs=inputs, classify=classify, output=f"{s3_bucket}/tuned", compute=run.Compute(num_workers=2, max_failures=5), tracking=run.Tracking(uri="off"),
    )  # fmt: skip
    assert trained_on(chosen, "replace", "finetune")["before"] == 2
    whole = finetune.run(dataclasses.replace(chosen, output=str(tmp_path)))
    assert fine_tuned(f"{chosen.output}/finetune") == fine_tuned(whole)


def drain(node):
    """Tell Ray that a node will be taken away in ten minutes."""
    import ray
    from ray.core.generated import autoscaler_pb2

    reason, deadline = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), (time.time() + 600) * 1000
    client = ray._private.worker.global_worker.gcs_client
    accepted, why = client.drain_node(node.node_id, reason, "spot", int(deadline))
    assert accepted, why


def main(how, data, stage):
    """Train on a cluster that loses, replaces or drains a training node, or gets one; prints the numbers of training workers."""
    import ray
    from ray.cluster_utils import Cluster

    chosen = parse.from_dict(run.Config, data)
    head = {"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
    if how != "grow":  # a death is noticed soon; where none is meant, a busy machine must not look like one
        head["_system_config"] = {
            "health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 10,
        }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(1 if how == "grow" else 2)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    uri, sizes, ended = f"{chosen.output}/{stage}", {}, threading.Event()

    def change():
        reached(uri, 50 if how == "drain" else 20)
        sizes["before"] = len(training_workers())
        if how == "lose":
            cluster.remove_node(nodes[1], allow_graceful=False)
            reached(uri, 100)
        elif how == "replace":
            cluster.remove_node(nodes[1], allow_graceful=False)
            cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        elif how == "drain":
            drain(nodes[1])
            sizes["saved"] = reached(uri, 51)
            cluster.remove_node(nodes[1], allow_graceful=False)
            reached(uri, 100)
        else:
            cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
            give_up = time.monotonic() + PATIENCE
            while len(training_workers()) < 2 and time.monotonic() < give_up:
                time.sleep(0.1)
            reached(uri, checkpoints.complete_steps(uri)[-1] + 10)  # with both at work
        sizes["after"] = len(training_workers())
        ended.wait()  # the kernel ends a node with the thread that started it

    handle = signal.signal
    signal.signal = lambda *args: handle(*args) if threading.current_thread() is threading.main_thread() else None
    thread = threading.Thread(
        target=change, daemon=True
    )  # Ray Train wants the main thread, a new node would want it too
    thread.start()
    importlib.import_module(f"mixgf.stages.{stage}").run(chosen)
    ended.set()
    thread.join(60)
    sys.stdout.write(json.dumps(sizes) + "\n")
    sys.stdout.flush()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
