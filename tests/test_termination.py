"""SIGTERM: a training writes a checkpoint and ends; everything else ends at once."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mixgf import termination
from mixgf.config import parse, run, training
from mixgf.config.data import Tokens
from mixgf.execution import LocalExecutor
from mixgf.stages import pretrain
from mixgf.storage import files
from mixgf.training import checkpoints

STEPS = 40


@pytest.fixture
def handler():
    """SIGTERM as a command has it."""
    before = signal.getsignal(signal.SIGTERM)
    with termination.installed():
        yield
    assert signal.getsignal(signal.SIGTERM) is before
    assert not termination.requested()


def test_sigterm_raises_at_once_where_nothing_listens(handler):
    with pytest.raises(termination.Terminated):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_listens_is_asked_first_and_a_second_signal_raises(handler):
    with termination.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.requested()
        with pytest.raises(termination.Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_listens_and_does_not_end_is_stopped_after_the_grace(handler, monkeypatch):
    monkeypatch.setattr(termination, "GRACE_SECONDS", 0.2)

    def never_ends():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    with termination.listening(), pytest.raises(termination.Terminated):
        never_ends()


def test_the_handler_comes_back_after_a_library_has_set_its_own(handler):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
    termination.renew()
    with pytest.raises(termination.Terminated):
        os.kill(os.getpid(), signal.SIGTERM)


def test_nothing_is_installed_where_it_was_not_asked_for():
    before = signal.getsignal(signal.SIGTERM)
    termination.renew()
    assert signal.getsignal(signal.SIGTERM) is before


def main(data, after):
    """Pretrain in this process, which gets SIGTERM after some steps; the exit code of a command."""
    config = parse.from_dict(run.Config, data)
    report = pretrain.ProcessContext.report

    def reported(self, step, figures):
        report(self, step, figures)
        if step == after:
            os.kill(os.getpid(), signal.SIGTERM)

    pretrain.ProcessContext.report = reported
    try:
        with termination.installed():
            pretrain.run(config, executor=LocalExecutor())
    except termination.Terminated:
        return termination.EXIT_CODE
    return 0


def test_a_training_writes_a_checkpoint_of_its_step_ends_and_goes_on_with_the_bits_of_one_never_stopped(
    make_corpus, tmp_path
):
    corpus = make_corpus(np.random.default_rng(0).integers(5, 20, 60), np.arange(60) % 2, [60])
    settings = run.Config(
        model=training.Model(num_layers=1, dim=16, num_heads=2, ffn_dim=16, max_positions=20), tokens=Tokens(max_len=20),
        train=training.Train(epochs=20, batch_cells=10, log_steps=1, checkpoint_steps=1000, max_steps=STEPS),
        inputs=run.Inputs(corpus=corpus), tracking=run.Tracking(uri="off"),
    )  # fmt: skip
    hashes = {}
    for name, after in (("whole", 0), ("stopped", 7)):
        config = parse.to_dict(settings) | {"output": f"{tmp_path}/{name}"}
        uri = f"{tmp_path}/{name}/pretrain"
        for stops in [after, 0] if after else [0]:
            done = subprocess.run(
                [sys.executable, __file__, json.dumps(config), str(stops)], capture_output=True, text=True, timeout=300, check=False
            )  # fmt: skip
            assert done.returncode == (143 if stops else 0), done.stderr[-3000:]
            if stops:
                assert checkpoints.complete_steps(uri) == [8], "the signal came after the sums of step 7"
                assert not files.exists(f"{uri}/model.safetensors")
        hashes[name] = files.sha256(f"{uri}/model.safetensors")
    assert hashes["stopped"] == hashes["whole"]


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), int(sys.argv[2])))
