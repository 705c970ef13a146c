"""What a report is made of: the loaded tables of a run going in, blocks of text, figures and tables coming out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mixgf.config.run import Config
from mixgf.storage.artifacts import Record

_BLUE, _GREY, _PALE = "#0072B2", "#52606d", "#cbd2d9"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left behind, as far as it went. A stage that has not run has no record and no table."""

    config: Config
    uris: dict[str, str]
    """Stage to the URI of its artifact."""
    records: dict[str, Record] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """`cells` (source, species, type, donor, cells), `mapping`, `dropped`, `history`, `scores`, `comparisons`, `per_class`,
    `confusion`, `genes`, in the layouts of their artifacts."""
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    """Species to the number of cells by sentence length."""
    vectors_ND: np.ndarray | None = None
    """Embeddings of a keyed sample of the cells."""
    obs: pd.DataFrame | None = None
    """Species and type of the same cells."""
    num_embedded: int = 0


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what is read, what is sorted by, and perhaps a drawing."""

    text: str
    order: float | str = ""
    svg: str = ""
    strong: bool = False
    note: str = ""
    """A second line."""


@dataclass(frozen=True)
class Text:
    """A paragraph; `tone` is plain, good, warn or bad, and is also written out as a word or sign."""

    text: str
    tone: str = "plain"
    kind: str = "text"


@dataclass(frozen=True)
class Picture:
    svg: str
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class Grid:
    """A table. A row with a single cell is a heading over the rows below it."""

    caption: str
    head: list[str]
    rows: list[list[Cell]]
    sortable: bool = False
    kind: str = "table"

    def numeric(self, column: int) -> bool:
        """Whether a column holds plain numbers, which are set flush right."""
        cells = [row[column] for row in self.rows if len(row) == len(self.head)]
        return (
            bool(cells)
            and all(isinstance(c.order, (int, float)) or c.text == "–" for c in cells)
            and not any(c.svg or len(c.text) > 24 for c in cells)
        )


@dataclass(frozen=True)
class Fold:
    """Something long, closed at first."""

    title: str
    text: str
    kind: str = "fold"


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: list[Any]


def count(n: float) -> Cell:
    return Cell("–" if not np.isfinite(n) else f"{n:,.0f}", float(n))


def number(value: float, style: str) -> Cell:
    return Cell("–", "") if not np.isfinite(value) else Cell(format(value, style), float(value))


def missing(id_: str, title: str, stage: str, run: Run) -> Section:
    text = f"Not run, so there is nothing to show. `mixgf {stage} --output {run.config.output}` makes it."
    return Section(id_, title, [Text(text, "missing")])


def plural(n: int, one: str, many: str = "") -> str:
    """`1 cell`, `2 cells`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def title_case(name: str) -> str:
    """A column's name for readers."""
    known = {"num_cells": "cells", "p_cell": "p (cells)", "mito_fraction": "mitochondrial share"}
    text = known.get(name, name.replace("_", " "))
    return text[:1].upper() + text[1:]


# scores as small drawings inside a table


def whisker(value: float, low: float, high: float, *, own: bool) -> str:
    """A score between 0 and 1 with its interval as a small drawing; ours is a filled dot, a baseline a hollow square."""
    if not np.isfinite(value):
        return ""
    x = [
        5 + 80 * min(max(v, 0.0), 1.0)
        for v in (value, low if np.isfinite(low) else value, high if np.isfinite(high) else value)
    ]
    color = _BLUE if own else _GREY
    mark = (
        f'<circle cx="{x[0]:.1f}" cy="8" r="3.6" fill="{color}"/>' if own
        else f'<rect x="{x[0] - 3:.1f}" y="5" width="6" height="6" fill="#fff" stroke="{color}" stroke-width="1.5"/>'
    )  # fmt: skip
    return f'{_scale()}<path d="M{x[1]:.1f} 8H{x[2]:.1f}" stroke="{color}" stroke-width="2"/>{mark}</svg>'


def _scale() -> str:
    ticks = "".join(f'<path d="M{5 + 20 * i} 2v12" stroke="#e4e7eb" stroke-width="1"/>' for i in range(5))
    return f'<svg class="whisker" viewBox="0 0 90 16" width="90" height="16" aria-hidden="true">{ticks}'


def pair(ours: float, theirs: float) -> str:
    """Two scores between 0 and 1 on one scale: ours a filled dot, the baseline's a hollow square."""
    a, b = (5 + 80 * min(max(v, 0.0), 1.0) if np.isfinite(v) else float("nan") for v in (ours, theirs))
    out = _scale()
    if np.isfinite(b):
        out += f'<path d="M{a:.1f} 8H{b:.1f}" stroke="{_PALE}" stroke-width="2"/>'
        out += f'<rect x="{b - 3.5:.1f}" y="4.5" width="7" height="7" fill="#fff" stroke="{_GREY}" stroke-width="1.5"/>'
    return f'{out}<circle cx="{a:.1f}" cy="8" r="2.8" fill="{_BLUE}"/></svg>'
