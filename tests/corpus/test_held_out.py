"""Units of held-out cells, against names that are put together cell by cell."""

import pyarrow as pa
import pytest

from mixgf.corpus import held_out
from mixgf.corpus.reader import Corpus
from mixgf.storage import tables

ROWS = [12, 9, 11, 8]
COLUMNS = [
    {"dataset": ["a", "b"], "donor": ["d1", "d2", None, "unknown"]},
    {"donor": [1, 2, 3]},  # numbers, and no data set
    {"dataset": ["a", None], "donor": [1.0, float("nan"), 2.5]},
    {"dataset": ["c"]},  # no donors
]


@pytest.fixture
def corpus(make_corpus):
    """Four shards whose columns differ; the names of each cell's data set, source and donor."""
    uri = make_corpus([9] * sum(ROWS), [0] * sum(ROWS), ROWS)
    said = []
    for shard, (rows, columns) in enumerate(zip(ROWS, COLUMNS, strict=True)):
        path = f"{uri}/shards/{shard:05d}.parquet"
        table = tables.read_table(path)
        drawn = {name: [values[i * 7 % len(values)] for i in range(rows)] for name, values in columns.items()}
        for name, values in drawn.items():
            table = table.append_column(name, pa.array(values, from_pandas=False))
        tables.write_table(path, table)
        for i in range(rows):
            names = [str(drawn[name][i]) if name in drawn else "" for name in ("dataset", "donor")]
            said.append((names[0], "source", names[1]))
    return Corpus(uri), said


def test_a_unit_is_all_cells_of_one_data_set_source_and_donor(corpus):
    opened, said = corpus
    unit_N, hashes_U = held_out._units(opened, ("dataset", "source", "donor"))
    known = [row if row[-1] not in held_out.UNKNOWN else None for row in said]
    assert [unit < 0 for unit in unit_N] == [row is None for row in known]
    pairs = {(row, int(unit)) for row, unit in zip(known, unit_N, strict=True) if row is not None}
    assert (
        len(pairs) == len({row for row, _ in pairs}) == len({unit for _, unit in pairs}) == len(set(hashes_U.tolist()))
    )
    assert {row for row, _ in pairs} >= {("a", "source", "d1"), ("", "source", "1"), ("a", "source", "1.0")}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_held_out_cells_are_whole_units(corpus, share):
    opened, said = corpus
    found = held_out.held_out_cells(opened, share)
    assert found.unit == "donor"
    units = {said[c] for c in found.cells}
    assert len(units) == found.units
    assert [c for c, row in enumerate(said) if row in units] == found.cells.tolist()
