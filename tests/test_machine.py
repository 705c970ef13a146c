"""A full disk, too few file handles, a cluster that is gone: one line with the way out, and the same command continues."""

import json
import os
import subprocess
import sys

import pytest
from processes import free_port

from mixgf.config.parse import to_dict
from mixgf.errors import machine_fault
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import files

LIMITED = """
import json, resource, sys
from mixgf import cli
from mixgf.config.parse import from_dict
from mixgf.config.run import Config
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
import mixgf.corpus.prepare_passes, mixgf.cells.open, anndata, mixgf.distributed.pipelines
what, limit = sys.argv[2], int(sys.argv[3])
config = from_dict(Config, json.load(open(sys.argv[1])))
kind = {"size": resource.RLIMIT_FSIZE, "handles": resource.RLIMIT_NOFILE}[what]
before = resource.getrlimit(kind)
resource.setrlimit(kind, (limit, before[1]))
try:
    prepare.run(config, executor=LocalExecutor())
except Exception as error:
    resource.setrlimit(kind, before)
    code, line = cli._explain(error)
    print(line, file=sys.stderr)
    sys.exit(code)
"""


def shards_of(uri):
    return {name: files.sha256(f"{uri}/shards/{name}") for name in files.list_dir(f"{uri}/shards")}


@pytest.mark.parametrize(
    ("what", "limits", "line"),
    [("size", (0, 200, 900, 3_000), "files may not be larger"), ("handles", (3, 5, 7), "too many open files")],
)
def test_a_limit_of_the_machine_is_one_line_and_costs_nothing(world, tmp_path, what, limits, line):
    import dataclasses

    config, _ = world
    config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri="off"))
    whole = prepare.run(dataclasses.replace(config, output=str(tmp_path / "whole")), executor=LocalExecutor())
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "config.json"), what]
    for limit in limits:
        done = subprocess.run([*command, str(limit)], capture_output=True, text=True, check=False, timeout=120)
        told = [text for text in done.stderr.splitlines() if text.startswith("mixgf: ")]
        assert done.returncode == 1, done.stderr
        assert len(told) == 1
        assert line in told[0]
        if what == "size":
            assert told[0].startswith(f"mixgf: {config.output}/")  # the file that could not be written
        assert "the same command continues" in told[0]
        assert "Traceback" not in done.stderr
    assert shards_of(prepare.run(config, executor=LocalExecutor())) == shards_of(whole)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/x/y"), "/x/y: no space left; free some"),
        (
            OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')"),
            "no space",
        ),
        (OSError(24, "Too many open files"), r"too many open files; raise the limit \(ulimit -n 4096\)"),
        (OSError(122, "Disk quota exceeded", "a"), "a: the quota of the disk is used up"),
        (RuntimeError("database or disk: No space left on device"), "no space left"),
    ],
)
def test_faults_of_the_machine_are_known_through_the_errors_of_libraries(error, line):
    import re

    wrapped = RuntimeError("x")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        assert re.search(line, machine_fault(one))
    assert machine_fault(OSError(2, "No such file or directory")) == machine_fault(ValueError("x")) == ""


def test_a_dead_ray_address_is_one_line(tmp_path, world):
    port = free_port()
    config, _ = world
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "no.such.host.invalid:6379"):
        # a process of its own: in this one, another test may have started Ray
        done = subprocess.run(
            [sys.executable, "-m", "mixgf", "prepare", "--config", tmp_path / "config.json", "--set", "tracking.uri=off"],
            env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
        assert done.returncode == 2
        told = [line for line in done.stderr.splitlines() if line.startswith("mixgf: ")]
        assert len(told) == 1
        assert f"RAY_ADDRESS = {address}: nothing answers there" in told[0]
        assert "unset RAY_ADDRESS" in told[0]
