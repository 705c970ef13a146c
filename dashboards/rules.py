"""The alert rules as data."""

from __future__ import annotations

from typing import Any

from panels import pick

COST_LIMIT = 1000
"""Default limit of the cost alert, in the currency of the price table; `build.py --cost-limit` changes it."""
RUNBOOK = "cluster/README.md"
"""The document whose sections the alerts refer to."""


def _all(name: str, **tags: str) -> str:
    """Selector of a metric over all runs: `pick` without the variables of dashboards."""
    return pick(name, **tags).replace('run=~"$run",', "").replace('{run=~"$run"}', "")


def alerts(cost_limit: float = COST_LIMIT) -> dict[str, Any]:
    """The alert rules as plain data."""
    done, waiting = _all("units", state="done"), _all("units", state="~waiting|running")
    rows = [
        (
            "MixgfNoProgress",
            f"sum by (stage, run) ({waiting}) > 0 unless on (stage, run) sum by (stage, run) (changes({done}[30m])) > 0",
            "30m",
            "critical",
            "{{ $labels.stage }} has work units left and finished none for 30 minutes",
            "no-progress",
        ),
        (
            "MixgfTrainingStalled",
            f"max by (run) ({_all('train_step')}) unless on (run) max by (run) (changes({_all('train_step')}[30m])) > 0",
            "15m",
            "critical",
            "training run {{ $labels.run }} has made no step for 30 minutes",
            "no-progress",
        ),
        (
            "MixgfUnitsFailed",
            f"max by (stage, run) ({_all('units', state='failed')}) > 0",
            "1m",
            "warning",
            "{{ $labels.stage }} has {{ $value }} failed work units",
            "failed-units",
        ),
        (
            "MixgfTrainingWaitsForData",
            f"max by (run) ({_all('data_wait_share')}) > 0.2",
            "15m",
            "warning",
            "training waits for data {{ $value | humanizePercentage }} of the time",
            "training-waits-for-data",
        ),
        (
            "MixgfActorsMissing",
            f"max by (stage, run) ({_all('actors', state='wanted')}) - max by (stage, run) ({_all('actors', state='up')}) > 0",
            "30m",
            "warning",
            "{{ $labels.stage }} has waited for {{ $value }} actors for 30 minutes",
            "no-nodes-come-up",
        ),
        (
            "MixgfCostLimit",
            f"sum(max by (run) ({_all('cost')})) > {cost_limit:g}",
            "1m",
            "critical",
            f"the cost of running runs is {{{{ $value }}}}, above the limit of {cost_limit:g}",
            "cost",
        ),
        (
            "MixgfCostUnknown",
            f"count by (run) ({_all('node_seconds')}) unless on (run) {_all('cost')}",
            "15m",
            "info",
            "the cost of run {{ $labels.run }} is unknown: no price table is set, or it lacks a node type",
            "cost",
        ),
        (
            "RayNodeMemory",
            "max by (ip) (ray_node_mem_used) / max by (ip) (ray_node_mem_total) > 0.92",
            "5m",
            "warning",
            "node {{ $labels.ip }} uses {{ $value | humanizePercentage }} of its memory",
            "out-of-memory",
        ),
        (
            "RayNodeDisk",
            "max by (ip) (ray_node_disk_utilization_percentage) > 90",
            "5m",
            "warning",
            "the disk of node {{ $labels.ip }} is {{ $value }} % full",
            "disk-full",
        ),
        (
            "RayTargetDown",
            'up{job="ray"} == 0',
            "5m",
            "warning",
            "Prometheus cannot reach {{ $labels.instance }}: the node is lost, or its port is closed",
            "a-node-is-lost",
        ),
        (
            "RayNodesPending",
            "max(autoscaler_pending_nodes) > 0",
            "30m",
            "warning",
            "{{ $value }} nodes have been pending for 30 minutes",
            "no-nodes-come-up",
        ),
    ]
    rules = [
        {
            "alert": name,
            "expr": expr,
            "for": wait,
            "labels": {"severity": severity},
            "annotations": {"summary": summary, "runbook": f"{RUNBOOK}#{anchor}"},
        }
        for name, expr, wait, severity, summary, anchor in rows
    ]
    return {"groups": [{"name": "mixgf", "interval": "30s", "rules": rules}]}
