"""SIGKILL to prepare, at random moments: the same command again ends with the bytes of the run never killed."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import killing
import numpy as np
import pytest
from executors import Through

from mixgf.config import data, parse, run
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import artifacts, files

PATIENCE = 300
"""Seconds that a part may take to come on a busy machine."""


@pytest.fixture
def settings(world):
    chosen, _ = world
    sources = tuple(dataclasses.replace(s, sample="cell_type") for s in chosen.sources)
    rules = data.QC(max_cells_per_sample=9)
    return dataclasses.replace(chosen, sources=sources, qc=rules, prepare=data.Prepare(shard_cells=3, block_cells=2))


def contents(uri):
    """Hashes of every file but the record and the cost ledger, which hold times; no work folder, no temporary files are left."""
    names = [n for n in files.list_dir(uri) if n != "cost"]
    assert names == [
        "doublets.parquet", "dropped.parquet", "hashes.parquet", "index.parquet", "mapping.parquet", "near_duplicates.parquet",
        "near_hashes", "record.json", "shards", "vocabulary.parquet",
    ]  # fmt: skip
    paths = [f"{uri}/{n}" for n in names if n.endswith("parquet")] + [
        f"{uri}/shards/{n}" for n in files.list_dir(f"{uri}/shards")
    ]
    record = artifacts.require(uri, "corpus")
    return {Path(f).name: files.sha256(f) for f in paths} | {"counts": record.counts, "details": record.details}


def moved(settings, tmp_path, name):
    return dataclasses.replace(settings, output=str(tmp_path / name))


def parts(uri):
    """Finished part files under the work folder and shards."""
    return sum(1 for p in Path(uri).rglob("*.parquet") if not p.name.startswith("."))


def until(uri, number, alive):
    """Wait for so many parts while `alive()`; returns whether they came."""
    return killing.until(lambda: parts(uri), number, alive, patience=PATIENCE)


LOOP = """
import json, sys
from mixgf.config.parse import from_dict
from mixgf.config.run import Config
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
prepare.run(from_dict(Config, json.load(open(sys.argv[1]))), executor=LocalExecutor())
"""


def test_a_driver_killed_again_and_again_ends_with_the_bytes_of_one_never_killed(settings, tmp_path):
    expected = contents(prepare.run(moved(settings, tmp_path, "whole"), executor=LocalExecutor()))
    chosen = moved(settings, tmp_path, "killed")
    path, uri = tmp_path / "config.json", f"{chosen.output}/corpus"
    path.write_text(json.dumps(parse.to_dict(chosen)))
    rng = np.random.default_rng()
    kills, total = [], 3 * 23 + 20  # about as many parts as a whole run makes
    for number in np.sort(rng.integers(1, total, 4)).tolist():
        child = subprocess.Popen([sys.executable, "-c", LOOP, str(path)], stderr=subprocess.DEVNULL)
        if until(uri, number, lambda child=child: child.poll() is None):
            time.sleep(float(rng.uniform(0, 0.02)))  # in the middle of something
        child.kill()
        kills.append((number, child.wait()))
    assert any(code == -9 for _, code in kills), kills
    assert contents(prepare.run(chosen, executor=LocalExecutor())) == expected, kills


def overtaken(chosen, after):
    """An executor that another run of the same plan overtakes and finishes, after so many tasks over all passes."""
    left = [after]

    def run(tasks):
        for found in LocalExecutor().run(tasks):
            yield found
            left[0] -= 1
            if left[0] == 0:
                prepare.run(chosen, executor=LocalExecutor())

    return Through(run)


@pytest.mark.parametrize("after", [1, 3, 4, 20, 26, 27, 40, 50, 72])
def test_a_driver_that_another_one_overtakes_ends_well_with_the_same_bytes(settings, tmp_path, after):
    expected = contents(prepare.run(moved(settings, tmp_path, "whole"), executor=LocalExecutor()))
    chosen = moved(settings, tmp_path, "overtaken")
    assert contents(prepare.run(chosen, executor=overtaken(chosen, after))) == expected


def test_two_drivers_started_together_at_one_output_both_end_well_with_the_same_bytes(settings, tmp_path):
    expected = contents(prepare.run(moved(settings, tmp_path, "whole"), executor=LocalExecutor()))
    chosen = moved(settings, tmp_path, "together")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(parse.to_dict(chosen)))
    command = [sys.executable, "-c", LOOP, str(path)]
    drivers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [driver.communicate(timeout=PATIENCE)[1] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], "\n".join(said)
    assert contents(f"{chosen.output}/corpus") == expected


@pytest.mark.ray
def test_killed_ray_workers_change_nothing(settings, tmp_path, ray_local):
    expected = contents(prepare.run(moved(settings, tmp_path, "whole"), executor=LocalExecutor()))
    chosen = moved(settings, tmp_path, "killed")
    uri, rng = f"{chosen.output}/corpus", np.random.default_rng()
    moments = (int(rng.integers(2, 30)), int(rng.integers(31, 70)))
    with killing.workers_killed(moments, lambda *moment: until(uri, *moment), "ray::attempt", "ray::Read") as killed:
        prepare.run(chosen)
    assert contents(uri) == expected, killed


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_ray_driver_and_a_lost_node_change_nothing(settings, tmp_path):
    """First the driver of a local Ray dies with all it started, then the run goes on over three nodes, of which one is lost."""
    expected = contents(prepare.run(moved(settings, tmp_path, "whole"), executor=LocalExecutor()))
    chosen = moved(settings, tmp_path, "killed")
    path, uri = tmp_path / "config.json", f"{chosen.output}/corpus"
    path.write_text(json.dumps(parse.to_dict(chosen)))
    driver = subprocess.Popen(
        [sys.executable, "-m", "mixgf", "prepare", "--config", str(path)], stderr=subprocess.DEVNULL
    )
    assert until(uri, 20, lambda: driver.poll() is None)
    driver.kill()
    assert driver.wait() == -9
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '{"nodes": 2}' in done.stdout, done.stdout[-3000:]  # amid what Ray prints of the loss
    assert contents(uri) == expected


def main(path):
    """Prepare on a cluster that loses a node."""
    chosen = parse.from_dict(run.Config, json.loads(Path(path).read_text()))
    killing.run_with_a_lost_node(
        lambda: prepare.run(chosen), lambda: until(f"{chosen.output}/corpus", 40, lambda: True)
    )


if __name__ == "__main__":
    main(sys.argv[1])
