import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import without_logging_errors

from mixgf.config.run import Compute, Config
from mixgf.config.tuning import Tune
from mixgf.distributed import tune_search

SPACE = {"train.lr": ("loguniform", [1e-5, 1e-2]), "objective.view": ("choice", ["dropout", "mask"])}


def trial(status, result, lr, view):
    return SimpleNamespace(
        status=status, last_result=result, config={"train.lr": lr, "objective.view": view, "more": 1}
    )


def test_a_table_of_trials_names_the_varied_fields_and_has_the_best_score_first():
    """A trial that has reported nothing comes last, without a score."""
    trials = [
        trial("TERMINATED", {"score": 0.25, "rung": 1}, 0.00123456, "dropout"),
        trial("RUNNING", {}, 0.01, "mask"),
        trial("TERMINATED", {"score": 0.75, "rung": 2}, 1e-5, "mask"),
    ]
    head, *rows = (line.split() for line in tune_search.trial_table(SPACE, trials))
    assert head == ["status", "score", "rung", "train.lr", "objective.view"]
    assert rows == [
        ["TERMINATED", "0.75", "2", "1e-05", "mask"],
        ["TERMINATED", "0.25", "1", "0.001235", "dropout"],
        ["RUNNING", "0", "0.01", "mask"],
    ]


def test_a_table_comes_at_the_end_and_before_it_only_after_a_while(monkeypatch):
    shown, now = [], [100.0]
    monkeypatch.setattr(tune_search.time, "monotonic", lambda: now[0])
    table = tune_search._Table(SPACE, SimpleNamespace(table=shown.append))
    trials = [trial("RUNNING", {}, 0.01, "mask")]
    assert not table.should_report(trials)
    assert table.should_report(trials, done=True)
    now[0] += tune_search.TABLE_SECONDS
    assert table.should_report(trials)
    table.report(trials, False, "Result logdir: somewhere")
    assert shown == [tune_search.trial_table(SPACE, trials)]
    assert not table.should_report(trials)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_an_arm_whose_process_was_killed_goes_on_with_one_line_and_no_traceback(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO, logger="mixgf")
    scores, mark = [], tmp_path / "killed"

    def advance(chosen, rung):
        if rung == 1 and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return rung + chosen["train.lr"]

    class Shown:
        def ended(self):
            pass

        def scored(self, chosen, rung, score):
            scores.append((rung, score))

        def table(self, lines):
            pass

    config = Config(tune=Tune(), compute=Compute(num_workers=1))
    space = {"train.lr": ("choice", [0.5])}
    tune_search.run_points(config, space, [{"train.lr": 0.5}], range(2), advance=advance, shown=Shown(), stop=False)
    assert mark.exists()
    assert scores[-1] == (2, 1.5)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["tune: the process of an arm failed (1 so far); the arm goes on from its last rung"]
    out, err = capfd.readouterr()
    assert "Traceback" not in without_logging_errors(out + err)
