"""Faults of many kinds: nothing is lost, nothing is wrong in silence, and every refusal is one line.

pytest -m faults tests/faults -s                                 # the whole campaign, hours
MIXGF_FAULTS=ledger.jsonl pytest -m faults tests/faults -s       # the same; goes on after a stop
MIXGF_FAULTS_SECONDS=800 ... pytest ... -k on_ray                # for so long, one part: files_and_words, runs, s3, dead_tracker,
                                                                 # slow_tracker or on_ray; several may run at the same time
"""

import json
import os
import sys
from pathlib import Path

import pytest
from processes import mlflow_server

from mixgf.storage import artifacts, files, layout
from tests.faults import disturbed, kinds
from tests.faults.campaign import LOST, REFUSED, SURVIVED, Kind, Ledger, by_stage, run, table
from tests.faults.chain import STAGES, Chain

SECONDS = 60
"""Of each part that runs in the ordinary suite."""


@pytest.fixture(scope="module")
def files_and_words(tmp_path_factory):
    """Faults of files and arguments."""
    folder = tmp_path_factory.mktemp("faults")
    made = kinds.make_run(folder)
    return [
        kinds.bit_flips(made, 1_000), kinds.wrong_arguments(folder, 300), kinds.wrong_sources(made, folder, 200),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    kept = os.environ.get("MIXGF_FAULTS")
    made = Chain(Path(f"{kept}.chain").absolute() if kept else tmp_path_factory.mktemp("chain"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def runs(chain):
    """Faults while a stage runs, without Ray."""
    disk = [disturbed.full_disk(chain, 4 * len(STAGES))] if disturbed.can_mount() else []
    return [disturbed.kills(chain, 120), *disk]


@pytest.fixture(scope="module")
def s3(chain, s3_server):
    return [disturbed.s3_faults(chain, s3_server, 20, 36), disturbed.s3_faults(chain, s3_server, 5, 24)]


@pytest.fixture(scope="module")
def dead_tracker(chain):
    return [disturbed.dead_tracker(chain, 20)]


@pytest.fixture(scope="module")
def slow_tracker(chain, tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as tracker:
        yield [disturbed.slow_tracker(chain, tracker, 20)]


@pytest.fixture(scope="module")
def on_ray(chain):
    nodes = disturbed.Nodes(chain)
    yield [disturbed.kills_on_ray(chain, nodes, 88)]
    nodes.close()


def report(ledger):
    text = table(ledger)
    sys.stdout.write(f"\n{text}\n\n{by_stage(ledger, STAGES)}\n")
    lost = [row for row in ledger.rows if row["ending"] == LOST]
    assert not lost, text


def try_for_a_minute(kinds_of_fault, folder, *, fewest):
    ledger = Ledger(folder / "ledger.jsonl")
    run(kinds_of_fault, ledger, seconds=SECONDS)
    assert len(ledger.rows) >= fewest
    report(ledger)


@pytest.mark.timeout(400)
def test_a_minute_of_faults_in_files_and_arguments_loses_nothing(files_and_words, tmp_path):
    try_for_a_minute(files_and_words, tmp_path, fewest=30)


@pytest.mark.timeout(900)
def test_a_minute_of_faults_while_stages_run_loses_nothing(runs, s3, dead_tracker, tmp_path):
    try_for_a_minute([*runs, *s3, *dead_tracker], tmp_path, fewest=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_file_that_a_stage_writes_is_listed_among_those_of_its_artifact(chain):
    """A file that is not would make an unfinished run refuse to go on, and would stay when the others are removed."""
    seen = set()
    for name in STAGES:
        output = chain.undisturbed(name)
        places = [Path(json.loads(line)) for line in Path(f"{output}.log.written").read_text().splitlines()]
        written = [path for path in places if not path.name.startswith(files._TEMPORARY)]
        assert written, name
        for path in written:
            above = (one for one in path.parents if (one / "record.json").exists() and one.is_relative_to(output))
            if (folder := next(above, None)) is None:
                continue  # beside the artifacts
            kind = artifacts.find(str(folder)).kind
            seen.add(kind)
            own = layout._pattern(kind).fullmatch(path.relative_to(folder).as_posix())
            assert own, f"{name}: {path}: not among the files of a {kind}"
    assert seen >= set(layout._FILES) - {layout.ANNOTATION, "bert"}


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", ["files_and_words", "runs", "s3", "dead_tracker", "slow_tracker", "on_ray"])
def test_the_whole_campaign_loses_nothing(part, request, tmp_path):
    ledger = Ledger(Path(os.environ.get("MIXGF_FAULTS", tmp_path / "ledger.jsonl")))
    kinds_of_fault = request.getfixturevalue(part)
    run(kinds_of_fault, ledger, seconds=float(os.environ.get("MIXGF_FAULTS_SECONDS", "inf")))
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


def test_the_table_of_stages_counts_tries_and_signals(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add("kills", 0, SURVIVED, "pretrain, 2 kills, SIGTERM at 4% of its time, SIGKILL after file 2 of 9: ")
    ledger.add("kills", 1, SURVIVED, "pretrain on neighbours, 1 kills, SIGTERM at 4% of its time: ")
    ledger.add("Ray", 0, SURVIVED, "pretrain, driver, SIGTERM, 3 kills: ")
    ledger.add("disk", 0, REFUSED, "embed: mixgf: /a/2 kills: no space left")
    told = by_stage(ledger, ["pretrain", "pretrain on neighbours", "embed"]).splitlines()
    assert told[2:] == [
        "| pretrain | 1 | 1 | 0 | 5 |", "| pretrain on neighbours | 1 | 0 | 0 | 1 |", "| embed | 0 | 0 | 1 | 0 |",
        "signals by victim: driver, SIGTERM 3, command, SIGTERM 2, command, SIGKILL 1",
    ]  # fmt: skip
