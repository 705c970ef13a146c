from pathlib import Path

import pytest

from mixgf.distributed.metrics import Meter
from mixgf.stages.pieces import Piece, loop, make


def touch(path):
    if path.endswith("bad"):
        msg = "no"
        raise ValueError(msg)
    Path(path).touch()


def pieces(folder, names):
    return [
        Piece(uri=f"{folder}/{name}", call=touch, args=(f"{folder}/{name}",), cost=len(names) - i)
        for i, name in enumerate(names)
    ]


def test_pieces_are_work_units_on_the_boards_and_what_is_there_is_none(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Meter, "units", lambda self, **states: told.append(states))
    (tmp_path / "b").touch()
    make("work", pieces(tmp_path, ["a", "b", "c"]), loop, Meter("classify", "run0"))
    assert told == [{"waiting": 1, "done": 1}, {"waiting": 0, "done": 2}]


def test_a_piece_that_fails_is_a_failed_unit_and_its_error_comes_through(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Meter, "units", lambda self, **states: told.append(states))
    with pytest.raises(ValueError, match="no"):
        make("work", pieces(tmp_path, ["a", "bad", "c", "d"]), loop, Meter("classify", "run0"))
    assert told[-1] == {"waiting": 2, "done": 1, "failed": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
