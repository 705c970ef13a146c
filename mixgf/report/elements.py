"""Elements of a page: text, figures, tables and folded blocks, in sections. The template renders each by its `kind`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mixgf.report.results import RunResults


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, the value to sort by, and an optional drawing."""

    text: str
    order: float | str = ""
    svg: str = ""
    strong: bool = False
    note: str = ""
    """A second line, in small type."""


@dataclass(frozen=True)
class Text:
    """A paragraph; text between backquotes is set as code.

    `tone` is plain, heading, good, warn, bad, missing or refused. The page marks it by a word or sign, not by colour alone.
    """

    text: str
    tone: str = "plain"
    kind: str = "text"


@dataclass(frozen=True)
class Figure:
    """A drawing as one SVG element, with its caption."""

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
        """Whether a column holds plain numbers, which are aligned to the right."""
        cells = [row[column] for row in self.rows if len(row) == len(self.head)]
        return (
            bool(cells)
            and all(isinstance(c.order, (int, float)) or c.text == "–" for c in cells)
            and not any(c.svg or len(c.text) > 24 for c in cells)
        )


@dataclass(frozen=True)
class Fold:
    """Long text that is closed at first."""

    title: str
    text: str
    kind: str = "fold"


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in the navigation. Without blocks it is left out."""

    id: str
    """Anchor in the page."""
    title: str
    blocks: list[Any]


def count_cell(n: float) -> Cell:
    """A number of things; a dash for NaN."""
    return Cell("–" if not np.isfinite(n) else f"{n:,.0f}", float(n))


def number_cell(value: float, style: str) -> Cell:
    """A value in a format such as `.3f`; a dash for NaN, which sorts last."""
    return Cell("–", "") if not np.isfinite(value) else Cell(format(value, style), float(value))


def not_run(id_: str, title: str, stage: str, results: RunResults) -> Section:
    """The section of a stage that is not done: it names the command to run."""
    text = f"This stage has not been run. Run `mixgf {stage} --output {results.config.output}`."
    return Section(id_, title, [Text(text, "missing")])
