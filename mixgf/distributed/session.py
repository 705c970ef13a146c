"""One Ray session for a run: the cluster of RAY_ADDRESS, or a quiet local Ray in this process.

A local Ray is closed: its ports are bound to 127.0.0.1, calls need a token that only this process and its workers have, and
its dashboard is off.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._private import ray_constants, utils
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

from mixgf import termination
from mixgf.config.run import Config
from mixgf.console import say, warn
from mixgf.errors import UserError

# before ray is imported: settings are read once
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2", "1")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180")  # Ray gives a busy laptop 60
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

_QUIET = ("ray", "ray.train", "ray.data", "ray.tune", "ray.serve")
CONNECT_SECONDS = 20.0
"""Longest wait for the cluster of RAY_ADDRESS to answer."""
OBJECT_STORE_BYTES = 256 << 20
"""Of a local Ray: counts never travel through the object store, so a small one does."""


@contextlib.contextmanager
def session(config: Config) -> Iterator[None]:
    """Connect to Ray for the time of a stage; inside another session, do nothing."""
    if ray.is_initialized():
        yield
        return
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    try:
        # amid its start, Ray cannot be ended: the process would abort in Ray's own code
        with termination.deferred(), _without_handler_of_ray():
            if address := os.environ.get("RAY_ADDRESS"):
                _connect(address)
                say(f"ray: cluster at {ray.get_runtime_context().gcs_address}, {cpus():g} CPUs, {gpus():g} GPUs")
            else:
                # pools and training workers are sized by the config, so a laptop with fewer cores than workers still runs
                wanted = max(os.cpu_count() or 1, int(config.compute.num_workers * config.compute.cpus_per_worker) + 1)
                _start(wanted, config.train.threads)
        termination.renew()
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _without_handler_of_ray() -> Iterator[None]:
    """`ray.init` begins with a handler of SIGTERM of its own; here it leaves that of a command, where there is one."""
    if not termination.is_installed():
        yield
        return
    theirs = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs


SOCKET_BYTES = 107 - len("/ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store")
"""Longest path of a temporary folder: Linux takes names of sockets up to 107 bytes, and Ray adds these to the folder."""


def own_folder() -> str | None:
    """A folder for the files of a local Ray, where the usual one cannot serve; None = the usual one.

    The usual one is shared: Ray makes `ray` in it for all users of the machine. It cannot serve where its path is too long, or where
    that `ray` belongs to another user and cannot be written.

    Raises:
        UserError: no other folder can be written.
    """
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    long = len(os.fsencode(usual)) > SOCKET_BYTES
    if not long and _can_hold_ray(usual):
        return None
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.access(folder, os.W_OK | os.X_OK):
            return tempfile.mkdtemp(prefix="mixgf-ray-", dir=folder)
    what = (
        f"TMPDIR = {usual!r}: {len(os.fsencode(usual))} bytes; Ray's sockets need a temporary folder of at most {SOCKET_BYTES}"
        if long
        else f"{usual}/ray: cannot be written (of another user?), and Ray puts its files there"
    )
    msg = f"{what}; set RAY_TMPDIR to a short one that can be written"
    raise UserError(msg)


def _can_hold_ray(folder: str) -> bool:
    """Whether Ray can make its session in `folder`/ray."""
    shared = Path(folder, "ray")
    place = shared if shared.exists() or shared.is_symlink() else Path(folder)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _connect(address: str) -> None:
    """Connect to the cluster of RAY_ADDRESS.

    Raises:
        UserError: None answers there, or it does not take the token.
    """
    host, _, port = address.rpartition("://")[2].strip("/").rpartition(":")
    way_out = "start the cluster, correct the address, or unset RAY_ADDRESS to run on this machine"
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            msg = f"RAY_ADDRESS = {address}: nothing answers there ({error}); {way_out}"
            raise UserError(msg) from None
    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
    except ray.exceptions.AuthenticationError as error:
        first = str(error).strip().split("\n")[0][:200]
        msg = f"RAY_ADDRESS = {address}: {first}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token"
        raise UserError(msg) from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0][:200]
        msg = f"RAY_ADDRESS = {address}: {first}; {way_out}. A cluster with a token needs RAY_AUTH_MODE and RAY_AUTH_TOKEN"
        raise UserError(msg) from None


def _start(num_cpus: int, threads: int) -> None:
    """Start a local Ray; a machine so busy that it takes more than Ray's 30 seconds gets two more chances.

    Workers inherit this process' environment: a runtime environment would give every one a second start.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    folder = own_folder()
    if folder is not None:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _require_token()
    for chance in (2, 1, 0):
        try:
            with _on_loopback():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    logging_level="ERROR",
                    log_to_driver=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                )
        except Exception as error:
            if not chance or "timed out during startup" not in str(error):
                raise
            warn("ray: slow to start, trying again")
            ray.shutdown()
        else:
            return


def _require_token() -> None:
    """Turn Ray's authentication on, with a token of this process, unless RAY_AUTH_MODE says otherwise.

    The token lies in the environment alone. Without it there, Ray would write one into the home folder.
    """
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    RayConfig.initialize("")  # the mode was read when Ray was imported


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a Ray that starts meanwhile bind its ports to 127.0.0.1, as it does on macOS. Its processes inherit the variable."""
    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(variable)
    os.environ[variable], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if given is None:
            del os.environ[variable]
        else:
            os.environ[variable] = given


def cpus() -> float:
    """CPUs of the cluster."""
    return float(ray.cluster_resources().get("CPU", 0))


def gpus() -> float:
    """GPUs of the cluster."""
    return float(ray.cluster_resources().get("GPU", 0))


def require_gpus(wanted: float) -> None:
    """Check that a Ray which this process started has the GPUs that one worker asks for; a cluster may still grow.

    Args:
        wanted: `compute.gpus_per_worker`.

    Raises:
        UserError: it has fewer; a worker would wait for ever.
    """
    if wanted > 0 and not os.environ.get("RAY_ADDRESS") and gpus() < wanted:
        msg = (
            f"compute.gpus_per_worker = {wanted:g}: Ray finds {gpus():g} GPUs on this machine; set compute.gpus_per_worker=0 "
            f"to compute on the CPU, or RAY_ADDRESS to a cluster with GPUs"
        )
        raise UserError(msg)
