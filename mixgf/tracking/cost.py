"""Cost of a run: node-seconds by node type, times a price table.

Every session of a run (one per submission, killed ones included) adds a file of node-seconds under `cost/` of its artifact. The
cost is their sum. The user gives the prices. Without a price for a used node type there is no total, only node-hours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixgf.config.run import Config
from mixgf.console import warn
from mixgf.errors import UserError
from mixgf.storage import files
from mixgf.storage.sealed import read_sealed, write_sealed

HOUR = 3600.0
LOCAL = "local"
"""Node type of a run without Ray."""


def merge(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Node-seconds of several sessions, summed by node type and sorted by it."""
    total: dict[str, float] = {}
    for part in parts:
        for node_type, seconds in part.items():
            total[node_type] = total.get(node_type, 0.0) + seconds
    return dict(sorted(total.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """Node-seconds of a run, its prices, and the work done."""

    seconds: dict[str, float]
    """Node type to seconds, summed over nodes."""
    prices: dict[str, float] = field(default_factory=dict)
    """Node type to price of one node for one hour, in the price table's currency."""
    cells: float = 0.0
    """Cells processed; 0 if the stage does not count them. The same holds for the fields below."""
    epochs: float = 0.0
    genes: float = 0.0
    """Perturbations scored: genes times operations."""

    @property
    def unpriced(self) -> list[str]:
        """Used node types without a price."""
        return [t for t, s in self.seconds.items() if s > 0 and t not in self.prices]

    @property
    def total(self) -> float | None:
        """The total price; None if a price is missing."""
        if self.unpriced:
            return None
        return sum(s / HOUR * self.prices[t] for t, s in self.seconds.items() if s > 0)

    def figures(self) -> dict[str, float]:
        """Numbers by name for MLflow and the report: node-hours, and prices where they are known."""
        out = {f"cost/node_hours/{node_type}": seconds / HOUR for node_type, seconds in self.seconds.items()}
        total = self.total
        if total is None:
            return out
        out["cost/total"] = total
        for name, amount in (("million_cells", self.cells / 1e6), ("epoch", self.epochs), ("gene", self.genes)):
            if amount > 0:
                out[f"cost/per_{name}"] = total / amount
        return out


def prices(config: Config) -> dict[str, float]:
    """The price table of `tracking.prices`, or else of MIXGF_PRICES; empty if neither is set."""
    uri = config.tracking.prices or os.environ.get("MIXGF_PRICES", "")
    return load_prices(uri) if uri else {}


def load_prices(uri: str) -> dict[str, float]:
    """Read a price table: a JSON object, node type to price per node-hour.

    Raises:
        UserError: The file is missing, or no such object.
    """
    if not files.exists(uri):
        msg = f"tracking.prices = {uri!r}: no such file; give a JSON object, node type to price per node-hour"
        raise UserError(msg)
    try:
        data: Any = files.read_json(uri)
    except ValueError as error:
        msg = f"tracking.prices = {uri!r}: not JSON ({error}); give an object, node type to price per node-hour"
        raise UserError(msg) from None
    if not isinstance(data, dict):
        msg = f"tracking.prices = {uri!r}: must be a JSON object, node type to price per node-hour"
        raise UserError(msg)
    for node_type, price in data.items():
        if isinstance(price, bool) or not isinstance(price, (int, float)) or not 0 <= price < float("inf"):
            msg = (
                f"tracking.prices: {node_type} = {price!r}: must be a number of at least 0, the price of one node-hour"
            )
            raise UserError(msg)
    return {node_type: float(price) for node_type, price in data.items()}


def save(uri: str, session: str, seconds: Mapping[str, float]) -> None:
    """Write a session's node-seconds so far under its artifact; a later call replaces an earlier one."""
    write_sealed(files.join(uri, "cost", f"{session}.json"), dict(seconds))


def load(uri: str, *, without: str = "") -> dict[str, float]:
    """Node-seconds of all sessions of an artifact, except the session `without` and those whose file is damaged."""
    folder, found = files.join(uri, "cost"), list[dict[str, float]]()
    for name in files.list_dir(folder):
        if name.endswith(".json") and name != f"{without}.json":
            try:
                found.append(read_sealed(files.join(folder, name)))
            except UserError as error:
                warn(f"{error}. The cost of this session is not counted")
    return merge(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """Expected time and cost of an amount of work."""

    hours: float
    """Wall time."""
    node_hours: float
    cost: float | None
    """In the price table's currency; None without a price."""


def project(amount: float, *, rate: float, num_nodes: int, price: float | None = None) -> Projection:
    """Scale a measured rate to an amount of work.

    Args:
        amount: Of work, for example cells.
        rate: Measured for one node, per second.
        num_nodes: Nodes that share the work; the rate is assumed to scale with them.
        price: Of one node-hour.
    """
    assert rate > 0, f"rate {rate}: must be above 0"
    assert num_nodes >= 1, f"{num_nodes} nodes: must be at least 1"
    node_hours = amount / rate / HOUR
    return Projection(
        hours=node_hours / num_nodes, node_hours=node_hours, cost=None if price is None else node_hours * price
    )


class Spend:
    """Worker time of a run, over all sessions, against its budget.

    Args:
        limit: Worker-seconds; 0 = no limit.
        before: Worker-seconds of earlier sessions.
        num_workers: Returns the present number of workers.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        limit: float,
        *,
        before: float = 0.0,
        num_workers: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit, self.before, self.session = limit, before, 0.0
        self.num_finished = 0
        self.num_workers, self._clock, self._at = num_workers, clock, clock()

    @property
    def total(self) -> float:
        """Worker-seconds of all sessions so far."""
        return self.before + self.session

    def update(self, *, finished: int = 0) -> None:
        """Add the time since the last call.

        Args:
            finished: Work units that were finished in it.
        """
        now = self._clock()
        self.session += (now - self._at) * self.num_workers()
        self._at = now
        self.num_finished += finished

    def enough(self, in_hand: int) -> bool:
        """Whether the units in progress will use up the budget, at the mean time of a unit so far.

        Args:
            in_hand: Units in progress.
        """
        if not self.limit:
            return False
        self.update()
        mean = self.session / self.num_finished if self.num_finished else 0.0
        return self.total + mean * (in_hand + 1) > self.limit
