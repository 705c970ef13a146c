"""Servers that tests start."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request


def die_with_us(command):
    """The same command, killed by the kernel when this process ends, whatever ends it (where `setpriv` is there)."""
    return ["setpriv", "--pdeathsig", "KILL", *command] if shutil.which("setpriv") else command


def free_port():
    """A port on loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def mlflow_server(folder):
    """URL of MLflow's own server: a process with SQLite in a folder, real HTTP on loopback."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", f"{folder}/files", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("w") as out:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight more processes
        process = subprocess.Popen(die_with_us(command), env=environment, stdout=out, stderr=out)
    try:
        give_up = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < give_up
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def without_logging_errors(text: str) -> str:
    """What was printed, without what Python's logging says where a handler's stream is closed, as one of an earlier test may be."""
    return re.sub(r"--- Logging error ---\n.*?\nArguments: [^\n]*\n", "", text, flags=re.DOTALL)
