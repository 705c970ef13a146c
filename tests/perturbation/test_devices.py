"""Shifts on a GPU and in bf16, beside those of the CPU in fp32."""

import numpy as np
import pytest
import torch

from mixgf.config import training
from mixgf.encoder.bert import Encoder
from mixgf.perturbation import operations
from mixgf.perturbation.shift import ShiftScorer

ROW = training.Model(num_layers=2, dim=64, num_heads=2, ffn_dim=96, max_positions=40, init_sd=0.1)
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def shifts(device, precision, operation):
    """Responses and shifts of the deletion, or another operation, of each of 30 genes in each of 12 cells."""
    rng = np.random.default_rng(4)
    sentences = [rng.permutation(np.arange(3, 60))[:n].tolist() for n in rng.integers(20, 39, 12)]
    scorer = ShiftScorer(
        encoder=Encoder(ROW, 60, seed=3).eval().to(device), max_len=40, micro_tokens=300, precision=precision
    )
    original = scorer.encode_cells(
        torch.tensor([t for s in sentences for t in s]), torch.tensor(np.cumsum([0] + [len(s) for s in sentences]))
    )
    pairs = [(cell, gene) for cell, sentence in enumerate(sentences) for gene in range(3, 33) if gene in sentence]
    cells, genes = (torch.tensor(column) for column in zip(*pairs, strict=True))
    states = torch.tensor(rng.normal(size=(2, ROW.dim)))
    found = scorer.score(original, cells, genes[:, None], operation, states)
    return found.response_S.double().cpu(), found.shift_SK.double().cpu()


@pytest.mark.parametrize("operation", operations.OPERATIONS)
@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), pytest.param("cuda", "fp32", marks=on_cuda), pytest.param("cuda", "bf16", marks=on_cuda)],
)
def test_shifts_are_those_of_the_cpu_in_fp32(device, precision, operation):
    truth, found = shifts("cpu", "fp32", operation), shifts(device, precision, operation)
    for a, b in zip(truth, found, strict=True):
        assert a.abs().max() > 1e-4
        if precision == "fp32":
            assert (a - b).abs().max() < 1e-5
        else:
            assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.98
            assert not torch.equal(a, b)
