"""Makes the Grafana boards and the alert rules in this folder: `python dashboards/build.py` writes, `--check` compares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from panels import BOARDS, Panel
from rules import COST_LIMIT, alerts

from mixgf.distributed.metrics import METRICS

HERE = Path(__file__).parent


def board(name: str) -> dict[str, Any]:
    """One Grafana board as plain data."""
    title, panels = BOARDS[name]
    source = {"type": "prometheus", "uid": "${source}"}
    of = "" if name == "overview" else f'{{stage="{name}"}}'
    runs = f"label_values({METRICS['nodes'].exported}{of}, run)"
    return {
        "uid": f"mixgf-{name}",
        "title": title,
        "tags": ["mixgf"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "links": [{"type": "dashboards", "tags": ["mixgf"], "title": "mixgf", "asDropdown": True, "keepTime": True}],
        "templating": {
            "list": [
                {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run", "label": "Run", "type": "query", "datasource": source, "query": {"query": runs, "refId": "run"},
                    "refresh": 2, "multi": True, "includeAll": True, "allValue": ".*", "sort": 2,
                    "current": {"text": ["All"], "value": ["$__all"]},
                },
            ]
        },
        "panels": [_panel(i, panel, source) for i, panel in enumerate(panels)],
    }  # fmt: skip


def _panel(i: int, panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    custom: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 5, "showPoints": "auto", "spanNulls": 60_000}
    if panel.log:
        custom["scaleDistribution"] = {"type": "log", "log": 10}
    defaults: dict[str, Any] = {"unit": panel.unit, "custom": custom if panel.kind == "timeseries" else {}}
    if not panel.log:
        defaults["min"] = 0
    if panel.top is not None:
        defaults["max"] = panel.top
    options: dict[str, Any] = {
        "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "stat": {
            "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
            "colorMode": "none",
            "graphMode": "area",
        },
    }
    return {
        "id": i + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": {"x": 8 * (i % 3), "y": 8 * (i // 3), "w": 8, "h": 8},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options[panel.kind],
        "targets": [
            {"refId": chr(ord("A") + k), "datasource": source, "expr": expr, "legendFormat": legend}
            for k, (expr, legend) in enumerate(panel.queries)
        ],
    }


def files(cost_limit: float = COST_LIMIT) -> dict[str, str]:
    """Name to text of everything that is generated."""
    out = {f"{name}.json": json.dumps(board(name), indent=1) + "\n" for name in BOARDS}
    head = "# Made by dashboards/build.py; change it there.\n"
    out["alerts.yaml"] = head + yaml.safe_dump(alerts(cost_limit), sort_keys=False, width=1000)
    return out


def main() -> int:
    """Write the files, or compare them with what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    parser.add_argument("--cost-limit", type=float, default=COST_LIMIT, help="limit of the cost alert")
    args = parser.parse_args()
    stale = []
    for name, text in files(args.cost_limit).items():
        path = HERE / name
        if args.check and (not path.is_file() or path.read_text() != text):
            stale.append(name)
        elif not args.check:
            path.write_text(text)
    if stale:
        sys.stderr.write(f"differs from its generator: {', '.join(stale)}; run python dashboards/build.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
