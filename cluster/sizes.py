"""Sizes a cluster from measured rates: hours, node-hours and cost for 1, 10 and 50 million cells, as a Markdown table.

    python cluster/sizes.py prepare=prepare:8:RATE pretrain=a100:1:RATE --prices prices.json --bytes-per-cell BYTES

RATE is cells per second of one node in that stage, as `python jobs/bench.py` measured it on such a node (for pretraining, of
all epochs together: cells per second over the number of epochs). The rate is taken to scale with the number of nodes.
"""

from __future__ import annotations

import argparse
import sys

from mixgf.errors import UserError
from mixgf.tracking import cost


def row(million: float, text: str, prices: dict[str, float], bytes_per_cell: float) -> str:
    """One line of the table."""
    try:
        stage, how = text.split("=")
        node_type, nodes, rate = how.split(":")
        num_nodes, cells_per_second = int(nodes), float(rate)
    except ValueError:
        msg = f"{text}: must look like STAGE=TYPE:NODES:RATE, for example prepare=prepare:8:1000"
        raise UserError(msg) from None
    if num_nodes < 1 or cells_per_second <= 0:
        msg = f"{text}: NODES must be at least 1 and RATE above 0"
        raise UserError(msg)
    took = cost.project(million * 1e6, rate=cells_per_second, num_nodes=num_nodes, price=prices.get(node_type))
    price = "" if took.cost is None else f"{took.cost:,.2f}"
    stored = "" if not bytes_per_cell else f"{million * 1e6 * bytes_per_cell / 1e9:,.1f}"
    cells = f"{million:g} M"
    return f"| {cells} | {stage} | {num_nodes} x {node_type} | {took.hours:,.1f} | {took.node_hours:,.1f} | {price} | {stored} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("stages", nargs="+", metavar="STAGE=TYPE:NODES:RATE")
    parser.add_argument("--prices", default="", help="JSON: node type to price per node-hour")
    parser.add_argument("--bytes-per-cell", type=float, default=0.0, help="of the token corpus (its manifest says)")
    parser.add_argument("--cells", type=float, nargs="+", default=[1.0, 10.0, 50.0], help="millions of cells")
    args = parser.parse_args()
    try:
        prices = cost.load_prices(args.prices) if args.prices else {}
        rows = [row(million, text, prices, args.bytes_per_cell) for million in args.cells for text in args.stages]
    except UserError as error:
        sys.stderr.write(f"sizes: {error}\n")
        return 2
    head = "| cells | stage | nodes | hours | node-hours | cost | corpus, GB |\n|---|---|---|---|---|---|---|"
    sys.stdout.write("\n".join([head, *rows]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
