"""The connection of a command to Ray."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
from ray._private import utils

from mixgf import termination
from mixgf.config.run import Config
from mixgf.distributed import session


def test_sigterm_amid_the_start_of_ray_waits_for_its_end_and_then_stops_the_command(monkeypatch):
    """Ray sets a handler of its own first; a process that it ends amid its start aborts in Ray's own code."""
    done = []

    def init(**_):
        utils.set_sigterm_handler(lambda number, _: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("connected")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: done.append("closed"))
    monkeypatch.setattr(session, "ray", ray)
    theirs = utils.set_sigterm_handler
    with pytest.raises(termination.Terminated), termination.installed(), session.session(Config()):
        done.append("worked")
    assert done == ["connected", "closed"]
    assert utils.set_sigterm_handler is theirs
