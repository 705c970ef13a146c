"""Groups of workers for tests: a test file runs itself as a script, which imports torch once and forks the workers."""

import json
import os
import subprocess
import sys
from pathlib import Path


def run_script(file, spec):
    """What a test file prints as a script with `spec` (JSON) as its argument; the test fails if the script does."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, file, json.dumps(spec)], env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def fork_workers(size, work, name):
    """Fork a group, in which each worker calls `work(rank)`, and wait for it; exit codes by rank (negative: the signal)."""
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                work(rank)
                status = 0
            except Exception as error:  # noqa: BLE001 (of the survivors of a group)
                sys.stderr.write(f"{name} {rank} {error!r}\n")
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
