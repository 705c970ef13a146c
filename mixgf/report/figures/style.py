"""Colours, markers and the canvas that all figures share.

Text in an SVG stays text; dense point clouds are embedded as images. No information is given by colour alone: species also
differ by marker or hatching, cell types have numbers, heat maps have values. The colours are those of Okabe and Ito. Equal
input gives equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SPECIES_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SPECIES_MARKERS = ("o", "^", "s", "D", "v", "P")
SPECIES_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
TYPE_COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#5B4A9E", "#7A9A01", "#B2182B",
    "#2F6F73", "#F28E8E", "#3B3B3B", "#A6761D", "#8DA0CB", "#1B7837", "#C51B7D", "#BDB76B", "#4D9DE0", "#7F7F7F",
)  # fmt: skip
INK, SOFT, FAINT = "#1f2933", "#52606d", "#cbd2d9"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "axes.edgecolor": SOFT, "axes.labelcolor": INK,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "text.color": INK, "xtick.color": SOFT,
    "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False, "hatch.linewidth": 0.6,
    "figure.facecolor": "none", "savefig.facecolor": "none", "axes.facecolor": "none", "figure.dpi": 100,
    "text.parse_math": False,
}  # fmt: skip


LONGEST_NAME = 48
"""Characters of a cell type's or gene's name that a figure has room for."""


def short(name: object) -> str:
    """A name for a figure: on one line, and with its middle left out where it is too long."""
    text = " ".join(str(name).split())
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 16]}…{text[-15:]}"


@contextmanager
def sheet(
    name: str, width: float, height: float, *, kind: str = "svg", title: str = "", **layout: Any
) -> Iterator[tuple[Any, list[bytes]]]:
    """A matplotlib figure of `width` x `height` inches.

    The list receives the file at the end of the block: svg, or png or pdf on white. `title` stands in the file's metadata.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    undated = {"svg": ("Date", "Creator", "Format", "Type"), "pdf": ("CreationDate",), "png": ("Software",)}[kind]
    out: list[bytes] = []
    with mpl.rc_context({**_STYLE, "svg.hashsalt": f"mixgf-{name}"}), warnings.catch_warnings():
        if kind == "svg":  # whose text the reader's own fonts draw
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, **layout))
        FigureCanvasSVG(figure)
        yield figure, out
        file, back = io.BytesIO(), "none" if kind == "svg" else "white"
        figure.savefig(
            file,
            format=kind,
            dpi=170,
            metadata=dict.fromkeys(undated) | ({"Title": title} if title else {}),
            facecolor=back,
        )
        out.append(file.getvalue())


@contextmanager
def canvas(name: str, width: float, height: float, **layout: Any) -> Iterator[tuple[Any, list[str]]]:
    """A figure of the report; the list receives its SVG element at the end of the block."""
    out: list[str] = []
    with sheet(name, width, height, **layout) as (figure, files):
        yield figure, out
    out.append(_inline(files[0].decode(), name, width))


def _inline(svg: str, name: str, width: float) -> str:
    """The SVG element of a file. Ids get the name of the figure as prefix, since ids must differ within a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)(?:height|width)="[^"]*pt" ', r"<svg \1", svg)
    svg = re.sub(r'(<svg [^>]*?)(?:height|width)="[^"]*pt" ', r"\1", svg)
    return svg.replace("<svg ", f'<svg class="figure" role="img" style="max-width:{width:.2f}in" ', 1).strip()
