"""Fixtures shared by the tests: a session-wide local Ray, and nothing that could reach a running cluster."""

import os

os.environ.update(
    RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", MLFLOW_DISABLE_TELEMETRY="true"
)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest


@pytest.fixture(scope="session")
def ray_local():
    """One local Ray with 4 logical CPUs for the whole test session."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=f"/tmp/rt{os.getpid()}",
    )
    yield ray
    ray.shutdown()
