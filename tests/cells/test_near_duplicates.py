"""The same cells with other genes: signatures by hand, and error rates on real cells after gene filters."""

from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from mixgf.cells import near_duplicates as near
from mixgf.storage import files

FILES = ("pancreas_human_baron", "pancreas_mouse_baron")


def keys(num: int) -> np.ndarray:
    return np.random.default_rng(1).integers(1, 1 << 63, num).astype(np.uint64)


def of(counts: np.ndarray | sparse.csr_matrix, key_G: np.ndarray) -> np.ndarray:
    x = sparse.csr_matrix(counts)
    return near.signatures(x.data.astype(np.int32), x.indices, x.indptr, key_G)


def later_copies(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return near.later_copies(*np.concatenate([near.pair_equal(band) for band in cells.T], axis=1))


def test_only_the_highest_counts_of_identified_genes_decide_in_any_order_of_columns():
    rng = np.random.default_rng(0)
    counts, key = rng.poisson(2, (5, 200)) + 1, keys(200)
    counts[:, :64] += 10
    counts[0, :3] += 1000  # beyond what is counted one by one
    found = of(counts, key)
    assert found.shape == (5, near.BANDS)
    assert (found > 0).all()
    assert len(np.unique(found)) == found.size  # cells have no value in common
    order = rng.permutation(200)
    np.testing.assert_array_equal(of(counts[:, order], key[order]), found)
    np.testing.assert_array_equal(of(counts[:, :64], key[:64]), found)
    hidden = key.copy()
    hidden[:64] = 0
    np.testing.assert_array_equal(of(counts, hidden), of(counts[:, 64:], key[64:]))
    more = counts.copy()
    more[1, 5] += 1
    assert ((of(more, key) != found).any(1) == [False, True, False, False, False]).all()


def test_of_equal_counts_the_same_genes_are_taken_whatever_else_is_there():
    key = keys(300)
    ones = np.ones((1, 300), int)
    fewer = ones.copy()
    whole = of(ones, key)[0]
    changed = []
    for g in range(300):
        fewer[:] = 1
        fewer[0, g] = 0
        changed.append((of(fewer, key)[0] != whole).any())
    assert sum(changed) <= near.NUM_GENES  # the other genes are not among the 64, and do not matter
    assert sum(changed) > near.NUM_GENES / 2
    large = ones * 300
    assert (of(large, key)[0] > 0).all()
    large[0, :70] = 900
    np.testing.assert_array_equal(of(large, key), of(large[:, :70], key[:70]))


def test_a_band_agrees_as_often_as_the_share_of_common_pairs_to_the_fifth():
    rng = np.random.default_rng(2)
    for common, share in ((62, 62 / 66), (54, 54 / 74)):  # of two sets of 64 pairs
        agree = []
        for _ in range(60):
            key = rng.integers(1, 1 << 63, 64 + 64 - common).astype(np.uint64)
            counts = np.zeros((2, len(key)), int)
            counts[0, :64] = counts[1, -64:] = 7
            a, b = of(counts, key)
            agree.append((a == b).mean())
        assert np.mean(agree) == pytest.approx(share**near.ROWS, abs=0.06)


def test_cells_with_few_genes_are_not_compared():
    key = keys(40)
    counts = np.zeros((2, 40), int)
    counts[:, : near.FEWEST] = 3
    counts[1, 0] = 0
    found = of(counts, key)
    assert (found[0] > 0).all()
    assert (found[1] == 0).all()
    assert not near.find(found[[1]], [found[[1]]]).any()
    assert near.pair_equal(np.zeros(4, np.uint32)).shape == (2, 0)


def test_two_bands_must_agree_with_one_and_the_same_cell():
    theirs = np.arange(1, 1 + 3 * near.BANDS, dtype=np.uint32).reshape(3, near.BANDS)
    mine = np.arange(1000, 1000 + 4 * near.BANDS, dtype=np.uint32).reshape(4, near.BANDS)
    mine[0, 3] = theirs[1, 3]  # one band
    mine[1, [2, 9]] = theirs[1, [2, 9]]
    mine[2, 2], mine[2, 9] = theirs[0, 2], theirs[2, 9]  # two bands of two cells
    assert near.find(mine, [theirs]).tolist() == [False, True, False, False]
    assert near.find(mine, [theirs[:1], theirs[1:]]).tolist() == [False, True, False, False]
    assert near.find(mine[[1, 1, 0]], iter([theirs])).tolist() == [True, True, False]
    assert near.find(mine, []).tolist() == [False] * 4
    both = np.concatenate([theirs, mine])
    later, first = later_copies(both)
    assert (later.tolist(), first.tolist()) == ([4], [1])


@pytest.mark.parametrize("group", [1 << 22, 50])
def test_every_later_copy_is_found_also_where_cells_are_sorted_in_groups(monkeypatch, group):
    monkeypatch.setattr(near, "_GROUP_CELLS", group)
    cells = np.random.default_rng(3).integers(1, 1 << 32, (300, near.BANDS)).astype(np.uint32)
    cells[200:250] = cells[50:100]
    cells[299] = cells[60]  # a second copy of a copied cell
    cells[150, 2:] = 0
    cells[151, 2:] = 0
    cells[151, :2] = cells[150, :2]
    later, first = later_copies(cells)
    assert later.tolist() == [151, *range(200, 250), 299]
    assert first[:-1].tolist() == [150, *range(50, 100)]
    assert first[-1] == 210  # the copy just before, of the same cell


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("min_cells", [3, 10])
def test_cells_are_found_after_a_gene_filter_and_others_are_not(name: str, min_cells: int) -> None:
    """`filter_genes(min_cells)`: at least 95 % found, at most .1 % of the cells of the other half of the file."""
    path = Path(files.local_path(f"resource:{name}.h5ad"))
    x = sparse.csr_matrix(anndata.read_h5ad(path).X).astype(np.int32)
    key = keys(x.shape[1])
    kept = np.bincount(x.indices, minlength=x.shape[1]) >= min_cells
    whole, filtered = of(x, key), of(x[:, kept], key[kept])
    half = len(whole) // 2
    assert near.find(filtered, [whole[:half], whole[half:]]).mean() >= 0.95
    assert near.find(filtered[half:], [whole[:half]]).mean() <= 0.001
