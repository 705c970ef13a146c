"""SIGKILL to a stage that runs on Ray: its workers, and a node. Tests compare the output with that of a run never killed."""

import contextlib
import json
import os
import sys
import threading
import time

import numpy as np
import psutil
from fake_cluster import STORE, cluster


def until(made, number, alive, *, patience):
    """Wait for at most `patience` seconds, while `alive()`, until `made()` is as large as `number`; returns whether it is."""
    give_up = time.monotonic() + patience
    while alive() and time.monotonic() < give_up:
        if made() >= number:
            return True
        time.sleep(0.002)
    return False


def workers(parent, *titles):
    """The live Ray workers under a process that have one of the titles (`ray::Read`), by process id."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            said = [process.name(), *process.cmdline()]
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if any(title in part for title in titles for part in said):
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


@contextlib.contextmanager
def workers_killed(moments, wait, *titles):
    """Kill one Ray worker of this process at each of `moments`, in a thread beside the body of `with`.

    `wait(moment, alive)` returns when the moment has come, or when `alive()` is false: the body has ended. The body must
    last until a worker was killed.
    """
    rng, killed, over = np.random.default_rng(), [], threading.Event()

    def kill():
        for moment in moments:
            wait(moment, lambda: not over.is_set())
            while not over.is_set():
                if victims := workers(os.getpid(), *titles):
                    victims[int(rng.integers(len(victims)))].kill()
                    killed.append(moment)
                    break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
    assert killed


def run_with_a_lost_node(work, wait):
    """Call `work()` on a head without CPUs and two nodes, of which one is killed when `wait()` is over; prints how many nodes are left."""
    import ray

    with cluster() as made:
        nodes = [made.add_node(num_cpus=1, **STORE) for _ in range(2)]
        ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)

        def lose():
            wait()
            made.remove_node(nodes[1], allow_graceful=False)

        thread = threading.Thread(target=lose)
        thread.start()
        work()
        thread.join()
        sys.stdout.write(json.dumps({"nodes": sum(n["Alive"] for n in ray.nodes())}) + "\n")
        sys.stdout.flush()
        ray.shutdown()
