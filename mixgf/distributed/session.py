"""One Ray session for a run: the cluster of RAY_ADDRESS, or a quiet local Ray in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import ray

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
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a local Ray is private to this process

_QUIET = ("ray", "ray.train", "ray.data", "ray.tune", "ray.serve")
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
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="ERROR", log_to_driver=False)
        say(f"ray: cluster at {ray.get_runtime_context().gcs_address}, {cpus():g} CPUs, {gpus():g} GPUs")
    else:
        # pools and training workers are sized by the config, so a laptop with fewer cores than workers still runs
        wanted = max(os.cpu_count() or 1, int(config.compute.num_workers * config.compute.cpus_per_worker) + 1)
        _start(wanted, config.train.threads)
    termination.renew()
    try:
        yield
    finally:
        ray.shutdown()


def _start(num_cpus: int, threads: int) -> None:
    """Start a local Ray; a machine so busy that it takes more than Ray's 30 seconds gets two more chances.

    Workers inherit this process' environment: a runtime environment would give every one a second start.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    for chance in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )
        except Exception as error:
            if not chance or "timed out during startup" not in str(error):
                raise
            warn("ray: slow to start, trying again")
            ray.shutdown()
        else:
            return


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
