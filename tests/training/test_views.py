import math

import numpy as np
import pytest

from mixgf import rng
from mixgf.corpus import packed, reader
from mixgf.errors import UserError
from mixgf.genes import species
from mixgf.training import views

MASK, CLS = 1, 2


@pytest.fixture(scope="module")
def uri(make_corpus):
    return make_corpus([5, 5], [0, 1], [2])


@pytest.fixture(scope="module")
def corpus(uri):
    return reader.Corpus(uri)


def masked(*, num_cells=3000, seed=0, epoch=0, view=0, visits=None, fraction=0.15):
    """Two genes per species: a draw of a special, or of the other species, cannot hide."""
    kinds = np.arange(num_cells) % 2
    tokens = np.stack([np.full(num_cells, CLS), 3 + 2 * kinds, 4 + 2 * kinds], 1).astype(np.int32).reshape(-1)
    offsets = np.arange(num_cells + 1) * 3
    visits = np.arange(num_cells) if visits is None else visits
    replacements = views.ReplacementGenes.by_species(
        [np.array([3, 4], dtype=np.int32), np.array([5, 6], dtype=np.int32)]
    )
    inputs, at, _ = views.mask_genes(
        (tokens, offsets), visits, kinds.astype(np.int8), replacements, fraction=fraction, key=(seed, epoch, view)
    )
    return tokens, inputs, at, np.repeat(kinds, 3)


def test_masking_law_with_two_genes_per_species():
    tokens, inputs, at, kinds = masked(num_cells=30_000)
    share = len(at) / 60_000
    assert share == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / 60_000))
    assert (tokens[at] != CLS).all()
    unchosen = np.setdiff1d(np.arange(len(tokens)), at)
    assert np.array_equal(inputs[unchosen], tokens[unchosen])
    is_mask = inputs[at] == MASK
    assert is_mask.mean() == pytest.approx(0.8, abs=0.02)
    replaced = at[~is_mask]
    assert set(inputs[replaced][kinds[replaced] == 0]) == {3, 4}
    assert set(inputs[replaced][kinds[replaced] == 1]) == {5, 6}
    # 10 % stay, and 10 % become one of two genes, half of them the other one
    assert (inputs[at] != tokens[at])[~is_mask].mean() == pytest.approx(0.25, abs=0.03)


def test_masks_are_keyed_by_seed_epoch_view_and_cell():
    chosen = masked()[2].tolist()
    assert masked()[2].tolist() == chosen
    for other in ({"seed": 1}, {"epoch": 1}, {"view": 1}, {"visits": np.arange(3000) + 3000}):
        assert masked(**other)[2].tolist() != chosen
    _, inputs, _, _ = masked()
    _, reversed_inputs, _, _ = masked(visits=np.arange(3000)[::-1].copy())
    assert np.array_equal((inputs == MASK).reshape(-1, 3)[::-1], (reversed_inputs == MASK).reshape(-1, 3))


def test_thinning_keeps_the_set_share_in_order_and_never_empties_a_cell():
    tokens = np.arange(3, 3 + 4000, dtype=np.int32)
    offsets = np.array([0, 1, 2000, 4000])
    out, bounds = views.subsample_genes((tokens, offsets), np.arange(3), 0.8, (0, 0, 1))
    assert (np.diff(out) > 0).all()
    assert np.diff(bounds)[0] == 1
    assert len(out) == pytest.approx(3200, abs=4 * math.sqrt(4000 * 0.16))


def test_translation_by_hand(corpus, uri):
    translate = views.Translator(corpus.vocabulary, species.orthologs((f"{uri}/orthologs.parquet",)))
    # 40 genes per species from id 3; the first 20 of each are partners
    tokens = np.array([CLS, 3, 30, 22, 43, 62, 63, 82, 35], dtype=np.int32)
    offsets = np.array([0, 4, 8, 9])
    (out, bounds), found = translate((tokens, offsets), np.arange(3), np.array([0, 1, 0]), (0, 0))
    assert out.tolist() == [CLS, 43, 62, 3, 22, 35]
    assert bounds.tolist() == [0, 3, 5, 6]
    assert found.tolist() == [True, True, False]


def test_orthologs_without_a_table_that_fits_are_refused(corpus, make_corpus):
    other = make_corpus([5], [0], [1], names=("rat", "pig"))
    with pytest.raises(UserError, match="links no two species"):
        views.Translator(corpus.vocabulary, {("rat", "pig"): {}})
    assert reader.Corpus(other).species == ("rat", "pig")


def test_masks_are_the_plain_ones_draw_by_draw():
    """The compiled pass against the law written out with the public hashes; empty and one-token cells, uneven replacements."""
    lengths, kinds, visits = (
        np.array([40, 0, 1, 300]),
        np.array([0, 1, 1, 0], dtype=np.int8),
        np.array([7, 8, 10**12, 2]),
    )
    offsets = packed.offsets_of(lengths)
    genes = [np.arange(3, 50, dtype=np.int32), np.arange(50, 57, dtype=np.int32)]
    tokens = np.random.default_rng(0).integers(0, 50, offsets[-1]).astype(np.int32)
    inputs, at, true = views.mask_genes(
        (tokens, offsets), visits, kinds, views.ReplacementGenes.by_species(genes), fraction=0.3, key=(5, 6, 1)
    )
    cell, place = np.repeat(np.arange(4), lengths), np.concatenate([np.arange(n) for n in lengths])
    chosen, action, gene = (rng.uniform(5, 6, 1, visits[cell], place, stream) for stream in range(3))
    expected = tokens.copy()
    where = np.flatnonzero((chosen < 0.3) & (tokens >= 3))
    for t in where:
        pool = genes[kinds[cell[t]]]
        expected[t] = MASK if action[t] < 0.8 else pool[int(gene[t] * len(pool))] if action[t] < 0.9 else tokens[t]
    assert at.tolist() == where.tolist()
    assert true.tolist() == tokens[where].tolist()
    assert inputs.tolist() == expected.tolist()
    assert (expected != tokens).sum() > 50


def test_places_looked_at_by_hand():
    at, begins, offsets = np.array([0, 3, 9]), np.array([0, 5, 9, 12], np.int32), np.array([0, 5, 9, 12, 14], np.int32)
    places, of_at, of_begins, bounds = views.merge_query_positions(at, begins, offsets)
    assert places.tolist() == [0, 3, 5, 9, 12]
    assert of_at.tolist() == [0, 1, 3]
    assert of_begins.tolist() == [0, 2, 3, 4]
    assert bounds.tolist() == [0, 2, 3, 4, 5]
    found = views.merge_query_positions(at, begins[:0], offsets)
    assert [x.tolist() for x in found] == [[0, 3, 9], [0, 1, 2], [], [0, 2, 2, 3, 3]]
    assert [len(x) for x in views.merge_query_positions(at[:0], begins[:0], offsets[:1])] == [0, 0, 0, 1]


def test_thinned_genes_are_the_plain_ones_draw_by_draw():
    """Each gene by a draw of its own; special tokens and first tokens stay, and masked genes may go."""
    lengths, visits = np.array([40, 0, 1, 30]), np.array([7, 8, 10**12, 2])
    offsets = packed.offsets_of(lengths)
    tokens = np.random.default_rng(0).integers(0, 6, offsets[-1]).astype(np.int32)
    found, bounds = views.subsample_genes((tokens, offsets), visits, 0.4, (5, 6, 1))
    cell, place = np.repeat(np.arange(4), lengths), np.concatenate([np.arange(n) for n in lengths])
    keep = (rng.uniform(5, 6, 1, visits[cell], place, 3) < 0.4) | (place == 0) | ((tokens < 3) & (tokens != MASK))
    assert found.tolist() == tokens[keep].tolist()
    assert np.diff(bounds).tolist() == np.bincount(cell[keep], minlength=4).tolist()
    assert 20 < len(found) < 60


def test_sides_are_fair_coins_of_token_and_key():
    side = views.gene_sides(10_000, (3, 4))
    assert side.tolist() == (rng.uniform(3, 4, 5, np.arange(10_000)) < 0.5).tolist()
    assert side.mean() == pytest.approx(0.5, abs=0.02)


def test_genes_of_a_side_by_hand():
    side = np.array([False, False, False, True, True, False, False])
    tokens, offsets = np.array([CLS, 3, 5, 4, 6, 5, 3], np.int32), np.array([0, 4, 6, 6, 7])
    (out, bounds), places = views.genes_of_side((tokens, offsets), side)
    # <cls> stays; the second cell has no gene of the side and keeps its first token; the third is empty
    assert out.tolist() == [CLS, 3, 4, 6, 3]
    assert bounds.tolist() == [0, 3, 4, 4, 5]
    assert places.tolist() == [0, 1, 3, 0, 0]


def test_with_two_other_species_each_cell_is_translated_to_one_drawn_evenly(make_corpus):
    uri = make_corpus([5, 5, 5], [0, 1, 2], [3], names=("human", "mouse", "rat"))
    vocabulary = reader.Corpus(uri).vocabulary
    translate = views.Translator(vocabulary, species.orthologs((f"{uri}/orthologs.parquet",)))
    num = 3000
    kinds, visits = np.arange(num) % 3, np.arange(num) + 50
    tokens = (3 + 40 * kinds + 7).astype(np.int32)  # gene 7 of the own species, an ortholog in both others
    (out, bounds), found = translate((tokens, np.arange(num + 1)), visits, kinds, (8, 9))
    assert found.all()
    assert bounds.tolist() == list(range(num + 1))
    draw = rng.uniform(8, 9, visits, 4)
    others = np.array([[1, 2], [0, 2], [0, 1]])
    assert out.tolist() == (3 + 40 * others[kinds, (draw >= 0.5).astype(int)] + 7).tolist()
    assert np.bincount((out - 3) // 40, minlength=3) == pytest.approx([1000] * 3, abs=130)


def test_special_tokens_are_no_translation_and_stay_in_one(corpus, uri):
    translate = views.Translator(corpus.vocabulary, species.orthologs((f"{uri}/orthologs.parquet",)))
    tokens, offsets = np.array([CLS, 30, CLS, 3, MASK], np.int32), np.array([0, 2, 5])
    (out, bounds), found = translate((tokens, offsets), np.arange(2), np.array([0, 0]), (0, 0))
    assert found.tolist() == [False, True]  # <cls> and a gene without an ortholog: no translation
    assert out.tolist() == [CLS, 30, CLS, 43, MASK]
    assert bounds.tolist() == [0, 2, 5]
