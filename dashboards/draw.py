"""Draw the dashboards as NAME.png from a Prometheus with data of a run: `python dashboards/draw.py URL FOLDER`.

This needs no Grafana: the same queries, titles, units and layout are drawn with matplotlib. The dashboard of a stage covers the
time in which the stage was measured, the overview that of all stages.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import time
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

from panels import DASHBOARDS, Panel
from PIL import Image

from mixgf.distributed.metrics import METRICS

COLUMNS = 3
CROWD = 8
"""With more series than this, series that are always 0 are left out."""
SHOWN = {
    "s": (1, "s"), "h": (1, "h"), "cps": (1, ""), "percent": (1, "%"), "percentunit": (0.01, "%"), "bytes": (1e6, "MB"),
    "decmbytes": (1, "MB"), "decgbytes": (1, "GB"),
}  # fmt: skip
"""Grafana unit to the divisor of values and the name of the unit that is drawn."""


def series(url: str, query: str, begin: float, end: float) -> list[tuple[dict[str, str], list[float], list[float]]]:
    """Labels, times and values of every series of a query over a time range, about 200 points each."""
    step = max(1.0, (end - begin) / 200)
    for name, value in {
        "$__rate_interval": f"{max(10, round(4 * step))}s",
        "$__range": f"{round(end - begin)}s",
        "$run": ".*",
    }.items():
        query = query.replace(name, value)
    asked = urllib.parse.urlencode({"query": query, "start": begin, "end": end, "step": step})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{asked}", timeout=60) as answer:
        rows = json.load(answer)["data"]["result"]
    return [(row["metric"], *(list(map(float, column)) for column in zip(*row["values"], strict=True))) for row in rows]


def legend(text: str, labels: dict[str, str]) -> str:
    """A panel's legend of one series; run ids are cut to what tells them apart."""
    short = labels | ({"run": labels["run"][:6]} if "run" in labels else {})
    return re.sub(r"{{(\w+)}}", lambda name: short.get(name[1], ""), text).strip()


Line = tuple[str, list[datetime], list[float]]
"""Legend, times and values of one series, in the unit that is drawn."""


def read(panel: Panel, url: str, begin: float, end: float) -> list[Line]:
    """Series of all queries of a panel over a time range."""
    divisor, _ = SHOWN.get(panel.unit, (1, ""))
    return [
        (legend(text, labels), [datetime.fromtimestamp(t) for t in times], [v / divisor for v in values])
        for query, text in panel.queries
        for labels, times, values in series(url, query, begin, end)
    ]


def draw(axes: Any, panel: Panel, lines: list[Line], begin: float, end: float) -> None:
    """Draw one panel, or `no data`."""
    from matplotlib import dates

    divisor, unit = SHOWN.get(panel.unit, (1, ""))
    axes.set_title(f"{panel.title}, {unit}" if unit else panel.title, fontsize=9, loc="left")
    axes.tick_params(which="both", labelsize=7)
    axes.grid(alpha=0.3, linewidth=0.5)
    if not lines:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, fontsize=9, color="grey")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    if len(lines) > CROWD:
        lines = [line for line in lines if any(line[2])] or lines[:1]
    for name, times, values in lines:
        for i in range(len(times) - 1, 0, -1):  # nothing is drawn over a minute without data, as on the dashboards
            if (times[i] - times[i - 1]).total_seconds() > 60:
                times.insert(i, times[i])
                values.insert(i, math.nan)
        axes.plot(times, values, linewidth=1, label=name, marker="." if len(values) < 3 else "")
    if panel.kind == "stat":
        axes.text(0.5, 0.5, f"{lines[0][2][-1]:.4g}", ha="center", va="center", transform=axes.transAxes, fontsize=20)
    elif any(name for name, _, _ in lines):
        axes.legend(fontsize=6, loc="best", ncols=2, frameon=False)
    if panel.log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, panel.top / divisor if panel.top is not None else None)
    axes.set_xlim(datetime.fromtimestamp(begin), datetime.fromtimestamp(end))
    axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=3, maxticks=6))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M:%S"))


def times(url: str, name: str, begin: float, end: float) -> tuple[float, float]:
    """Part of a time range in which a dashboard's stage (overview: any stage) was measured; the whole range if none was."""
    which = "" if name == "overview" else f'{{stage="{name}"}}'
    found = series(url, METRICS["nodes"].exported + which, begin, end)
    at = [t for _, moments, _ in found for t in moments]
    return (min(at) - 10, max(at) + 10) if at else (begin, end)


def dashboard(url: str, name: str, begin: float, end: float) -> bytes:
    """A dashboard as a PNG with a small palette; GPU panels without data are left out."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    title, panels = DASHBOARDS[name]
    begin, end = times(url, name, begin, end)
    shown = [(panel, lines) for panel in panels if (lines := read(panel, url, begin, end)) or not panel.needs]
    rows = -(-len(shown) // COLUMNS)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 1.75 * rows + 0.4), dpi=100, layout="constrained")
        figure.suptitle(title, fontsize=10)
        grid = figure.subplots(rows, COLUMNS).flat
        for (panel, lines), axes in zip(shown, grid, strict=False):
            draw(axes, panel, lines, begin, end)
        for axes in grid:  # places that are left
            axes.set_axis_off()
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png")
    Image.open(drawn).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(small, "png", optimize=True)
    return small.getvalue()


def main() -> None:
    """Draw all dashboards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("url", metavar="URL", help="of Prometheus, for example http://127.0.0.1:9090")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--dashboards", nargs="+", choices=DASHBOARDS, help="draw only these")
    parser.add_argument("--minutes", type=float, default=60.0, help="time range, up to now")
    args = parser.parse_args()
    now = time.time()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.dashboards or DASHBOARDS:
        (args.folder / f"{name}.png").write_bytes(dashboard(args.url.rstrip("/"), name, now - 60 * args.minutes, now))


if __name__ == "__main__":
    main()
