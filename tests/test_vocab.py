"""Laws of the vocabulary and of the median sketch: order of ids, sharing, hash, merge order, error bound."""

import gzip

import anndata
import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from mixgf import storage, vocab
from mixgf.config import SpeciesRow, UserError


def table(genes):
    return pa.table({"gene": genes, "symbol": [g.lower() for g in genes], "biotype": ["protein_coding"] * len(genes)})


MEDIANS = {"zebra": {"Z2": 2.0, "Z1": 1.0}, "ant": {"A1": 3.0, "A3": 1.5, "A2": 1.0}}
TABLES = {"zebra": table(["Z1", "Z2"]), "ant": table(["A1", "A2", "A3"])}
PAIRS = {("zebra", "ant"): {"Z2": "A1"}, ("ant", "zebra"): {"A1": "Z2"}}


def build(sharing="separate", medians=MEDIANS):
    return vocab.build(medians, TABLES, sharing=sharing, orthologs=PAIRS)


def test_ids_follow_the_specials_by_species_then_by_gene():
    v = build()
    assert v.genes() == ["<pad>", "<mask>", "<cls>", "Z1", "Z2", "A1", "A2", "A3"]
    assert v.symbols()[3:] == ["z1", "z2", "a1", "a2", "a3"]
    assert v.size == 8
    assert v.species == ("zebra", "ant")
    assert v.of("ant").genes.tolist() == ["A1", "A2", "A3"]
    assert v.of("ant").medians.tolist() == [3.0, 1.0, 1.5]
    assert v.species_tokens("ant").tolist() == [5, 6, 7]
    assert v.ortholog_map("ant", "zebra", PAIRS).tolist() == [-1, -1, -1, -1, -1, 4, -1, -1]


def test_one_to_one_orthologs_share_an_id_when_asked():
    v = build("ortholog")
    assert v.size == 7
    assert v.of("zebra").tokens.tolist() == [3, 4]
    assert v.of("ant").tokens.tolist() == [4, 5, 6]  # A1 is Z2
    assert v.of("ant").medians.tolist() == [3.0, 1.0, 1.5]  # its own median all the same
    assert v.genes()[4] == "Z2"


def test_three_species_never_give_one_id_to_two_genes_of_a_species():
    medians = {"a": {"A1": 1.0}, "b": {"B1": 1.0}, "c": {"C1": 1.0, "C2": 1.0}}
    pairs = {("b", "a"): {"B1": "A1"}, ("c", "a"): {"C1": "A1"}, ("c", "b"): {"C2": "B1"}}
    v = vocab.build(medians, {n: table(list(g)) for n, g in medians.items()}, sharing="ortholog", orthologs=pairs)
    assert len(set(v.of("c").tokens.tolist())) == 2


def test_a_gene_is_found_by_id_or_symbol_of_its_species_only():
    v = build()
    assert v.find("A2", "ant") == v.find("a2", "ant") == 6
    with pytest.raises(UserError, match=r"gene = 'Z1': not in the ant vocabulary"):
        v.find("Z1", "ant")
    with pytest.raises(UserError, match=r"species = 'cat': not in the vocabulary, which has zebra, ant"):
        v.find("Z1", "cat")


def test_the_hash_covers_what_decides_a_sentence_and_survives_a_round_trip(tmp_path):
    v = build()
    uri = str(tmp_path / "vocabulary.parquet")
    v.save(uri)
    again = vocab.Vocabulary.load(str(tmp_path))
    assert again.hash == v.hash
    assert again.table.equals(v.table)
    assert (again.species, again.sharing) == (v.species, v.sharing)
    other = {**MEDIANS, "ant": {**MEDIANS["ant"], "A2": 1.0000000001}}
    assert build(medians=other).hash != v.hash
    assert build("ortholog").hash != v.hash
    edited = v.table.set_column(4, "median", pa.array(np.full(5, 1.0)))
    storage.write_table(uri, edited.replace_schema_metadata(storage.read_table(uri).schema.metadata))
    with pytest.raises(UserError, match="does not fit its hash"):
        vocab.Vocabulary.load(uri)


def test_medians_are_imported_by_species_from_a_published_layout(tmp_path):
    rows = (
        SpeciesRow(name="human", taxon=9606, gene_prefix="ENSG", genes=""),
        SpeciesRow(name="mouse", taxon=10090, gene_prefix="ENSMUSG", genes=""),
    )
    known = {"human": {"ENSG01"}, "mouse": set()}
    text = "key\ttoken\tmedian\tname\n<pad>\t0\t\t\nENSG01\t2\t1.25\tA\nENSG02\t3\t2.5\tB\nENSMUSG07\t4\t0.5\tC\nX\t5\t1\tD\n"
    path = tmp_path / "m.tsv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert vocab.read_medians(str(path), rows, known) == {
        "human": {"ENSG01": 1.25, "ENSG02": 2.5},
        "mouse": {"ENSMUSG07": 0.5},
    }
    bad = tmp_path / "bad.tsv"
    bad.write_text("gene\tmedian\nENSG01\t-1\n")
    with pytest.raises(UserError, match="median of ENSG01 is -1"):
        vocab.read_medians(str(bad), rows, known)
    bad.write_text("name\tvalue\nENSG01\t-1\n")
    with pytest.raises(UserError, match="must have gene and median"):
        vocab.read_medians(str(bad), rows, known)


# sketch


def fill(counts_NG, keep=None, room=1000):
    counts_NG = np.asarray(counts_NG)
    rows, columns = np.nonzero(counts_NG)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(counts_NG)))]).astype(np.int64)
    a = vocab.Accumulator(counts_NG.shape[1], room=room)
    keep = np.ones(len(counts_NG), dtype=bool) if keep is None else keep
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
    found, true = vocab.finish(fill(counts)), exact(counts)
    assert found.keys() == true.keys()
    assert 7 not in found
    assert vocab.RELATIVE_ERROR <= 0.005
    assert max(abs(found[g] / true[g] - 1) for g in true) <= vocab.RELATIVE_ERROR


def test_the_error_bound_holds_from_the_smallest_share_to_the_whole_cell():
    for count, depth in [(1, 10**9), (1, 10**6), (1, 1), (999_999, 10**6), (1, 3)]:
        a = vocab.Accumulator(1)
        one = np.asarray([count], dtype=np.int32)
        a.update(
            one,
            np.zeros(1, np.int32),
            np.asarray([0, 1]),
            depth_N=np.asarray([depth]),
            keep_N=np.ones(1, bool),
            gene_G=np.zeros(1, np.int32),
        )
        assert vocab.finish(a.finish())[0] == pytest.approx(count / depth * 10_000, rel=vocab.RELATIVE_ERROR)


def test_merging_in_any_order_and_grouping_gives_the_same_sketch():
    rng = np.random.default_rng(2)
    counts = rng.negative_binomial(0.5, 0.1, (41, 30))
    whole = fill(counts)
    parts = [fill(counts[a : a + 7]) for a in range(0, 41, 7)]
    small = fill(counts, room=1)  # flushed at every block
    assert np.array_equal(small.keys, whole.keys)
    assert np.array_equal(small.counts, whole.counts)
    for order in (parts, parts[::-1], [vocab.merge(parts[3:]), vocab.merge(parts[:3])], [vocab.EMPTY, *parts]):
        merged = vocab.merge(order)
        assert np.array_equal(merged.keys, whole.keys)
        assert np.array_equal(merged.counts, whole.counts)


def test_the_error_bound_and_the_order_hold_on_real_cells():
    """All bundled human cells against numpy's exact medians, every fourth gene; two parts in two orders."""
    cells = anndata.read_h5ad(storage.local_path("resource:pancreas_human_baron.h5ad"))
    counts = cells.X.tocsr().astype(np.int64)
    depth = np.asarray(counts.sum(axis=1)).ravel()
    counts = counts[:, ::4]
    num_genes = counts.shape[1]
    parts = []
    for a in range(0, cells.n_obs, 1_100):
        part = counts[a : a + 1_100]
        sketch = vocab.Accumulator(num_genes, num_cells=part.shape[0], max_depth=int(depth[a : a + 1_100].max()))
        sketch.update(
            part.data.astype(np.int32), part.indices.astype(np.int32), part.indptr.astype(np.int64),
            depth_N=depth[a : a + 1_100], keep_N=np.ones(part.shape[0], bool), gene_G=np.arange(num_genes, dtype=np.int32),
        )  # fmt: skip
        parts.append(sketch.finish())
    forward, backward = vocab.merge(parts), vocab.merge(parts[::-1])
    assert np.array_equal(forward.keys, backward.keys)
    assert np.array_equal(forward.counts, backward.counts)
    found = vocab.finish(forward)
    columns = (sparse.diags_array(10_000 / depth) @ counts).tocsc()
    assert len(found) > 3_500
    errors = []
    for g in range(num_genes):
        values = columns.data[columns.indptr[g] : columns.indptr[g + 1]]
        assert (g in found) == (len(values) > 0)
        if len(values):
            errors.append(abs(found[g] / np.median(values) - 1))
    assert max(errors) <= vocab.RELATIVE_ERROR <= 0.005
    assert np.median(errors) < 0.25 * vocab.RELATIVE_ERROR  # values within a bucket are spread, not put at its edge


def test_dropped_cells_do_not_count():
    counts = np.asarray([[1, 1], [9, 1], [1, 9]])
    kept = fill(counts, keep=np.asarray([True, False, True]))
    assert np.array_equal(kept.keys, fill(counts[[0, 2]]).keys)
