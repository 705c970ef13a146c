"""Of two drivers at one output, one works; the other waits, says for whom, and goes on where the first is gone."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from mixgf.storage import artifacts, files, lease

HOLDER = """
import os, sys, time
from mixgf.storage import artifacts
record = artifacts.plan("embeddings", 1, {"seed": 1}, {})
work = artifacts.begin(sys.argv[1], record)
print("work" if work else "done", flush=True)
if work:
    with open(sys.argv[2], "a") as log:
        log.write(f"in {os.getpid()}\\n"); log.flush()
        time.sleep(float(sys.argv[3]))
        log.write(f"out {os.getpid()}\\n")
    if sys.argv[4] == "finish":
        artifacts.finish(sys.argv[1], record)
"""
RECORD = artifacts.plan("embeddings", 1, {"seed": 1}, {})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    yield
    lease.release_all()


def driver(uri, log, seconds, end="finish"):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, uri, str(log), str(seconds), end], stdout=subprocess.PIPE, text=True
    )


def test_several_drivers_work_one_after_the_other_and_one_finishes(root, tmp_path):
    log = tmp_path / "log"
    drivers = [driver(root, log, 0.5) for _ in range(4)]
    said = sorted(one.communicate(timeout=120)[0].strip() for one in drivers)
    assert said == ["done", "done", "done", "work"]
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["in", "out"]
    assert files.list_dir(files.join(root, "lease")) == []
    assert artifacts.find(root) is not None


def test_a_waiting_driver_says_for_whom_and_takes_the_output_of_one_that_ended_or_was_killed(tmp_path, caplog):
    caplog.set_level("INFO", logger="mixgf")
    for end in ("error", "kill"):
        uri, log = str(tmp_path / end), tmp_path / f"{end}.log"
        other = driver(uri, log, 4 if end == "error" else 600, "error")
        assert other.stdout.readline() == "work\n"
        if end == "kill":
            threading.Timer(1.5, lambda: (other.kill(), other.wait())).start()  # noqa: B023
        began = time.monotonic()
        assert artifacts.begin(uri, RECORD)
        assert 0.5 < time.monotonic() - began < lease.STALE_SECONDS / 2
        assert f"{uri}: process {other.pid} of " in caplog.text
        other.wait(timeout=30)
        artifacts.finish(uri, RECORD)
        assert files.list_dir(uri) == ["record.json"]


def test_a_holder_of_another_machine_is_passed_over_only_without_a_sign_of_life(root, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.5)
    far = replace(lease.Holder.of_this_process(), host="far", space="far", key="far")
    place = files.join(root, "lease", "00000001.json")
    files.write_json(place, asdict(far))
    stop = threading.Event()

    def live():
        beat = 0
        while not stop.wait(0.3):
            beat += 1
            files.write_json(place, asdict(far) | {"beat": beat})

    thread = threading.Thread(target=live)
    thread.start()
    threading.Timer(4, stop.set).start()
    began = time.monotonic()
    assert lease.hold(root, lambda: False)
    assert time.monotonic() - began > 4
    thread.join()
    assert files.list_dir(files.join(root, "lease")) == ["00000001.json", "00000002.json"]
    lease.release(root)
    assert files.list_dir(files.join(root, "lease")) == []


def test_a_process_that_ended_holds_nothing_though_its_parent_did_not_ask_for_it(tmp_path):
    uri = str(tmp_path / "a")
    other = driver(uri, tmp_path / "log", 600)
    assert other.stdout.readline() == "work\n"
    other.kill()
    began = time.monotonic()
    assert artifacts.begin(uri, RECORD)
    assert time.monotonic() - began < lease.STALE_SECONDS / 2
    other.wait()


@pytest.mark.parametrize("gone", [0, 2**22 + 1])
def test_a_process_of_another_container_with_this_host_name_is_not_taken_for_one_that_ended(gone):
    mine = lease.Holder.of_this_process()
    other = replace(mine, pid=gone, space=f"{mine.host} another")
    assert not other.has_ended
    assert replace(other, space=mine.space).has_ended


def test_a_later_process_with_the_number_of_a_holder_is_another_one():
    mine = lease.Holder.of_this_process()
    assert not mine.has_ended
    assert replace(mine, started=mine.started - 100).has_ended


def test_a_holder_gives_signs_of_life_and_holds_again_at_once(tmp_path):
    uri = str(tmp_path)
    assert lease.hold(uri, lambda: False)
    assert lease.hold(uri, lambda: False)
    time.sleep(1)
    assert json.loads((tmp_path / "lease" / "00000001.json").read_text())["beat"] >= 2
    (tmp_path / "lease" / "00000001.json").write_text("")  # damaged: the holder writes it again
    time.sleep(0.5)
    assert lease._read(lease._uri(uri, 1)).key == lease._held[uri].holder.key


def test_drivers_of_a_corpus_help_each_other_and_wait_for_nobody(tmp_path):
    record = artifacts.plan("corpus", 1, {"seed": 1}, {})
    assert artifacts.begin(str(tmp_path), record)
    assert files.list_dir(str(tmp_path)) == ["plan.json"]
