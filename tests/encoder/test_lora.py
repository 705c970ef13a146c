"""Adapters: at zero they change nothing, merged they compute what they computed before, and only they are trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixgf.config.classification import Classify
from mixgf.config.training import Model
from mixgf.encoder import lora
from mixgf.encoder.bert import Encoder
from mixgf.errors import UserError

SMALL = Model(num_layers=2, dim=32, num_heads=2, ffn_dim=48, max_positions=32)
IDS = torch.tensor([5, 9, 4, 7, 11, 6])
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)


def adapted(rank: int = 4) -> Encoder:
    encoder = Encoder(SMALL, 12)
    lora.add_adapters(encoder, rank, 16.0, seed=1)
    return encoder


def with_products(encoder: Encoder) -> Encoder:
    """Adapters as training would leave them: B is no longer zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if name.endswith(".b"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return encoder


def test_an_adapted_encoder_begins_as_the_encoder_it_was() -> None:
    assert torch.equal(adapted()(IDS, OFFSETS), Encoder(SMALL, 12)(IDS, OFFSETS))


def test_merged_adapters_compute_what_they_computed_before() -> None:
    encoder = with_products(adapted())
    before = encoder(IDS, OFFSETS)
    assert (before - Encoder(SMALL, 12)(IDS, OFFSETS)).abs().max() > 1e-2  # so that a merge that forgets is seen
    lora.merge_adapters(encoder)
    torch.testing.assert_close(encoder(IDS, OFFSETS), before, atol=1e-6, rtol=0)
    assert [n for n, _ in encoder.named_parameters()] == [n for n, _ in Encoder(SMALL, 12).named_parameters()]


def test_a_merged_matrix_is_the_matrix_and_a_product_of_the_rank() -> None:
    encoder = with_products(adapted(rank=3))
    lora.merge_adapters(encoder)
    plain = Encoder(SMALL, 12)
    for mine, old in zip(encoder.layers, plain.layers, strict=True):
        for name in lora.MATRICES:
            change = (getattr(mine, name).weight - getattr(old, name).weight).detach().double()
            singular = torch.linalg.svdvals(change)
            assert singular[2] > 1e-3
            assert singular[3:].max() < 1e-5 * singular[0]


@pytest.mark.parametrize(("rank", "alpha"), [(4, 16.0), (4, 2.0), (2, 16.0)])
def test_the_product_is_multiplied_by_alpha_over_rank(rank: int, alpha: float) -> None:
    encoder = Encoder(SMALL, 12)
    lora.add_adapters(encoder, rank, alpha, seed=1)
    parts = {name: p.detach().clone() for name, p in with_products(encoder).named_parameters()}
    lora.merge_adapters(encoder)
    for i, (mine, old) in enumerate(zip(encoder.layers, Encoder(SMALL, 12).layers, strict=True)):
        for name in lora.MATRICES:
            a, b = (parts[f"layers.{i}.{name}.parametrizations.weight.0.{factor}"] for factor in "ab")
            change = (getattr(mine, name).weight - getattr(old, name).weight).detach()
            torch.testing.assert_close(change, alpha / rank * b @ a, atol=1e-6, rtol=1e-4)


def test_only_adapters_are_trained() -> None:
    encoder = adapted()
    trained = {name.split("parametrizations.weight.")[-1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"0.a", "0.b"}
    encoder(IDS, OFFSETS).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())
    thin = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert thin == 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 48) + (48 + 32))


def test_merging_an_encoder_without_adapters_leaves_it() -> None:
    encoder = Encoder(SMALL, 12)
    lora.merge_adapters(encoder)
    assert all(
        np.array_equal(a.detach(), b.detach())
        for a, b in zip(encoder.parameters(), Encoder(SMALL, 12).parameters(), strict=True)
    )


def test_adapters_and_frozen_layers_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"classify.lora_rank = 4: must be 0 with classify.freeze_layers"):
        replace(Classify(freeze_layers=1), lora_rank=4)
