"""Faults of many kinds: nothing is lost, nothing is wrong in silence, and every refusal is one line.

pytest -m faults tests/faults -s            # the whole campaign, hours; goes on after a stop
MIXGF_FAULTS=ledger.jsonl pytest -m faults tests/faults -s
"""

import os
import sys
from pathlib import Path

import pytest

from tests.faults import kinds
from tests.faults.campaign import LOST, SURVIVED, Kind, Ledger, run, table

SECONDS = 100
"""Of the part that runs in the ordinary suite."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    made = kinds.make_run(folder)
    return [
        kinds.bit_flips(made, 1_000), kinds.wrong_arguments(folder, 300), kinds.wrong_sources(made, folder, 200),
    ]  # fmt: skip


def report(ledger):
    text = table(ledger)
    sys.stdout.write(f"\n{text}\n")
    lost = [row for row in ledger.rows if row["ending"] == LOST]
    assert not lost, text


@pytest.mark.timeout(400)
def test_two_minutes_of_the_campaign_lose_nothing(campaign, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    run(campaign, ledger, seconds=SECONDS)
    assert len(ledger.rows) >= 30
    report(ledger)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(0)
def test_the_whole_campaign_loses_nothing(campaign, tmp_path):
    ledger = Ledger(Path(os.environ.get("MIXGF_FAULTS", tmp_path / "ledger.jsonl")))
    run(campaign, ledger)
    report(ledger)


def test_a_stopped_campaign_goes_on_and_counts_every_try_once(tmp_path):
    made = []
    kind = Kind("k", 5, lambda number: (made.append(number), (SURVIVED, ""))[1])
    path = tmp_path / "ledger.jsonl"
    run([kind], Ledger(path), seconds=-1)
    assert made == []
    path.write_text('{"kind": "k", "number": 1, "ending": "survived", "line": ""}\n{"kind": "k", "num')
    ledger = Ledger(path)
    run([kind], ledger)
    assert sorted(made) == [0, 2, 3, 4]
    assert "| k | 5 | 0 | 5 | 0 |" in table(ledger)
