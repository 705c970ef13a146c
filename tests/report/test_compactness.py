"""The report tells which types are more dispersed in mixgf than in another space, and never from too few donors."""

import numpy as np
import pandas as pd

from mixgf.report.elements import Table, Text
from mixgf.report.sections import species_comparison


def rows(on: str, *ratios: tuple[float, float, float]) -> list[dict[str, object]]:
    return [
        {
            "other": "untrained", "species": "ant", "type": f"t{i}", "num_cells": 20, "on": on, "dispersion": value, "dispersion_low": low,
            "dispersion_high": high, "radius": value, "radius_low": low, "radius_high": high, "density_correlation": 0.5,
            "density_correlation_low": 0.1, "density_correlation_high": 0.8, "interval_by": "donor",
        }
        for i, (value, low, high) in enumerate(ratios)
    ]  # fmt: skip


def test_types_are_counted_as_more_less_level_or_unknown():
    nan = np.nan
    ratios = ((1.5, 1.2, 1.9), (1.3, 1.1, 1.6), (0.7, 0.5, 0.9), (1.1, 0.8, 1.4), (2.0, nan, nan))
    table = pd.DataFrame(rows("map", *ratios) + rows("space", *ratios[:1]))
    blocks = species_comparison.compactness({"compactness": table})
    claim = next(b.text for b in blocks if isinstance(b, Text) and "Figures 2 and 3" in b.text)
    assert claim.endswith(
        "untrained encoder: 2 more, 1 less, 1 no difference that can be told, 1 with too few donors to say."
    )
    grid, worst = (b for b in blocks if isinstance(b, Table))
    assert [cell.text for cell in grid.rows[0][1:4]] == ["map", "5", "2 / 1"]
    assert [cell.text for cell in grid.rows[1][1:4]] == ["space itself", "1", "1 / 0"]
    assert [row[2].text for row in worst.rows] == [
        "t4",
        "t0",
        "t1",
        "t3",
        "t2",
    ]  # the most dispersed first, on the map only


def test_without_the_table_nothing_is_said():
    assert species_comparison.compactness({}) == []
