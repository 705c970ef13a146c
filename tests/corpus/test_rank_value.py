"""Laws of rank value encoding (paper section 3.2): golden sentences, exact ties, doubling, joint vocabulary, truncation."""

from itertools import pairwise
from math import nextafter

import numpy as np
import pytest
from scipy import sparse

from mixgf.config.data import Tokens
from mixgf.corpus.rank_value import TABLE_COUNTS, Encoder, Ranks
from mixgf.genes.vocabulary import CLS, SpeciesGenes


def genes_of(medians, first=3):
    n = len(medians)
    names = np.asarray([f"G{i:05d}" for i in range(n)], dtype=object)
    return SpeciesGenes(names, np.arange(first, first + n, dtype=np.int32), np.asarray(medians, dtype=np.float64))


def sentences(counts_NG, genes, position_G=None, **tokens):
    x = sparse.csr_array(np.asarray(counts_NG))
    position_G = np.arange(x.shape[1], dtype=np.int32) if position_G is None else np.asarray(position_G, dtype=np.int32)
    how = Tokens(**tokens)
    encode = Encoder(Ranks.of(genes, how.scaling), position_G, how)
    ids, offsets = encode(x.data.astype(np.int32), x.indices.astype(np.int32), x.indptr.astype(np.int64))
    assert ids.dtype == np.int32
    assert offsets.dtype == np.int64
    return [ids[a:b].tolist() for a, b in pairwise(offsets)]


def straightforward(counts_NG, genes, *, most=2048, divide=True):
    """The published formula per cell, in full, with the tie rule by an exact sort on (-x, token)."""
    out = []
    for row in np.asarray(counts_NG):
        x = [
            (c / m if divide else c * m, t)
            for c, m, t in zip(row.tolist(), genes.medians, genes.tokens.tolist(), strict=True)
            if c
        ]
        out.append([t for _, t in sorted(x, key=lambda pair: (-pair[0], pair[1]))][:most])
    return out


def test_golden_sentence_worked_by_hand():
    # counts / medians: 4/2 = 2, 3/1 = 3, absent, 2/4 = .5, 6/3 = 2 (a tie with the first: the lower id comes first)
    genes = genes_of([2.0, 1.0, 1.0, 4.0, 3.0])
    assert sentences([[4, 3, 0, 2, 6]], genes) == [[4, 3, 7, 6]]
    # count * median: 8, 3, absent, 8, 18
    assert sentences([[4, 3, 0, 2, 6]], genes, scaling="multiply") == [[7, 3, 6, 4]]
    assert sentences([[4, 3, 0, 2, 6]], genes, cls=True) == [[CLS, 4, 3, 7, 6]]
    assert sentences([[4, 3, 0, 2, 6]], genes, cls=True, max_len=3) == [[CLS, 4, 3]]


@pytest.mark.parametrize("kind", ["distinct", "coarse", "equal"])
@pytest.mark.parametrize("scaling", ["divide", "multiply"])
@pytest.mark.parametrize("scale", [1, 6, 400], ids=["small", "around the table's edge", "reads"])
def test_sentences_are_those_of_the_formula_ties_included(kind, scaling, scale):
    rng = np.random.default_rng([7, len(kind)])
    medians = {"distinct": rng.lognormal(0.5, 1, 300), "coarse": rng.integers(1, 4, 300) / 2, "equal": np.ones(300)}[
        kind
    ]
    genes = genes_of(medians)
    counts = rng.negative_binomial(0.5, 0.2, (40, 300)) * rng.integers(1, scale + 1, (40, 300))
    counts[3] = 0
    assert (counts > TABLE_COUNTS).any()
    expected = straightforward(counts, genes, most=64, divide=scaling == "divide")
    assert sentences(counts, genes, max_len=64, scaling=scaling) == expected


def test_values_that_differ_in_the_last_bit_are_ordered_by_value_even_across_the_cut():
    # medians one ulp apart give values one ulp apart
    medians = [2.0]
    for _ in range(5):
        medians.append(nextafter(medians[-1], 3))
    up, down = genes_of(medians), genes_of(medians[::-1])
    for genes in (up, down):
        for most in (2, 3, 6):
            for count in (3, 3 * TABLE_COUNTS):
                counts = [[count] * 6]
                assert sentences(counts, genes, max_len=most) == straightforward(counts, genes, most=most)
    assert straightforward(counts, down)[0][0] == down.tokens[-1]  # the smallest median, the highest id, comes first


def test_equal_values_on_both_sides_of_the_table_go_by_token_too():
    # 16 / 1 = 32 / 2 = 48 / 3: one looked up, two sorted, in every order of ids
    for medians in ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]):
        counts = [[int(m) * TABLE_COUNTS for m in medians]]
        assert sentences(counts, genes_of(medians)) == [[3, 4, 5]]
        assert sentences(counts, genes_of(medians), max_len=2) == [[3, 4]]


def test_doubling_every_count_changes_nothing():
    rng = np.random.default_rng(3)
    counts = rng.negative_binomial(0.5, 0.1, (30, 200))
    genes = genes_of(rng.lognormal(0, 1, 200))
    assert sentences(counts * 2, genes) == sentences(counts, genes)


def test_a_cell_gets_the_same_genes_in_the_joint_vocabulary_as_in_its_own():
    rng = np.random.default_rng(4)
    counts = rng.negative_binomial(0.5, 0.1, (10, 50))
    medians = rng.integers(1, 3, 50).astype(float)
    own, joint = genes_of(medians), genes_of(medians, first=40_000)
    shifted = [[t - 40_000 + 3 for t in s] for s in sentences(counts, joint)]
    assert shifted == sentences(counts, own)


def test_unknown_columns_and_zeros_never_appear_and_no_token_twice():
    rng = np.random.default_rng(5)
    counts = rng.negative_binomial(0.5, 0.1, (10, 6))
    position = [2, -1, 0, 1, -1, -1]
    for sentence, row in zip(sentences(counts, genes_of([1.0, 1.0, 1.0]), position), counts, strict=True):
        assert len(set(sentence)) == len(sentence)
        assert set(sentence) == {3 + p for p, c in zip(position, row, strict=True) if p >= 0 and c}


def test_more_than_65536_genes_still_get_their_own_order():
    n = 70_000
    genes = genes_of(np.ones(n))
    counts = sparse.random_array((2, n), density=0.01, rng=np.random.default_rng(1), format="csr")
    columns = [np.sort(counts.indices[a:b]) for a, b in pairwise(counts.indptr)]
    x = np.zeros((2, n), dtype=np.int64)
    for row, c in zip(x, columns, strict=True):
        row[c] = 1
    assert sentences(x, genes) == [(c + 3).tolist()[:2048] for c in columns]


def test_blocks_do_not_matter():
    rng = np.random.default_rng(6)
    counts = rng.negative_binomial(0.5, 0.1, (17, 80))
    genes = genes_of(np.ones(80))
    whole = sentences(counts, genes)
    assert whole == [s for a in range(0, 17, 5) for s in sentences(counts[a : a + 5], genes)]
