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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_packed_vectors_on_cuda_are_those_of_the_cpu(corpus):
    encoder = Encoder(ROW, corpus.vocabulary.size)
    expected = embed.embed_cells(encoder, corpus, range(8))
    assert np.allclose(embed.embed_cells(encoder.cuda(), corpus, range(8)), expected, atol=1e-4)
