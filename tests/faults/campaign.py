"""A campaign of faults: seeded tries of several kinds, a ledger that remembers them, and a table of how they ended.

| ending | meaning |
|---|---|
| refused | one short line that names what is wrong, no traceback; the exit code says so |
| survived | the result is the same as without the fault |
| lost | anything else: other values, a traceback, a file of a user that changed |

A try is a kind and a number, which seeds it, so every try can be made again. The ledger is a JSON line per try; a campaign that is
stopped goes on where it was.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

REFUSED, SURVIVED, LOST = "refused", "survived", "lost"
LONGEST = 1_000
"""Most characters of a refusal."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    name: str
    wanted: int
    """Tries of the whole campaign."""
    attempt: Callable[[int], tuple[str, str]]
    """Makes the try of a number; returns its ending and one line about it."""


def ending_of(line: str) -> tuple[str, str]:
    """The ending of a try that was refused with this text."""
    clear = 0 < len(line) <= LONGEST and "\n" not in line.strip() and "Traceback" not in line
    return (REFUSED if clear else LOST), line[:300]


class Ledger:
    """The tries that are made, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # the last may be cut off by a kill
        if len(whole) < len(lines):
            path.write_text("".join(f"{line}\n" for line in whole))
        self.rows = [json.loads(line) for line in whole]
        self.made = {(row["kind"], row["number"]) for row in self.rows}

    def add(self, kind: str, number: int, ending: str, line: str) -> None:
        row = {"kind": kind, "number": number, "ending": ending, "line": line}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self.made.add((kind, number))


def run(kinds: list[Kind], ledger: Ledger, *, seconds: float = float("inf")) -> None:
    """Make the tries that the ledger lacks, for at most so long; the next one is of the kind that took the least time so far."""
    end = time.monotonic() + seconds
    left = {kind: [number for number in range(kind.wanted) if (kind.name, number) not in ledger.made] for kind in kinds}
    took = dict.fromkeys(kinds, 0.0)
    while (waiting := [kind for kind in kinds if left[kind]]) and time.monotonic() < end:
        kind, began = min(waiting, key=took.__getitem__), time.monotonic()
        number = left[kind].pop(0)
        ledger.add(kind.name, number, *kind.attempt(number))
        took[kind] += time.monotonic() - began


def table(ledger: Ledger) -> str:
    """The table of endings by kind, in Markdown, and every try that was lost."""
    counts: dict[str, Counter[str]] = {}
    for row in ledger.rows:
        counts.setdefault(row["kind"], Counter())[row["ending"]] += 1
    lines = ["| kind | tries | refused clearly | survived | lost |", "|---|---|---|---|---|"]
    for kind, of in counts.items():
        lines.append(f"| {kind} | {of.total()} | {of[REFUSED]} | {of[SURVIVED]} | {of[LOST]} |")
    lost = [f"lost: {row['kind']} {row['number']}: {row['line']}" for row in ledger.rows if row["ending"] == LOST]
    return "\n".join([*lines, *lost])


def by_stage(ledger: Ledger, stages: Iterable[str]) -> str:
    """A Markdown table of tries by stage and kind, and a line of kills by victim. Lines of tries begin with the stage."""
    longest_first = sorted(stages, key=len, reverse=True)
    tries: dict[str, Counter[str]] = {}
    kills: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    for row in ledger.rows:
        line = row["line"]
        if (stage := next((name for name in longest_first if line.startswith(name)), None)) is None:
            continue
        tries.setdefault(row["kind"], Counter())[stage] += 1
        if found := re.match(r"(?:, (?P<victim>[^:]+?))?, (?P<number>\d+) kills", line.removeprefix(stage)):
            kills[stage] += int(found["number"])
            signals = re.findall(r"SIGKILL|SIGTERM", line.removeprefix(stage)) if found["victim"] is None else ()
            victims.update(f"command, {one}" for one in signals)
            if found["victim"]:
                victims[found["victim"]] += int(found["number"])
    lines = [f"| stage | {' | '.join(tries)} | signals sent |", "|---" * (2 + len(tries)) + "|"]
    lines += [f"| {name} | {' | '.join(str(of[name]) for of in tries.values())} | {kills[name]} |" for name in stages]
    return "\n".join([*lines, "signals by victim: " + ", ".join(f"{name} {n}" for name, n in victims.most_common())])
