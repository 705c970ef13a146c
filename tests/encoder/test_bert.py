import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixgf import rng
from mixgf.config import parse, training
from mixgf.encoder import checkpoint, huggingface
from mixgf.encoder.bert import (
    _CHUNK_ELEMENTS,
    Encoder,
    MaskedModel,
    chunked_cross_entropy,
    forward_flops,
    head_flops,
    pool_tokens,
)

ROW = training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=48, max_positions=24, dropout=0.25, init_sd=0.2)
LENGTHS = [7, 7, 3, 24, 1, 5]
V = 50


def packed(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return torch.randint(3, V, (int(offsets[-1]),), generator=generator), offsets


def keys_for(visits, lengths, view=0):
    visit_T = np.repeat(visits, lengths)
    position_T = np.concatenate([np.arange(n) for n in lengths])
    return rng.dropout_keys(1, 0, visit_T, view, position_T)


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    sizes = transformers.BertConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, hidden_act="silu",
        max_position_embeddings=24, layer_norm_eps=1e-12, type_vocab_size=2, initializer_range=0.2,
    )  # fmt: skip
    reference = transformers.BertForMaskedLM(sizes).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return reference


def test_hidden_states_and_logits_equal_those_of_hugging_face_bert(bert):
    ours = MaskedModel(ROW, V).eval()
    checkpoint.load_weights(ours, huggingface.from_bert(bert.state_dict(), ROW), "reference")
    ids, offsets = packed()
    for layers in (0, 1, 2):
        h = ours.encoder(ids, offsets, layers=layers)
        for a, b in itertools.pairwise(offsets):
            theirs = bert(input_ids=ids[None, a:b], output_hidden_states=True)
            assert torch.allclose(h[a:b], theirs.hidden_states[layers][0], atol=1e-5, rtol=0)
            if layers == 2:
                assert torch.allclose(ours.logits(h[a:b]), theirs.logits[0], atol=1e-4, rtol=1e-5)


def test_weights_survive_the_way_to_hugging_face_and_back(bert):
    ours = MaskedModel(ROW, V, seed=3)
    state = huggingface.to_bert(ours)
    back = huggingface.from_bert(state, ROW)
    assert all(torch.equal(back[name], p) for name, p in ours.named_parameters())
    theirs = {k: v for k, v in bert.state_dict().items() if "token_type" not in k and "position_ids" not in k}
    assert {k: tuple(v.shape) for k, v in theirs.items()} == {
        k: tuple(v.shape) for k, v in state.items() if "token_type" not in k
    }


@pytest.mark.parametrize("attention_dropout", [0.0, 0.3], ids=["residual dropout", "attention dropout too"])
def test_dropout_depends_on_the_cell_and_not_on_the_batch(attention_dropout):
    row = training.Model(**(parse.to_dict(ROW) | {"attention_dropout": attention_dropout}))
    encoder = Encoder(row, V)
    ids, offsets = packed()
    visits = np.arange(len(LENGTHS)) + 100
    together = encoder(ids, offsets, keys=keys_for(visits, LENGTHS))
    for i in range(len(LENGTHS)):
        a, b = int(offsets[i]), int(offsets[i + 1])
        few = torch.tensor([0, b - a], dtype=torch.int32)
        alone = encoder(ids[a:b], few, keys=keys_for(visits[i : i + 1], LENGTHS[i : i + 1]))
        assert torch.allclose(together[a:b], alone, atol=1e-5)
    other_view = encoder(ids, offsets, keys=keys_for(visits, LENGTHS, view=1))
    assert (together - other_view).abs().max() > 0.1
    assert (together - encoder(ids, offsets)).abs().max() > 0.1


@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_states_at_queries_are_those_of_the_whole_run_with_equal_gradients(attention_dropout, layers):
    row = training.Model(**(parse.to_dict(ROW) | {"attention_dropout": attention_dropout}))
    encoder = Encoder(row, V)
    ids, offsets = packed()
    keys = keys_for(np.arange(len(LENGTHS)), LENGTHS)
    at = torch.tensor([0, 3, 14, 20, 21, 40, 41, 46])  # none in the second cell, one or more in the others
    bounds = torch.searchsorted(at, offsets.long()).int()
    assert torch.diff(bounds).tolist() == [2, 0, 1, 3, 1, 1]
    whole = encoder(ids, offsets, keys=keys, layers=layers)[at]
    asked = encoder(ids, offsets, keys=keys, layers=layers, queries=(at, bounds))
    assert torch.allclose(asked, whole, atol=1e-5, rtol=0)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    used = [p for name, p in encoder.named_parameters() if "layers" not in name or int(name.split(".")[1]) < layers]
    for mine, theirs in zip(
        torch.autograd.grad((asked * weights).sum(), used),
        torch.autograd.grad((whole * weights).sum(), used),
        strict=True,
    ):
        assert (mine - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


def test_no_queries_give_no_states():
    ids, offsets = packed()
    nothing = (torch.zeros(0, dtype=torch.int64), torch.zeros(len(offsets), dtype=torch.int32))
    assert Encoder(ROW, V)(ids, offsets, queries=nothing).shape == (0, 32)


def test_packed_states_equal_those_of_padded_batches_grouped_by_length(bert):
    """The other way to batch cells of unequal length: pad to the longest of a group and mask the padding."""
    ours = MaskedModel(ROW, V).eval()
    checkpoint.load_weights(ours, huggingface.from_bert(bert.state_dict(), ROW), "reference")
    ids, offsets = packed()
    h = ours.encoder(ids, offsets)
    cells = [ids[a:b] for a, b in itertools.pairwise(offsets)]
    for group in ([4, 2, 5], [0, 1], [3]):
        padded = torch.nn.utils.rnn.pad_sequence([cells[i] for i in group], batch_first=True)
        theirs = bert(input_ids=padded, attention_mask=(padded > 0).long(), output_hidden_states=True).hidden_states[-1]
        for i, states in zip(group, theirs, strict=True):
            assert torch.allclose(h[offsets[i] : offsets[i + 1]], states[: LENGTHS[i]], atol=1e-5, rtol=0)


def test_dropout_keeps_the_set_share_in_every_channel_and_the_expected_value():
    keys = rng.dropout_keys(0, 0, np.repeat(np.arange(200), 50), 0, np.tile(np.arange(50), 200))
    drop = rng.dropped(keys, 4, 33, round(0.1 * 65536)).float()
    assert drop.shape == (10_000, 33)
    assert (drop.mean(0) - 0.1).abs().max() < 5 * (0.09 / 10_000) ** 0.5
    assert (drop.mean(1) - 0.1).abs().max() < 6 * (0.09 / 33) ** 0.5
    centred = drop - drop.mean(0)
    correlation = (centred.t() @ centred) / (10_000 * 0.09) - torch.eye(33)
    assert correlation.abs().max() < 0.06
    assert (rng.dropped(keys, 5, 33, round(0.1 * 65536)).float() * drop).mean() == pytest.approx(0.01, abs=0.002)


def test_chunked_cross_entropy_and_its_gradients_equal_the_plain_ones(monkeypatch):
    monkeypatch.setitem(_CHUNK_ELEMENTS, "cpu", 3 * V)  # 3 rows at a time: 7 positions make 3 chunks
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 8, generator=generator, requires_grad=True)
    weight = torch.randn(V, 8, generator=generator, requires_grad=True)
    bias = torch.randn(V, generator=generator, requires_grad=True)
    targets = torch.randint(0, V, (7,), generator=generator)
    plain = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")
    expected = torch.autograd.grad(plain * 0.5, (x, weight, bias))
    ours = chunked_cross_entropy(x, weight, bias, targets)
    assert torch.allclose(ours, plain, rtol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(ours * 0.5, (x, weight, bias)), expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_chunked_cross_entropy_of_no_positions_is_zero_with_zero_gradients():
    head = MaskedModel(ROW, V)
    h = torch.zeros(0, 32, requires_grad=True)
    loss = head.loss(h, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert head.encoder.tokens.grad.abs().sum() == 0


def test_pooling_by_hand():
    h = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 9.0]])
    offsets = torch.tensor([0, 3, 4], dtype=torch.int32)
    assert pool_tokens(h, offsets, "mean").tolist() == [[3.0, 4.0], [7.0, 9.0]]
    assert pool_tokens(h, offsets, "first").tolist() == [[1.0, 2.0], [7.0, 9.0]]
    assert pool_tokens(h, offsets, "mean", cls=True).tolist() == [[4.0, 5.0], [0.0, 0.0]]


def test_pooling_has_the_gradient_of_a_mean():
    h = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pool_tokens(h, torch.tensor([0, 3, 4], dtype=torch.int32), "mean").sum().backward()
    assert torch.allclose(h.grad, torch.tensor([[1 / 3] * 2] * 3 + [[1.0] * 2]))


def test_initial_weights_depend_on_the_seed_only():
    a, b, c = (MaskedModel(ROW, V, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.encoder.tokens, c.encoder.tokens)
    assert a.encoder.tokens[0].abs().sum() == 0
    assert a.encoder.tokens[1:].std().item() == pytest.approx(0.2, rel=0.1)


def test_flops_by_hand():
    row = training.Model(num_layers=1, dim=2, num_heads=1, ffn_dim=3)
    # one token: q, k, v, out are 2x2 and the feed-forward 2x3 and 3x2: 16 + 12 multiply-adds; scores and weighted sum 2 + 2
    assert forward_flops(row, [1]) == 2 * 28 + 2 * 4
    assert forward_flops(row, [2]) == 2 * 2 * 28 + 4 * 2 * 4
    # the last layer at one query of two tokens: keys and values of both (2 x 8), the rest (8 + 12) and scores (4 + 4) of one
    assert forward_flops(row, [2], queries=[1]) == 2 * (2 * 8 + 20) + 2 * 8
    assert forward_flops(row, [2, 5], queries=[2, 5]) == forward_flops(row, [2, 5])
    assert head_flops(row, 10, 3) == 2 * 3 * (4 + 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_variable_length_attention_on_cuda_equals_attention_per_cell():
    row = training.Model(num_layers=2, dim=128, num_heads=2, ffn_dim=256, max_positions=600)
    encoder = Encoder(row, V)
    lengths = [600, 17, 17, 300, 1]
    ids, offsets = packed(lengths)
    expected = encoder(ids, offsets)
    encoder.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = encoder(ids.cuda(), offsets.cuda())
    assert F.cosine_similarity(ours.float().cpu(), expected, dim=1).min() > 0.999
