"""Laws of the median sketch: error bound, merge order, dropped cells."""

import anndata
import numpy as np
import pytest
from scipy import sparse

from mixgf.genes import medians
from mixgf.storage import files


def fill(counts_NG, keep=None, **options):
    counts_NG = np.asarray(counts_NG)
    rows, columns = np.nonzero(counts_NG)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(counts_NG)))]).astype(np.int64)
    keep = np.ones(len(counts_NG), dtype=bool) if keep is None else keep
    a = medians.SketchBuilder(counts_NG.shape[1], **options)
    a.update(
        counts_NG[rows, columns].astype(np.int32), columns.astype(np.int32), indptr,
        depth_N=counts_NG.sum(1), keep_N=keep, gene_G=np.arange(counts_NG.shape[1], dtype=np.int32),
    )  # fmt: skip
    return a.finish()


def exact(counts_NG):
    x = counts_NG / np.maximum(counts_NG.sum(1, keepdims=True), 1) * 10_000
    return {g: float(np.median(x[:, g][x[:, g] > 0])) for g in range(x.shape[1]) if (x[:, g] > 0).any()}


@pytest.mark.parametrize("cells", [1, 2, 3, 500])
def test_medians_are_within_the_stated_error_and_absent_genes_have_none(cells):
    rng = np.random.default_rng([1, cells])
    counts = rng.negative_binomial(0.3, rng.uniform(0.001, 0.5, (1, 60)), (cells, 60))
    counts[:, 7] = 0
    found, true = medians.median_by_gene(fill(counts)), exact(counts)
    assert found.keys() == true.keys()
    assert 7 not in found
    assert medians.RELATIVE_ERROR <= 0.005
    assert max(abs(found[g] / true[g] - 1) for g in true) <= medians.RELATIVE_ERROR


def test_the_error_bound_holds_from_the_smallest_share_to_the_whole_cell():
    for count, depth in [(1, 10**9), (1, 10**6), (1, 1), (999_999, 10**6), (1, 3)]:
        a = medians.SketchBuilder(1)
        one = np.asarray([count], dtype=np.int32)
        a.update(
            one,
            np.zeros(1, np.int32),
            np.asarray([0, 1]),
            depth_N=np.asarray([depth]),
            keep_N=np.ones(1, bool),
            gene_G=np.zeros(1, np.int32),
        )
        assert medians.median_by_gene(a.finish())[0] == pytest.approx(
            count / depth * 10_000, rel=medians.RELATIVE_ERROR
        )


def test_merging_in_any_order_and_grouping_gives_the_same_sketch():
    rng = np.random.default_rng(2)
    counts = rng.negative_binomial(0.5, 0.1, (41, 30))
    whole = fill(counts)
    parts = [fill(counts[a : a + 7]) for a in range(0, 41, 7)]
    for most_values in (1, 100, 500, 1_000):  # some within a block; 1 is less than one row
        small = fill(counts, most_values=most_values)
        assert np.array_equal(small.keys, whole.keys)
        assert np.array_equal(small.counts, whole.counts)
    for order in (
        parts,
        parts[::-1],
        [medians.merge_sketches(parts[3:]), medians.merge_sketches(parts[:3])],
        [medians.EMPTY, *parts],
    ):
        merged = medians.merge_sketches(order)
        assert np.array_equal(merged.keys, whole.keys)
        assert np.array_equal(merged.counts, whole.counts)


def test_the_error_bound_and_the_order_hold_on_real_cells():
    """All bundled human cells against numpy's exact medians, every fourth gene; two parts in two orders."""
    cells = anndata.read_h5ad(files.local_path("resource:pancreas_human_baron.h5ad"))
    counts = cells.X.tocsr().astype(np.int64)
    depth = np.asarray(counts.sum(axis=1)).ravel()
    counts = counts[:, ::4]
    num_genes = counts.shape[1]
    parts = []
    for a in range(0, cells.n_obs, 1_100):
        part = counts[a : a + 1_100]
        sketch = medians.SketchBuilder(num_genes)
        sketch.update(
            part.data.astype(np.int32), part.indices.astype(np.int32), part.indptr.astype(np.int64),
            depth_N=depth[a : a + 1_100], keep_N=np.ones(part.shape[0], bool), gene_G=np.arange(num_genes, dtype=np.int32),
        )  # fmt: skip
        parts.append(sketch.finish())
    forward, backward = medians.merge_sketches(parts), medians.merge_sketches(parts[::-1])
    assert np.array_equal(forward.keys, backward.keys)
    assert np.array_equal(forward.counts, backward.counts)
    found = medians.median_by_gene(forward)
    columns = (sparse.diags_array(10_000 / depth) @ counts).tocsc()
    assert len(found) > 3_500
    errors = []
    for g in range(num_genes):
        values = columns.data[columns.indptr[g] : columns.indptr[g + 1]]
        assert (g in found) == (len(values) > 0)
        if len(values):
            errors.append(abs(found[g] / np.median(values) - 1))
    assert max(errors) <= medians.RELATIVE_ERROR <= 0.005
    assert np.median(errors) < 0.25 * medians.RELATIVE_ERROR  # values within a bucket are spread, not put at its edge


def test_dropped_cells_do_not_count():
    counts = np.asarray([[1, 1], [9, 1], [1, 9]])
    kept = fill(counts, keep=np.asarray([True, False, True]))
    assert np.array_equal(kept.keys, fill(counts[[0, 2]]).keys)


def test_more_cells_than_sixteen_bits_hold_are_counted():
    cells = 70_000  # in each, both genes have the same value
    data, indices = np.ones(2 * cells, np.int32), np.tile(np.arange(2, dtype=np.int32), cells)
    a = medians.SketchBuilder(2)
    a.update(
        data, indices, np.arange(0, 2 * cells + 1, 2), depth_N=np.full(cells, 2), keep_N=np.ones(cells, bool),
        gene_G=np.arange(2, dtype=np.int32),
    )  # fmt: skip
    assert a.finish().counts.tolist() == [cells, cells]


def test_the_standard_error_is_the_spread_of_medians_of_samples():
    rng, depth = np.random.default_rng(5), 1_000
    found, stated = [], []
    for _ in range(300):
        counts = 1 + rng.negative_binomial(2, [0.05, 0.1, 0.3], (200, 3))
        counts[20:, 2] = 0  # too few for an error
        sketch = medians.SketchBuilder(3)
        rows, columns = np.nonzero(counts)
        sketch.update(
            counts[rows, columns].astype(np.int32), columns.astype(np.int32),
            np.concatenate([[0], np.cumsum((counts > 0).sum(1))]), depth_N=np.full(200, depth) + rng.integers(0, 500, 200),
            keep_N=np.ones(200, bool), gene_G=np.arange(3, dtype=np.int32),
        )  # fmt: skip
        whole = sketch.finish()
        found.append([medians.median_by_gene(whole)[g] for g in range(2)])
        errors = medians.standard_errors(whole)
        assert errors.keys() == {0, 1}
        stated.append([errors[g] for g in range(2)])
    spread = np.std(found, axis=0) / np.mean(found, axis=0)
    assert np.mean(stated, axis=0) == pytest.approx(spread, rel=0.15)
