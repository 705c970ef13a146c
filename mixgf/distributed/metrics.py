"""Live figures for Prometheus, through Ray: the stable names that boards and alerts are built on.

`METRICS` is the whole list; a name, once here, keeps its meaning. Ray exports `mixgf_x` as `ray_mixgf_x` (counters with
`_total`), one series per process, so boards add or take the maximum over processes. Every series carries `stage` and `run`
(MLflow's run id). Without Ray a call costs a dictionary lookup and does nothing; with it, about 3 microseconds.

`watch` is what a driver opens around its work: it samples the cluster's nodes, keeps the cost ledger beside the artifact
(`mixgf.tracking.cost`), and logs the bill to MLflow at the end.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mixgf.config.run import Config
from mixgf.console import warn
from mixgf.tracking import cost
from mixgf.tracking.mlflow_runs import Run

SAMPLE_SECONDS = 10.0
"""Between two looks at the cluster's nodes."""
SAVE_SECONDS = 60.0
"""Between two writes of the ledger: what a `kill -9` can take from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric: its meaning, unit and tags beyond `stage` and `run`."""

    name: str
    kind: str
    """`counter` (only grows within a process) or `gauge`."""
    text: str
    tags: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_mixgf_{self.name}" + ("_total" if self.kind == "counter" else "")


METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="cells_read", kind="counter", text="Source cells looked at."),
        Metric(name="cells_kept", kind="counter", text="Cells that passed quality control."),
        Metric(name="cells_dropped", kind="counter", text="Cells dropped, by reason.", tags=("reason",)),
        Metric(name="cells_encoded", kind="counter", text="Cells turned into sentences, vectors or predictions."),
        Metric(name="shards_written", kind="counter", text="Parquet shards published."),
        Metric(name="sentences_scored", kind="counter", text="Perturbed sentences run through the encoder."),
        Metric(name="units", kind="gauge", text="Work units: waiting, running, done, failed.", tags=("state",)),
        Metric(name="actors", kind="gauge", text="Actors that are up, and actors wanted.", tags=("state",)),
        Metric(name="train_step", kind="gauge", text="Optimizer steps done."),
        Metric(name="loss", kind="gauge", text="Loss and its terms at the latest logged step.", tags=("term",)),
        Metric(name="learning_rate", kind="gauge", text="Learning rate of the latest logged step."),
        Metric(name="grad_norm", kind="gauge", text="Norm of the gradient before clipping."),
        Metric(name="cells_per_second", kind="gauge", text="Cells trained on per second, all workers."),
        Metric(name="tokens_per_second", kind="gauge", text="Tokens trained on per second, padding not counted."),
        Metric(name="mfu", kind="gauge", text="Share of the measured peak FLOP/s, 0 to 1."),
        Metric(name="data_wait_share", kind="gauge", text="Share of the time spent waiting for data, 0 to 1."),
        Metric(name="memory_gigabytes", kind="gauge", text="Largest memory of a worker: its GPU's, or its own."),
        Metric(name="arm_score", kind="gauge", text="Score of an arm of a sweep, mean over seeds.", tags=("arm",)),
        Metric(name="arm_rungs", kind="gauge", text="Rungs that an arm of a sweep has passed.", tags=("arm",)),
        Metric(name="nodes", kind="gauge", text="Nodes of the cluster, by type.", tags=("node_type",)),
        Metric(name="node_seconds", kind="gauge", text="Node-seconds of the run so far.", tags=("node_type",)),
        Metric(name="cost", kind="gauge", text="Cost of the run so far, in the price table's currency."),
    )
}
UNIT_STATES = ("waiting", "running", "done", "failed")
_FIGURES = {
    "lr": "learning_rate",
    "grad_norm": "grad_norm",
    "cells_per_s": "cells_per_second",
    "tokens_per_s": "tokens_per_second",
    "mfu": "mfu",
    "wait_share": "data_wait_share",
    "memory_gb": "memory_gigabytes",
}
"""Figures of the training loop with a metric of their own; all others are terms of the loss."""

SHOWN = ("loss", "mlm", "contrast", "cells_per_s")
"""Figures of the training loop that a progress line shows."""

_made: dict[str, Any] = {}


def _metric(name: str) -> Any | None:
    """Ray's metric object of this process; None where there is no Ray."""
    assert name in METRICS, f"metric {name!r}: not in METRICS"
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    if name not in _made:
        from ray.util import metrics

        row = METRICS[name]
        kind = metrics.Counter if row.kind == "counter" else metrics.Gauge
        _made[name] = kind(f"mixgf_{name}", row.text, tag_keys=("stage", "run", *row.tags))
    return _made[name]


@dataclass(frozen=True, slots=True)
class Meter:
    """Records metrics of one run of one stage; small, and safe to send to workers."""

    stage: str
    run: str

    def add(self, name: str, amount: float = 1.0, **tags: str) -> None:
        """Add to a counter."""
        metric = _metric(name)
        assert METRICS[name].kind == "counter", f"metric {name!r}: a gauge is set, not added to"
        if metric is not None and amount > 0:
            metric.inc(amount, {"stage": self.stage, "run": self.run, **tags})

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        metric = _metric(name)
        assert METRICS[name].kind == "gauge", f"metric {name!r}: a counter is added to, not set"
        if metric is not None:
            metric.set(float(value), {"stage": self.stage, "run": self.run, **tags})

    def units(self, *, waiting: int = 0, running: int = 0, done: int = 0, failed: int = 0) -> None:
        """The state of a stage's work units, all four at once."""
        for state, number in zip(UNIT_STATES, (waiting, running, done, failed), strict=True):
            self.set("units", number, state=state)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one training step, by the training loop's names (`train.Context.report`)."""
        self.set("train_step", step)
        for name, value in figures.items():
            if name in _FIGURES:
                self.set(_FIGURES[name], value)
            else:
                self.set("loss", value, term=name)


class Board:
    """What the workers of a training tell their driver: the latest figures, and an error that ends the training.

    It lives in an actor, and in this module so that the actor does not import torch. An actor that is lost is started again, empty:
    `born` is then another text.
    """

    def __init__(self) -> None:
        self.born = uuid.uuid4().hex
        self.step, self.figures, self.error, self.stopping = 0, dict[str, float](), "", False
        self.recovered, self.committed = list[Any](), list[Any]()

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step."""
        self.step, self.figures = step, figures

    def fail(self, error: str) -> None:
        """An error that another start of the workers would meet again."""
        self.error = error

    def stop(self) -> None:
        """Ask the workers to end."""
        self.stopping = True

    def is_stopping(self) -> bool:
        """Whether the workers are to end."""
        return self.stopping

    def commit(self, rows: list[Any]) -> str:
        """Rows of the training's metrics, each once; returns `born`."""
        self.committed += rows
        return self.born

    def recover(self, rows: list[Any]) -> str:
        """Rows up to the checkpoint that the training goes on from; some may not have been committed. Returns `born`."""
        self.recovered += rows
        return self.born

    def take(self) -> tuple[list[Any], list[Any]]:
        """Rows recovered and committed since the last call."""
        rows = self.recovered, self.committed
        self.recovered, self.committed = [], []
        return rows

    def read(self) -> tuple[int, dict[str, float], str]:
        """Step, figures, error."""
        return self.step, self.figures, self.error


def node_type(node: Mapping[str, Any]) -> str:
    """The node type of a row of `ray.nodes()`: its label, its node group, its accelerator, or `cpu`.

    The launcher files set the label `mixgf.io/node-type`; KubeRay names the group; so does RAY_NODE_TYPE_NAME at `ray start`.
    """
    labels = node.get("Labels") or {}
    for key in ("mixgf.io/node-type", "ray.io/node-group"):
        if labels.get(key):
            return str(labels[key])
    for name in node.get("Resources") or {}:
        if name.startswith("accelerator_type:"):
            return str(name.removeprefix("accelerator_type:"))
    return "cpu"


def _nodes() -> dict[str, int]:
    """Live nodes by type."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {cost.LOCAL: 1}
    counts: dict[str, int] = {}
    for node in ray.nodes():
        if node["Alive"]:
            counts[node_type(node)] = counts.get(node_type(node), 0) + 1
    return counts


@dataclass
class Watch:
    """The cost ledger of one session of a stage. All nodes of the cluster are charged to the run while it is open."""

    meter: Meter
    uri: str
    prices: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    """Node-seconds of this session."""
    _before: dict[str, float] = field(default_factory=dict)
    _made: dict[str, float] = field(default_factory=dict)
    _session: str = field(default_factory=lambda: f"{time.time_ns() // 1_000_000:015d}")
    _sampled: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)

    def made(self, *, cells: float = 0.0, epochs: float = 0.0, genes: float = 0.0) -> None:
        """Say what the stage made in all, so that the bill can be divided by it."""
        self._made = {"cells": float(cells), "epochs": float(epochs), "genes": float(genes)}

    def bill(self) -> cost.Bill:
        """All sessions of the run so far."""
        return cost.Bill(seconds=cost.merge([self._before, self.seconds]), prices=self.prices, **self._made)

    def sample(self) -> None:
        """Charge the time since the last sample to the nodes that are up now."""
        counts, now = _nodes(), time.monotonic()
        spent, self._sampled = now - self._sampled, now
        self.seconds = cost.merge([self.seconds, {name: number * spent for name, number in counts.items()}])
        bill = self.bill()
        for name, seconds in bill.seconds.items():
            self.meter.set("nodes", counts.get(name, 0), node_type=name)
            self.meter.set("node_seconds", seconds, node_type=name)
        if bill.prices and bill.total is not None:
            self.meter.set("cost", bill.total)
        if now - self._saved >= SAVE_SECONDS:
            self.save()

    def sample_safely(self) -> None:
        """`sample`, except that a cluster that cannot be asked is a warning: the ledger must not stop the run it counts for."""
        try:
            self.sample()
        except Exception as error:  # noqa: BLE001 (see above)
            warn(f"cost ledger: {type(error).__name__}: {error}")

    def save(self) -> None:
        """Write this session's ledger."""
        self._saved = time.monotonic()
        cost.save(self.uri, self._session, self.seconds)


@contextlib.contextmanager
def watch(config: Config, stage: str, tracked: Run, uri: str, *, every: float = SAMPLE_SECONDS) -> Iterator[Watch]:
    """Meter a stage while it works, and put its bill into MLflow when it ends, well or not.

    Args:
        config: for the price table (`tracking.prices`).
        stage: its name, the `stage` tag.
        tracked: its MLflow run.
        uri: the artifact it makes; the ledger is kept in its folder `cost`.
        every: seconds between two samples.
    """
    watched = Watch(Meter(stage, tracked.id), uri, cost.prices(config), _before=cost.load(uri))
    if watched.prices and (missing := replace(watched.bill(), seconds=dict.fromkeys(_nodes(), 1.0)).unpriced):
        warn(
            f"tracking.prices: no price for node type {', '.join(missing)}; the cost stays unknown, node-hours are kept"
        )
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(every):
            watched.sample_safely()

    thread = threading.Thread(target=loop, name="mixgf-cost", daemon=True)
    thread.start()
    try:
        watched.sample_safely()
        yield watched
    finally:
        stop.set()
        thread.join()
        watched.sample_safely()
        watched.save()
        tracked.log(watched.bill().figures())
