"""What a page is made of: sections of text, figures, tables and folded blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mixgf.report.results import RunResults


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
class Figure:
    svg: str
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class Table:
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


def count_cell(n: float) -> Cell:
    return Cell("–" if not np.isfinite(n) else f"{n:,.0f}", float(n))


def number_cell(value: float, style: str) -> Cell:
    return Cell("–", "") if not np.isfinite(value) else Cell(format(value, style), float(value))


def not_run(id_: str, title: str, stage: str, results: RunResults) -> Section:
    text = f"Not results, so there is nothing to show. `mixgf {stage} --output {results.config.output}` makes it."
    return Section(id_, title, [Text(text, "missing")])
