"""Run a benchmark: `python jobs/bench.py STAGE [--json] [--quick]`.

Prints a table, or with --json one object per figure: {"figure", "value", "unit", "baseline", "ratio", "bar"}. A baseline is the
published algorithm, written plainly in the benchmark, and measured in turn with that of mixgf in one process. A bar is the goal,
for the ratio (ends in x) or for the value.

Submit: ray job submit --working-dir . -- python jobs/bench.py STAGE --json
Inputs: none (bundled cells, or cells drawn with a seed; `doublets`, `duplicates` and `models` read further cells, see there). Outputs: standard output. Resources: two CPU cores; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mixgf.errors import UserError

if TYPE_CHECKING:
    from measure import Figure

STAGES = {p.stem.removeprefix("bench_"): p.stem for p in sorted(Path(__file__).parent.glob("bench_*.py"))}


def main() -> int:
    """Run one stage's benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--json", action="store_true", help="one JSON object per figure")
    parser.add_argument("--quick", "--tiny", action="store_true", help="small sizes and one repetition: does it run?")
    of_gpu = parser.add_argument_group("stage gpu")
    of_gpu.add_argument("--only", metavar="SECTION,...", help="these sections only")
    of_gpu.add_argument("--seconds", type=float, help="sections that would begin later are left out (default: 340)")
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("only", "seconds") if getattr(args, name) is not None}
    if options and args.stage != "gpu":
        parser.error("--only and --seconds belong to the stage gpu")
    sys.path.insert(0, str(Path(__file__).parent))
    figures = importlib.import_module(STAGES[args.stage]).figures(quick=args.quick, **options)
    try:
        _print(figures, as_json=args.json)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def _print(figures: Iterable[Figure], *, as_json: bool) -> None:
    for i, figure in enumerate(figures):
        row = figure.row()
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if i == 0:
            print(f"{'figure':86} {'value':>10} {'unit':16} {'baseline':>10} {'ratio':>8}  bar")
        baseline, ratio = (f"{row[k]:,.4g}" if row[k] is not None else "" for k in ("baseline", "ratio"))
        line = f"{row['figure']:86} {row['value']:>10,.5g} {row['unit']:16} {baseline:>10} {ratio:>8}  {row['bar']}"
        print(line.rstrip(), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
