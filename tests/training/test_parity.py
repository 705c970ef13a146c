"""One training step in other precisions, on other devices, padded instead of packed, and again."""

import pytest
import torch
import torch.nn.functional as F

from mixgf import rng
from mixgf.config import data, training
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.encoder import bert
from mixgf.encoder.bert import MaskedModel
from mixgf.training.loop import TaskForward, compute_gradients
from mixgf.training.pretraining import Pretraining
from mixgf.training.worker_group import LocalContext

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROW = training.Model(num_layers=2, dim=64, num_heads=2, ffn_dim=96, max_positions=40, dropout=0.1, init_sd=0.05)
LENGTHS = [31, 7, 7, 40, 1, 18, 40, 12]
OBJECTIVES = {"mean": {}, "first": {"pooling": "first"}, "mlm": {"contrast_weight": 0.0}}
STATES, COSINE = {"fp32": 1e-4, "bf16": 2e-2}, {"fp32": 0.999, "bf16": 0.98}
on_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
DEVICES = [CPU, pytest.param(CUDA, marks=on_cuda)]


@pytest.fixture(scope="module")
def corpus(make_corpus):
    return Corpus(make_corpus(LENGTHS, [i % 2 for i in range(8)], [8]))


def step(corpus, device, precision, **objective):
    """Losses, gradients and hidden states of the first step."""
    train = training.Train(batch_cells=8, micro_tokens=10_000, precision=precision)
    settings = Config(model=ROW, tokens=data.Tokens(max_len=40), objective=training.Objective(**objective), train=train)
    task = Pretraining(settings, corpus)
    model = MaskedModel(ROW, corpus.vocabulary.size, seed=1).to(device)
    work = task.work(0, 0, 1)
    losses = {k: v.item() for k, v in compute_gradients(TaskForward(model, task), work, LocalContext(device)).items()}
    gradients = {k: p.grad.cpu() for k, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        states = task.hidden(model, work.micros[0].to(device)).float().cpu()
    return losses, gradients, states


def assert_like(found, truth, *, states, cosine):
    assert found[0].keys() == truth[0].keys()
    for name, value in truth[0].items():
        assert found[0][name] == pytest.approx(value, rel=states, abs=states), name
    assert found[1].keys() == truth[1].keys()
    for name, gradient in truth[1].items():
        if gradient.norm() > 0:
            got = F.cosine_similarity(found[1][name].double().flatten(), gradient.double().flatten(), dim=0)
            assert got > cosine, name
    assert (found[2] - truth[2]).norm() < states * truth[2].norm()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("device", "precision"),
    [(CPU, "bf16"), pytest.param(CUDA, "fp32", marks=on_cuda), pytest.param(CUDA, "bf16", marks=on_cuda)],
)
def test_a_step_is_that_of_the_cpu_in_fp32(corpus, device, precision, objective):
    truth = step(corpus, CPU, "fp32", **OBJECTIVES[objective])
    found = step(corpus, device, precision, **OBJECTIVES[objective])
    assert_like(found, truth, states=STATES[precision], cosine=COSINE[precision])
    if precision == "bf16":
        assert not torch.equal(found[2], truth[2])


def padded_attention(q_RHE, k_THE, v_THE, asked, cells):
    """Attention over sentences that are padded to the longest one, with a mask."""

    def pad(x_THE, lengths):
        return torch.nn.utils.rnn.pad_sequence(list(x_THE.split(lengths)), batch_first=True).transpose(1, 2)

    q, (k, v) = pad(q_RHE, asked.lengths), (pad(x, cells.lengths) for x in (k_THE, v_THE))
    lengths_B = torch.tensor(cells.lengths, device=q.device)
    there_BL = torch.arange(k.shape[2], device=q.device) < lengths_B[:, None]
    out_BHRE = F.scaled_dot_product_attention(q, k, v, attn_mask=there_BL[:, None, None, :])
    parts = [one.transpose(0, 1)[:n] for one, n in zip(out_BHRE, asked.lengths, strict=True)]
    return torch.cat(parts).flatten(1)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_packed_cells_is_that_of_padded_cells(corpus, monkeypatch, device, precision, objective):
    packed = step(corpus, device, precision, **OBJECTIVES[objective])
    calls = []

    def attend(*args):
        calls.append(args[3].lengths)
        return padded_attention(*args)

    monkeypatch.setattr(bert, "attend", attend)
    padded = step(corpus, device, precision, **OBJECTIVES[objective])
    assert len(calls) == 2 * ROW.num_layers
    assert max(calls[0]) == 40
    tolerance = {"states": 1e-5, "cosine": 0.99999} if precision == "fp32" else {"states": 2e-2, "cosine": 0.98}
    assert_like(packed, padded, **tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_same_step_has_the_same_bits_again(corpus, device, precision, objective):
    first, *others = (step(corpus, device, precision, **OBJECTIVES[objective]) for _ in range(3))
    for other in others:
        assert other[0] == first[0]
        assert [k for k in first[1] if not torch.equal(other[1][k], first[1][k])] == []
        assert torch.equal(other[2], first[2])


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_drawn_alike_on_every_device_and_by_plain_integers(device):
    keys = torch.randint(-(2**31), 2**31 - 1, (50,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    site, channels, chance = 3, 7, 1311 * 8
    found = rng.dropped(keys.to(device), site, channels, chance).cpu()

    def mix(x):
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 16) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 15 & 0x1FFFF

    for row, key in enumerate(keys.tolist()):
        token = mix(key & 0xFFFFFFFF ^ (site * 0x632BE5AB + 0x2545F491) & 0xFFFFFFFF)
        for channel in range(channels):
            half = channel % 4
            bits = mix(token ^ mix(half ^ (site * 0x85157AF5 + 0x1B873593) & 0xFFFFFFFF))
            low = bits if channel < 4 else bits << 16 & 0xFFFFFFFF
            signed = low - (1 << 32) * (low >> 31)
            assert found[row, channel].item() == (signed < -(2**31) + (chance << 16))
