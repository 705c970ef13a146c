import itertools

import numpy as np
import pytest
import torch

from mixgf import errors
from mixgf.corpus import packed, reader
from mixgf.encoder.batch import pack_batch
from mixgf.rng import dropout_keys, hashed
from mixgf.storage import files
from mixgf.training import batch_plan

LENGTHS = [5, 1, 7, 3, 3, 9, 2]
SPECIES = [0, 1, 0, 1, 0, 0, 1]


@pytest.fixture(scope="module")
def uri(make_corpus):
    return make_corpus(LENGTHS, SPECIES, [3, 1, 3])


def test_packed_tokens_are_the_sentences_in_the_order_asked(uri):
    corpus = reader.Corpus(uri)
    sentences = [t for i in range(3) for t in corpus.table(i, ["tokens"]).column("tokens").to_pylist()]
    assert [len(s) for s in sentences] == LENGTHS == corpus.lengths_N.tolist()
    for cells in ([6, 0, 3, 3, 5], [2], [], list(range(7))):
        tokens, offsets = corpus.tokens(cells)
        assert [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [sentences[c] for c in cells]


def test_memory_is_bounded_by_the_number_of_cached_shards(uri):
    corpus = reader.Corpus(uri, cached_shards=1)
    expected = reader.Corpus(uri).tokens(range(7))[0]
    assert np.array_equal(corpus.tokens(range(7))[0], expected)
    assert len(corpus._cache) == 1


def test_a_corpus_opened_with_a_bound_has_the_first_tokens_of_every_sentence(make_corpus):
    uri = make_corpus(LENGTHS, SPECIES, [3, 4])
    whole, few = reader.Corpus(uri), reader.Corpus(uri, max_len=3)
    tokens_T, offsets = few.tokens([6, 0, 3])
    assert np.array_equal(few.lengths_N, np.minimum(LENGTHS, 3))
    assert np.array_equal(tokens_T, np.concatenate([whole.tokens([cell])[0][:3] for cell in (6, 0, 3)]))
    assert offsets.tolist() == [0, *np.cumsum(few.lengths_N[[6, 0, 3]])]


def test_a_cut_batch_is_the_batch_of_the_cut_sentences():
    tokens_T, offsets = np.arange(9, dtype=np.int32), np.array([0, 2, 7, 9])
    keys = np.array([5, 6, 7], dtype=np.uint64)
    cut = pack_batch([(tokens_T, offsets)], range(3), keys).truncate(3)
    same = pack_batch([packed.truncate(tokens_T, offsets, 3)], range(3), keys)
    for name in ("ids_T", "offsets_B1", "positions_T", "cells_B", "keys_T"):
        assert torch.equal(getattr(cut, name), getattr(same, name)), name
    assert cut.max_len == same.max_len == 3
    assert cut.offsets_B1.dtype == torch.int32


def test_an_epoch_reads_every_shard_once_and_holds_a_window_of_them(make_corpus, monkeypatch):
    """Batches straddle windows, and shards are empty, small and large; more workers read as much each."""
    rng = np.random.default_rng(0)
    rows = [3, 0, 17, 9, 1, 30, 12, 8, 0, 22, 5, 14, 19, 2, 11, 6]
    corpus = reader.Corpus(make_corpus(rng.integers(2, 9, sum(rows)), np.arange(sum(rows)) % 2, rows))
    order = batch_plan.BatchPlan(corpus.lengths_N, corpus.species_N, rows, seed=0, batch_cells=40)
    read, table = [], corpus.table
    monkeypatch.setattr(corpus, "table", lambda shard, columns: read.append(shard) or table(shard, columns))
    for step in range(order.steps_per_epoch):
        corpus.tokens(order.share(step).cells_B)
        assert len(corpus._cache) <= batch_plan.WINDOW_SHARDS == reader.CACHED_SHARDS
    assert sorted(read) == [shard for shard, n in enumerate(rows) if n]


def test_obs_comes_in_cell_order_and_names_unknown_columns(uri):
    corpus = reader.Corpus(uri)
    assert corpus.obs(["cell"])["cell"].tolist() == [f"source:{i}" for i in range(7)]
    assert "tokens" not in corpus.obs().columns
    assert corpus.obs()["species"].tolist() == [("human", "mouse")[s] for s in SPECIES]
    with pytest.raises(errors.UserError, match="no column 'donor'; there are cell, species"):
        corpus.obs(["donor"])


def test_obs_of_some_cells_are_their_rows_of_obs_and_other_shards_are_not_read(uri, monkeypatch):
    corpus = reader.Corpus(uri)
    whole, read, table = corpus.obs(["species", "cell"]), [], corpus.table
    monkeypatch.setattr(corpus, "table", lambda shard, columns: read.append(shard) or table(shard, columns))
    found = corpus.obs_of(np.array([6, 1, 4, 1]), ["species", "cell"])
    assert found.equals(whole.iloc[[6, 1, 4, 1]].reset_index(drop=True))
    assert read == [0, 2]
    with pytest.raises(errors.UserError, match="no column 'donor'; there are cell, species"):
        corpus.obs_of(np.array([6]), ["donor"])


def test_a_corpus_with_another_vocabulary_is_refused(make_corpus):
    uri, other = make_corpus(LENGTHS, SPECIES, [7]), make_corpus(LENGTHS, SPECIES, [7], genes=41)
    files.write_bytes(f"{uri}/vocabulary.parquet", files.read_bytes(f"{other}/vocabulary.parquet"))
    with pytest.raises(errors.UserError, match="not the one its tokens were made with"):
        _ = reader.Corpus(uri).vocabulary


def test_a_shard_that_does_not_fit_the_index_is_refused(make_corpus):
    uri, other = make_corpus(LENGTHS, SPECIES, [3, 4]), make_corpus(LENGTHS[::-1], SPECIES, [3, 4])
    files.write_bytes(f"{uri}/shards/00000.parquet", files.read_bytes(f"{other}/shards/00000.parquet"))
    with pytest.raises(errors.UserError, match=r"00000.parquet: damaged \(it has other bytes than were written\)"):
        reader.Corpus(uri).tokens([0])


def test_pack_and_cut_by_hand():
    tokens, offsets = np.array([10, 11, 12, 20], dtype=np.int32), np.array([0, 3, 4])
    batch = pack_batch([(tokens, offsets)], [7, 9])
    assert batch.positions_T.tolist() == [0, 1, 2, 0]
    assert (batch.max_len, batch.num_cells, batch.num_tokens) == (3, 2, 4)
    assert batch.keys_T is None
    few, bounds = packed.truncate(tokens, offsets, 2)
    assert few.tolist() == [10, 11, 20]
    assert bounds.tolist() == [0, 2, 3]


def test_packs_of_several_views_lie_one_after_the_other_with_the_plain_dropout_keys():
    first = np.array([10, 11, 12, 20], dtype=np.int32), np.array([0, 3, 3, 4])
    second = np.array([11, 20, 21], dtype=np.int32), np.array([0, 1, 1, 3])
    visits = np.array([7, 8, 10**12])
    batch = pack_batch([first, second], [7, 8, 9], hashed(3, 1, visits))
    assert batch.ids_T.tolist() == [10, 11, 12, 20, 11, 20, 21]
    assert batch.offsets_B1.tolist() == [0, 3, 3, 4, 5, 5, 7]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 0, 0, 1]
    assert batch.cells_B.tolist() == [7, 8, 9, 7, 8, 9]
    assert batch.max_len == 3
    visit_T, view_T = np.array([7, 7, 7, 10**12, 7, 10**12, 10**12]), np.array([0, 0, 0, 0, 1, 1, 1])
    assert torch.equal(batch.keys_T, dropout_keys(3, 1, visit_T, view_T, batch.positions_T.numpy()))
    none = pack_batch([(first[0][:0], np.array([0]))], [])
    assert (none.num_cells, none.num_tokens, none.max_len) == (0, 0, 1)
