"""Laws of progress: lines in a log, counted from where a resumed run began."""

import logging

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
    bar.update(100)  # whoever asks again hears nothing new
    assert [r.getMessage()[:12] for r in caplog.records] == ["train:  60% ", "train: 100% "]


def test_durations_read_as_a_person_would_say_them():
    assert [console.duration(s) for s in (5, 200, 7500)] == ["5 s", "3 min 20 s", "2 h 05 min"]
