"""What the values of a matrix are (counts, normalised, log-normalised, scaled), for the message about a value that is no count."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mixgf.cells.reader import OPTION, RawBlock, Reader

COUNTS, NORMALISED, LOGGED, SCALED, ROOTS, FRACTIONS, NOT_NUMBERS = (
    "counts", "normalised", "log-normalised", "scaled", "square roots", "fractions of counts", "not finite",
)  # fmt: skip
"""Kinds of a matrix."""
SAMPLE_ROWS = 64
"""Rows that a kind is told by."""
_FEW = 0.01
"""Share of values that may be no counts in a matrix of counts."""
_EARLIER = 5
"""Rows before the first wrong value that must hold counts, to say that another part of the matrix does."""
_NOISE = 1e-3
"""Distance from a whole number that errors of rounding leave."""
_TELLING = 50.0
"""Ratio of two values of a cell below which it tells whether they are multiples."""
_FEW_RATIOS = 5
_EQUAL = 1e-3
"""Spread of sums, in units of their mean, below which they count as equal."""


def of_rows(data: np.ndarray, indptr: np.ndarray) -> str:
    """Kind of the values of some rows (CSR), a constant of this module."""
    x = np.asarray(data, dtype=np.float64)
    tests = {
        NOT_NUMBERS: not np.isfinite(x).all(),
        SCALED: np.count_nonzero(x < 0) > _FEW * len(x),
        COUNTS: np.count_nonzero(x != np.floor(x)) <= _FEW * len(x),
    }
    tests[FRACTIONS] = _are_whole(x)
    tests[ROOTS] = _are_whole(np.square(x))
    plain = next((kind for kind, found in tests.items() if found), "")
    return plain or _normalised(x, indptr) or FRACTIONS


def _are_whole(x: np.ndarray) -> bool:
    """Whether nearly all values are 0, or whole numbers but for errors of rounding."""
    whole = np.rint(np.nan_to_num(x))
    return bool(np.count_nonzero((np.abs(x - whole) < _NOISE) & ((whole >= 1) | (x == 0))) >= (1 - _FEW) * len(x))


SMALL_TYPES = {"uint8": 255, "int8": 127, "float16": 2048}
"""Types in which larger counts have no exact value, and the largest whole number up to which all have one."""
_NEAR_END = 0.9
"""Share of the largest value of a type from which a count may have been cut, or have begun again at 0."""


def doubt_type(reader: Reader) -> str:
    """What is to be said about counts that are stored in a type too small for them; empty where nothing is.

    Reads all values where the type is one of `SMALL_TYPES`, else none.
    """
    name = "" if reader.value_type is None else reader.value_type.newbyteorder("=").name
    if name not in SMALL_TYPES:
        return ""
    limit = SMALL_TYPES[name]
    values = (value for _, _, value in reader.scan()) if reader.scan is not None else (
        block.data for block in reader.read(0, reader.num_rows, DOUBT_ROWS)
    )  # fmt: skip
    highest = max((float(part.max()) for part in values if len(part)), default=0.0)
    if name == "float16" and highest > limit:
        return f"values are stored as float16, which has no exact whole numbers above 2,048, and the largest is {highest:,.0f}: large counts were rounded; write them as float32 or int32"
    if name != "float16" and highest >= _NEAR_END * limit:
        return f"values are stored as {name}, which ends at {limit}, and the largest is {highest:,.0f}: larger counts may have been cut, or begun again at 0; write them as int32"
    return ""


DOUBT_ROWS = 4096
"""Rows in memory while `doubt_type` reads."""


def is_normalised(data: np.ndarray, indptr: np.ndarray) -> bool:
    """Whether values are normalised, logarithms or square roots: no rounding makes counts of them."""
    return of_rows(data, indptr) in (NORMALISED, LOGGED, ROOTS)


def _normalised(x: np.ndarray, indptr: np.ndarray) -> str:
    """`NORMALISED` or `LOGGED` for values of rows that are, else empty."""
    starts = indptr[:-1][np.diff(indptr) > 0] - indptr[0]
    with np.errstate(all="ignore"):
        for kind, values in _unlogged(x):
            sums = np.add.reduceat(values, starts)
            if not np.isfinite(sums).all():
                continue
            if len(sums) > 1 and np.ptp(sums) < _EQUAL * sums.mean():
                return kind
            # a cell's counts times one factor: each is a multiple of the smallest, also where genes were left out
            lengths = np.diff(np.append(starts, len(x)))
            ratio = values / np.repeat(np.minimum.reduceat(np.where(values > 0, values, np.inf), starts), lengths)
            ratio = ratio[
                (ratio > 1.5) & (ratio < _TELLING)
            ]  # the smallest itself and large ones are near whole numbers anyway
            if len(ratio) >= _FEW_RATIOS and (np.abs(ratio - np.rint(ratio)) < 1e-3 * ratio).mean() > 0.9:
                return kind
    return ""


def _unlogged(x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Values as they are, and what they were before log(1 + x), by its base."""
    yield NORMALISED, x
    yield LOGGED, np.expm1(x)
    yield LOGGED, np.exp2(x) - 1
    yield LOGGED, np.power(10.0, x) - 1


def of_matrix(reader: Reader) -> tuple[str, float]:
    """Kind of a file's matrix by its first and its last rows, and the sum of these."""
    blocks = list(_sample(reader))
    found = [of_rows(b.data, b.indptr) for b in blocks]
    worst = next((kind for kind in found if kind != COUNTS), COUNTS)
    return worst, float(sum(np.asarray(b.data, dtype=np.float64).sum() for b in blocks))


def _sample(reader: Reader) -> Iterator[RawBlock]:
    rows = min(SAMPLE_ROWS, reader.num_rows)
    ranges = [(0, rows)] if reader.num_rows <= 2 * rows else [(0, rows), (reader.num_rows - rows, reader.num_rows)]
    for start, stop in ranges:
        for b in reader.read(start, stop, rows):
            yield RawBlock(b.start, b.data.copy(), b.indices, b.indptr.copy())


def advise(reader: Reader, raw: RawBlock, row: int) -> str:
    """What a matrix is that holds a value which is no count, where the counts are, and what to do.

    Args:
        reader: Of the file.
        raw: Block with the value.
        row: Row of the block with the first such value.
    """
    here = of_rows(raw.data[raw.indptr[row] :], raw.indptr[row:])
    matrix = _matrix(reader)
    if here == COUNTS:
        return f"the other values of {matrix} are raw counts, not scaled or normalised: changed or damaged there; get the file from its source again"
    if raw.start + row >= _EARLIER and (raw.start or raw.data[: raw.indptr[row]].any()):  # not empty cells alone
        what = f"earlier cells hold counts, and from here on they are {here}: files of two kinds were put together"
    else:
        what = f"{matrix} {_WORDS[here]}{_sums(raw, here)}"
    others = {}
    for name, other in _others(reader):
        try:
            others[name] = of_matrix(other)
        except Exception:  # noqa: BLE001 (a matrix that cannot be read holds no counts)
            others[name] = ("not readable", 0.0)
    counts = sorted(
        (name for name, (kind, total) in others.items() if kind == COUNTS and total > 0),
        key=lambda name: -others[name][1],
    )
    if counts:
        more = f" (and {', '.join(counts[1:])}, which sum to less)" if counts[1:] else ""
        return f"{what}; {_named(counts[0])} holds counts{more}: {reader.setting('layer', counts[0])}"
    if here == FRACTIONS:
        if reader.option == OPTION:
            return f"{what}; to round them to whole numbers: {reader.setting('round', 'true')}"
        return f"{what}; round them in the file first (numpy.rint)"
    if others:
        rest = ", ".join(f"{_named(name)} is {kind}" for name, (kind, _) in others.items())
        return f"{what}, {rest}: no matrix of this file holds counts; give the file with raw counts"
    return f"{what}: give raw counts"


_WORDS = {
    NORMALISED: "is already normalised",
    LOGGED: "is already log-normalised",
    SCALED: "is scaled",
    ROOTS: "holds square roots of counts",
    FRACTIONS: "holds fractions of counts (after a correction of ambient RNA, or of reads of several genes?)",
    NOT_NUMBERS: "holds values that are no numbers",
}


def _sums(raw: RawBlock, kind: str) -> str:
    """The sum of every cell of normalised values, in words; empty if they differ."""
    if kind not in (NORMALISED, LOGGED):
        return ""
    starts = raw.indptr[:-1][np.diff(raw.indptr) > 0]
    with np.errstate(all="ignore"):
        for this, values in _unlogged(raw.data.astype(np.float64)):
            sums = np.add.reduceat(values, starts)
            if this == kind and np.isfinite(sums).all() and np.ptp(sums) < _EQUAL * sums.mean():
                return f" (every cell sums to {sums.mean():,.0f})"
    return ""


def _others(reader: Reader) -> Iterator[tuple[str, Reader]]:
    try:
        yield from reader.others().items()
    except Exception:  # noqa: BLE001 (as above)
        return


def _matrix(reader: Reader) -> str:
    return "the matrix" if reader.format in ("mtx", "10x_h5") else _named(reader.layer)


def _named(layer: str) -> str:
    return layer if layer in ("X", "raw") else f"layer {layer!r}"
