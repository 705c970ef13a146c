import numpy as np
import pytest
import torch

from mixgf.config import training
from mixgf.corpus import reader
from mixgf.encoder import embed
from mixgf.encoder.bert import Encoder, pool_tokens

ROW = training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=48, max_positions=40)


@pytest.fixture(scope="module")
def corpus(make_corpus):
    lengths = [5, 1, 17, 3, 3, 40, 2, 17]
    return reader.Corpus(make_corpus(lengths, [0, 1] * 4, [5, 3]))


def test_a_cell_is_bitwise_the_same_whatever_its_batch_mates(corpus):
    encoder = Encoder(ROW, corpus.vocabulary.size)
    together = embed.embed_cells(encoder, corpus, range(8))
    assert together.shape == (8, 32)
    for cells in ([0], [5, 0], [7, 2, 1], [3, 3, 4]):
        assert np.array_equal(embed.embed_cells(encoder, corpus, cells), together[cells])


def test_vectors_are_the_pooled_states_of_the_layer_asked_for(corpus):
    encoder = Encoder(ROW, corpus.vocabulary.size)
    tokens, offsets = corpus.tokens([5])
    for layer, layers in ((-1, 2), (-2, 1), (-3, 0)):
        h = encoder(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(offsets), layers=layers)
        for pooling in ("mean", "first"):
            expected = pool_tokens(h, torch.from_numpy(offsets), pooling).detach().numpy()
            assert np.array_equal(embed.embed_cells(encoder, corpus, [5], pooling, layer), expected)


def test_layer_all_is_all_layers_side_by_side(corpus):
    encoder = Encoder(ROW, corpus.vocabulary.size)
    cells = [5, 0, 7]
    for pooling in ("mean", "first"):
        parts = [embed.embed_cells(encoder, corpus, cells, pooling, layer) for layer in (-3, -2, -1)]
        assert np.array_equal(embed.embed_cells(encoder, corpus, cells, pooling, "all"), np.hstack(parts))


def test_embedding_leaves_the_encoder_as_it_was(corpus):
    encoder = Encoder(ROW, corpus.vocabulary.size).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    embed.embed_cells(encoder, corpus, [0, 1], max_len=2)
    assert encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize("micro_tokens", [0, 1, 40, 1000])
def test_batches_made_ahead_are_those_made_one_by_one_and_give_the_same_vectors(corpus, monkeypatch, micro_tokens):
    """The CPU twin of the path of a GPU, where batches also go through pinned memory. Chunks are of three cells."""
    monkeypatch.setattr(embed, "_FETCH_CELLS", 3)
    encoder, cells = Encoder(ROW, corpus.vocabulary.size).eval(), np.array([5, 0, 7, 2, 2, 6, 1])
    runs = embed.PackedRuns(corpus, cells, 30, micro_tokens)
    one_by_one = [runs(number) for number in range(len(runs))]
    with runs.ahead() as batches:
        made = list(batches)
    assert len(made) == len(one_by_one) == {0: 7, 1: 7, 40: 4, 1000: 3}[micro_tokens]
    for a, b in zip(made, one_by_one, strict=True):
        assert torch.equal(a.ids_T, b.ids_T)
        assert torch.equal(a.offsets_B1, b.offsets_B1)
        assert torch.equal(a.cells_B, b.cells_B)
    order = np.concatenate([runs.chunk(n) for n in range(len(runs)) if runs.ends_chunk(n)])
    assert torch.cat([batch.cells_B for batch in made]).tolist() == cells[order].tolist()
    how = {"pooling": "mean", "layer": -1, "precision": "fp32"}
    with torch.inference_mode():
        expected = embed.embed_runs(encoder, corpus, runs, one_by_one, **how)
        with runs.ahead() as batches:
            assert np.array_equal(embed.embed_runs(encoder, corpus, runs, batches, **how), expected)
    alone = embed.embed_cells(encoder, corpus, cells, max_len=30)
    assert np.array_equal(expected, alone) if micro_tokens < 2 else np.allclose(expected, alone, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_packed_vectors_on_cuda_are_those_of_the_cpu(corpus):
    encoder = Encoder(ROW, corpus.vocabulary.size)
    expected = embed.embed_cells(encoder, corpus, range(8))
    assert np.allclose(embed.embed_cells(encoder.cuda(), corpus, range(8)), expected, atol=1e-4)
