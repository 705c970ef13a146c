"""A perturbation on clusters that change: nodes that come and go with the work, and SIGKILL to whatever can be killed.

The file is its own driver, `python tests/stages/test_killed_perturb.py CONFIG FOLDER`, as it would be submitted: its workers leave a mark
in FOLDER when they load the model (`built-`) and for every part they make (`made-`), and may be told to wait (`Work`), so that
what is killed is killed in the middle, on a machine of any speed.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from fake_cluster import PATIENCE, STORE, assert_up_and_down, autoscaled, cluster, until, workers
from processes import die_with_us

from mixgf.config import data, parse, perturbation, run, training
from mixgf.execution import LocalExecutor
from mixgf.perturbation.scoring_tasks import ScoringWorker
from mixgf.stages import perturb
from mixgf.storage import artifacts, files
from mixgf.storage.tables import read_table, write_table

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]
FIRST = ("states-", "twin-states-", "counts-")
"""Begin of the keys of parts that come before the genes'."""
ROW = training.Model(num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_positions=20, init_sd=0.3)
NUM_CELLS = 40


@pytest.fixture(scope="module")
def settings(make_corpus, tmp_path_factory, tracking_uri):
    """A corpus with four donors, an untrained checkpoint on it, and 2 operations x 4 blocks of cells x 4 of genes to do."""
    import invented

    folder = tmp_path_factory.mktemp("inputs")
    corpus = Path(
        make_corpus(np.random.default_rng(1).integers(6, 18, NUM_CELLS), [0] * NUM_CELLS, [NUM_CELLS], genes=24)
    )
    corpus = corpus.rename(folder / "corpus")
    shard = f"{corpus}/shards/00000.parquet"
    donors = pa.array([f"d{c // 2 % 4}" for c in range(NUM_CELLS)])
    write_table(shard, read_table(shard).append_column("donor", donors))
    invented.record_shards(str(corpus))
    chosen = run.Config(
        output=str(folder),
        tokens=data.Tokens(max_len=20),
        tracking=run.Tracking(uri=tracking_uri),
        inputs=run.Inputs(corpus=str(corpus), checkpoint=str(folder / "pretrain")),
        perturb=perturbation.Perturb(
            start="cell_type == 'alpha'", goal="cell_type == 'beta'", max_cells=14, block_cells=4, block_genes=6,
            num_permutations=100,
        ),
        compute=run.Compute(num_workers=2),
    )  # fmt: skip
    invented.untrained_checkpoint(chosen, ROW)
    return chosen


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The parts and the table of genes of a run in one process, never interrupted."""
    return result(perturb.run(moved(settings, tmp_path_factory.mktemp("whole")), executor=LocalExecutor()))


def moved(settings, folder):
    return dataclasses.replace(settings, output=str(folder))


def result(uri):
    """Names of the parts, and the bytes of what is published."""
    record = artifacts.require(uri, "perturbation")
    parts = {name for name in files.list_dir(f"{uri}/{record.details['parts']}") if name != "cost"}
    tables = {name: files.read_bytes(f"{uri}/{name}") for name in ("genes.parquet", "states.parquet")}
    return parts, tables


class Work:
    """One run's submissions, as seen from outside: its marks, and its leave to go on."""

    def __init__(self, settings, folder):
        self.folder, self.drivers = folder, []
        self.folder.mkdir()
        self.path, self.log = self.folder / "config.json", self.folder / "log"
        self.path.write_text(json.dumps(parse.to_dict(settings)))
        self.leave(parts=10_000)

    def leave(self, *, parts, workers=1):
        """Let it make so many parts, those of `FIRST` not counted, as soon as there are so many workers."""
        self.parts, new = parts, self.folder / "leave.new"
        new.write_text(json.dumps({"parts": parts, "workers": workers}))
        new.rename(self.folder / "leave")

    def submit(self, address):
        """Start a driver on a cluster."""
        environment = os.environ | {"RAY_ADDRESS": address}
        command = die_with_us([sys.executable, __file__, self.path, self.folder])
        with self.log.open("a") as log:
            self.drivers.append(subprocess.Popen(command, stderr=log, env=environment))
        return self.drivers[-1]

    def end(self, process):
        """Wait for a driver's end; it must be a good one."""
        assert process.wait(PATIENCE) == 0, self.log.read_text()[-3000:]

    def made(self):
        """Part to the number of times that it was made."""
        return Counter(path.name.split("~")[1] for path in self.folder.glob("made~*"))

    def num_made(self):
        """Parts made, those of `FIRST` not counted."""
        return sum(number for key, number in self.made().items() if not key.startswith(FIRST))

    def built(self):
        """Process ids of the workers so far."""
        return {int(path.name.split("~")[1]) for path in self.folder.glob("built~*")}

    def alive(self):
        """Those that are there, in order."""
        return [pid for pid in sorted(self.built()) if psutil.pid_exists(pid)]

    def held(self, number):
        """Process ids of the workers, once there are so many, who have made what they may and wait for leave."""

        def seen():
            pids = self.alive()
            waits = all((self.folder / f"waits~{pid}").exists() for pid in pids)
            return pids if len(pids) == number and waits and self.num_made() >= self.parts else None

        return until(seen, f"{number} workers that have made {self.parts} parts and wait")

    def gone(self):
        """Wait until no worker is left."""
        until(lambda: not self.alive(), "the end of all workers")


@pytest.fixture
def work(settings, tmp_path):
    """A run at `run` of the test's folder, not submitted yet; no driver outlives the test."""
    made = Work(moved(settings, tmp_path / "run"), tmp_path / "marks")
    yield made
    for process in made.drivers:
        process.kill()
        process.wait()


def marking(folder):
    """The worker, with marks; a class of this call, so that it travels to the actors whole."""

    class Marking(ScoringWorker):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            (folder / f"built~{os.getpid()}~{time.time_ns()}").touch()

        def __call__(self, item):
            key, waits = item[0].key, folder / f"waits~{os.getpid()}"
            while not (key.startswith(FIRST) or self.allowed()):
                waits.touch()
                time.sleep(0.02)
            waits.unlink(missing_ok=True)
            done = super().__call__(item)
            (folder / f"made~{key}~{os.getpid()}~{time.time_ns()}").touch()
            return done

        def allowed(self):
            leave = json.loads((folder / "leave").read_text())
            made = [path for path in folder.glob("made~*") if not path.name.split("~")[1].startswith(FIRST)]
            return len(made) < leave["parts"] and len(list(folder.glob("built~*"))) >= leave["workers"]

    return Marking


def main(path, folder):
    """Run the stage of a config on the cluster of RAY_ADDRESS."""
    perturb.ScoringWorker = marking(Path(folder))
    perturb.run(parse.from_dict(run.Config, json.loads(Path(path).read_text())))


def test_the_pool_starts_from_no_nodes_grows_with_the_cluster_and_leaves_it_empty(work, whole, tmp_path, monkeypatch):
    """What an actor cannot be placed on is demand for a node."""
    with autoscaled(tmp_path, monkeypatch, most=2) as (made, sizes):
        work.leave(parts=10_000, workers=2)  # the first to come waits for the second
        work.end(work.submit(made.address))
        until(lambda: sizes[-1] == 0, "a cluster without nodes for work")
    assert_up_and_down(sizes, most=2)
    assert len(list(work.folder.glob("built~*"))) == 2  # one load of the model per actor
    assert result(f"{tmp_path}/run/perturb") == whole
    assert work.made() == Counter(name.removesuffix(".parquet") for name in whole[0])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_whatever_is_killed_only_what_is_missing_is_made_and_the_table_is_the_same(work, whole, tmp_path):
    """One run that loses a worker, a node, its driver and the head of the cluster, one after the other."""
    uri = f"{tmp_path}/run/perturb"
    with cluster() as made:
        nodes = [made.add_node(num_cpus=1, wait=False, **STORE) for _ in range(2)]
        work.leave(parts=4, workers=2)
        process = work.submit(made.address)
        psutil.Process(work.held(2)[0]).kill()
        work.leave(parts=10, workers=3)  # its successor has come
        work.held(2)
        made.remove_node(nodes[1], allow_graceful=False)
        work.leave(parts=14)  # by one worker
        work.held(1)
        until(lambda: workers(made) == 1, "Ray's word that a node is lost")
        made.add_node(num_cpus=1, wait=False, **STORE)
        work.leave(parts=18, workers=4)  # by two again
        work.held(2)
        assert process.poll() is None
        assert 18 <= work.num_made() <= 19

        process.kill()
        assert process.wait() == -9
        work.gone()
        assert artifacts.find(uri) is None
        work.leave(parts=24)
        process = work.submit(made.address)
        work.held(2)
        made.remove_node(made.head_node, allow_graceful=False)
        assert process.wait(PATIENCE) != 0
        assert artifacts.find(uri) is None
    work.gone()  # with their nodes: those outlive the head, and work that is left on them would do no harm
    assert 24 <= work.num_made() <= 25
    with cluster() as made:
        made.add_node(num_cpus=2, wait=False, **STORE)
        work.leave(parts=10_000)
        work.end(work.submit(made.address))
    assert result(uri) == whole
    assert work.made() == Counter(name.removesuffix(".parquet") for name in whole[0])  # each once, over all submissions


if __name__ == "__main__":
    main(*sys.argv[1:])
