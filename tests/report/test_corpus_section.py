"""What the report says of cells that several sources share."""

import pandas as pd

from mixgf.report.sections import corpus


def test_cells_that_two_sources_share_are_counted_by_pair_and_kept_ones_are_a_warning():
    rows = [("b", i, "a", i, True) for i in range(3)] + [("c", 0, "a", 9, True)]
    table = pd.DataFrame(rows, columns=["source", "row", "same_source", "same_row", "kept"])
    text, tone = corpus._near_duplicates(table)
    assert text.startswith(
        "The same cells but for a gene filter: 3 of b equal cells of a; 1 of c equal cells of a. 4 of them are kept"
    )
    assert tone == "warn"
    text, tone = corpus._near_duplicates(table.assign(kept=False))
    assert text.endswith("They are dropped.")
    assert tone == "plain"
