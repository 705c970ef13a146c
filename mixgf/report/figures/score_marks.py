"""Scores as small drawings inside a table."""

from __future__ import annotations

import numpy as np

_BLUE, _GREY, _PALE = "#0072B2", "#52606d", "#cbd2d9"


def interval_mark(value: float, low: float, high: float, *, own: bool) -> str:
    """A score between 0 and 1 with its interval: a filled dot for own models, a hollow square for others."""
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


def pair_mark(ours: float, theirs: float) -> str:
    """Two scores between 0 and 1 on one scale: the model a filled dot, the baseline a hollow square."""
    a, b = (5 + 80 * min(max(v, 0.0), 1.0) if np.isfinite(v) else float("nan") for v in (ours, theirs))
    out = _scale()
    if np.isfinite(b):
        out += f'<path d="M{a:.1f} 8H{b:.1f}" stroke="{_PALE}" stroke-width="2"/>'
        out += f'<rect x="{b - 3.5:.1f}" y="4.5" width="7" height="7" fill="#fff" stroke="{_GREY}" stroke-width="1.5"/>'
    return f'{out}<circle cx="{a:.1f}" cy="8" r="2.8" fill="{_BLUE}"/></svg>'


def _scale() -> str:
    ticks = "".join(f'<path d="M{5 + 20 * i} 2v12" stroke="#e4e7eb" stroke-width="1"/>' for i in range(5))
    return f'<svg class="whisker" viewBox="0 0 90 16" width="90" height="16" aria-hidden="true">{ticks}'
