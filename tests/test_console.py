"""Laws of progress: lines in a log, counted from where a resumed run began."""

import io
import logging
import sys
import types

from mixgf import console


def test_a_log_gets_a_line_now_and_then_with_rate_and_time_left(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    log = logging.getLogger("mixgf")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "level", logging.INFO)
    bar = console.Progress("train", total=100, unit="cells", done=40)
    for done in range(41, 71):
        clock[0] += 1.0
        bar.update(done, loss=8.125)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1, "30 updates in 30 s are one line of a log"
    assert lines[0] == "train:  60%  1 cells/s  40 s left  loss 8.12", lines
    bar.update(100)
    bar.update(100)  # a second end prints nothing
    assert [r.getMessage()[:12] for r in caplog.records] == ["train:  60% ", "train: 100% "]


def test_durations_read_as_a_person_would_say_them():
    assert [console.duration(s) for s in (5, 200, 7500)] == ["5 s", "3 min 20 s", "2 h 05 min"]


class _Cell(io.StringIO):
    """As stderr of a notebook's kernel: no terminal, and a line is drawn again after a carriage return."""


def test_progress_in_a_notebook_is_one_line_that_is_drawn_again(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel.iostream", types.SimpleNamespace(OutStream=_Cell))
    monkeypatch.setattr(sys, "stderr", _Cell())
    monkeypatch.setattr(logging.getLogger("mixgf"), "level", logging.INFO)
    with console.Progress("embed", total=4, unit="cells") as progress:
        progress.update(4)
    assert sys.stderr.getvalue().startswith("\rembed: 100%  ")
    assert sys.stderr.getvalue().endswith("\n")


def test_lines_are_heard_without_a_setup_unless_somebody_listens(monkeypatch, capsys):
    log = logging.getLogger("mixgf")
    for name, value in (("handlers", []), ("propagate", False), ("level", logging.NOTSET)):
        monkeypatch.setattr(log, name, value)
    console.setup_if_silent()
    console.say("embed: done")
    assert capsys.readouterr().err == "embed: done\n"
    mine = logging.NullHandler()
    log.handlers[:] = [mine]
    console.setup_if_silent()
    assert log.handlers == [mine]
