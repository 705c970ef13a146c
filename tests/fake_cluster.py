"""Clusters that change, in one machine: Ray's own, and Ray's autoscaler with its fake multi-node provider."""

import contextlib
import json
import threading
import time

import psutil
import pytest
from processes import free_port

PATIENCE = 500
"""Seconds that a busy machine may take for what is waited for."""
STORE = {"object_store_memory": 100 << 20}
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 10,
    "gcs_rpc_server_reconnect_timeout_s": 10,
}  # fmt: skip


@contextlib.contextmanager
def cluster(**head):
    """A cluster whose head offers no CPUs; nothing that it started outlives it."""
    from ray.cluster_utils import Cluster

    before = set(psutil.Process().children(recursive=True))
    node = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH, **STORE, **head}
    made = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield made
    finally:
        started = set(psutil.Process().children(recursive=True)) - before
        made.shutdown()
        for process in started:  # nodes that an autoscaler started, should any be left: they survive their head
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def workers(made):
    """Nodes for work that are up, as Ray says."""
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in made.global_state.node_table())


def until(condition, what):
    """Wait for something to hold; returns what it was."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if found := condition():
            return found
        time.sleep(0.02)
    pytest.fail(f"{what} did not come")


@contextlib.contextmanager
def autoscaled(folder, monkeypatch, *, most):
    """A cluster that has no nodes for work and starts some (of one CPU) on demand; with its sizes as they come, to be looked at."""
    import ray

    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")  # the provider asks for it
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    port = free_port()
    scaling = {  # `ray.cluster_utils.AutoscalingCluster` opens an example file that Ray's wheel lacks, and stops all Ray of the machine
        "cluster_name": "fake", "max_workers": most, "idle_timeout_minutes": 0.1, "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode", "gcs_address": f"{ray.util.get_node_ip_address()}:{port}", "use_node_id_as_ip": True,
            "disable_node_updaters": True, "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},  # the provider's own name for it
            "worker": {"resources": {"CPU": 1, **STORE}, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in (
            "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
            "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
        )},
        "file_mounts_sync_continuously": False,
    }  # fmt: skip
    path = folder / "scaling.json"
    path.write_text(json.dumps(scaling))
    with cluster(gcs_server_port=port, autoscaling_config=str(path)) as made:
        sizes, over = [workers(made)], threading.Event()

        def watch():
            while not over.is_set():
                if (now := workers(made)) != sizes[-1]:
                    sizes.append(now)
                over.wait(0.1)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield made, sizes
        finally:
            over.set()
            thread.join()


def assert_up_and_down(sizes, *, most):
    """From no nodes up to so many and back, without a step aside."""
    top = sizes.index(max(sizes))
    assert (sizes[0], sizes[top], sizes[-1]) == (0, most, 0), sizes
    assert sizes == sorted(sizes[:top]) + sorted(sizes[top:], reverse=True), sizes
