"""Shifts by hand, and against an independent, slow and plain implementation: one sentence at a time, lists and numpy."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mixgf.config import training
from mixgf.encoder.bert import Encoder
from mixgf.perturbation import operations
from mixgf.perturbation.shift import ShiftScorer, _ranges

CLS = 2
ROW = training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=64, max_positions=24, init_sd=0.3)


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def plain(sentence, genes, operation, *, lead=0, max_len=100, rank_share=0.25):
    """The definition, one sentence and one gene at a time."""
    head, rest = sentence[:lead], sentence[lead:]
    if operation == "delete":
        return head + [t for t in rest if t not in genes]
    if operation == "overexpress":
        return (head + list(genes) + [t for t in rest if t not in genes])[:max_len]
    step = max(1, int(rank_share * len(rest)))
    present = [t for t in rest if t in genes]
    order = present[::-1] if operation == "inhibit" else present
    for done, gene in enumerate(order):  # one by one, outermost first, so that they do not block each other
        at = rest.index(gene)
        to = min(at + step, len(rest) - 1 - done) if operation == "inhibit" else max(at - step, done)
        rest = rest[:at] + rest[at + 1 :]
        rest.insert(to, gene)
    return head + rest


def embedding(encoder, sentence, variant, *, lead, without, layers):
    """Cell vector of one sentence, positions of the perturbed genes left out for `remaining`."""
    h = encoder(torch.tensor(sentence), torch.tensor([0, len(sentence)], dtype=torch.int32), layers=layers)
    h = h.detach().numpy().astype(np.float64)
    if variant == "cls":
        return h[0]
    if variant == "all":
        return h.mean(axis=0)
    return h[[i for i in range(lead, len(sentence)) if sentence[i] not in without]].mean(axis=0)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(ROW, 60, seed=3).eval()


@pytest.mark.parametrize(("variant", "lead"), [("remaining", 0), ("remaining", 1), ("all", 0), ("all", 1), ("cls", 1)])
@pytest.mark.parametrize("operation", operations.OPERATIONS)
@pytest.mark.parametrize("layers", [None, 1], ids=["last layer", "one before"])
def test_equals_the_plain_implementation(encoder, operation, variant, lead, layers):
    rng = np.random.default_rng(6)
    sentences = [[CLS] * lead + rng.permutation(np.arange(3, 60))[:n].tolist() for n in (20, 9, 20, 14)]
    pairs = [(c, g) for c in range(4) for g in [(sentences[c][lead],), (sentences[c][-1],), (59, 7), (3,)]]
    states = rng.normal(size=(2, 32))
    engine = ShiftScorer(encoder=encoder, variant=variant, layers=layers, lead=lead, max_len=21, micro_tokens=64)
    original = engine.encode_cells(
        torch.tensor([t for s in sentences for t in s]), torch.tensor(np.cumsum([0] + [len(s) for s in sentences]))
    )
    table = torch.tensor([list(g) + [operations.NO_GENE] * (2 - len(g)) for _, g in pairs])
    result = engine.score(original, torch.tensor([c for c, _ in pairs]), table, operation, torch.tensor(states))
    for i, (cell, genes) in enumerate(pairs):
        perturbed = plain(sentences[cell], genes, operation, lead=lead, max_len=21)
        before = embedding(encoder, sentences[cell], variant, lead=lead, without=genes, layers=layers)
        after = embedding(encoder, perturbed, variant, lead=lead, without=genes, layers=layers)
        assert result.response_S[i] == pytest.approx(1 - cosine(before, after), abs=1e-6)
        for k in range(2):
            expected = cosine(after, states[k]) - cosine(before, states[k])
            assert result.shift_SK[i, k] == pytest.approx(expected, abs=1e-6)
    assert result.response_S.abs().max() > 1e-3  # the comparison can fail


class _Lookup(torch.nn.Module):
    """An encoder worked by hand: the vector of a gene is fixed, but every gene after the first is moved by its place."""

    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Parameter(torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]]))

    def forward(self, ids_T, offsets_B1, *, layers=None):
        place = torch.cat([torch.arange(int(b - a)) for a, b in pairwise(offsets_B1)])
        return self.tokens[ids_T] + torch.stack([torch.zeros(len(place)), place.float()], dim=1)


def test_deletion_by_hand_in_both_variants():
    """Sentence x y z with vectors (1,0) (0,1) (3,4); place p adds (0,p); y is deleted; the goal is the first axis."""
    goal = torch.tensor([[1.0, 0.0]])
    ids, offsets = torch.tensor([3, 4, 5]), torch.tensor([0, 3])
    # before: x (1,0), y (0,2), z (3,6); after: x (1,0), z (3,5)
    after = cosine([2, 2.5], [1, 0])
    for variant, before in (("remaining", [2, 3]), ("all", [4 / 3, 8 / 3])):
        engine = ShiftScorer(encoder=_Lookup(), variant=variant)
        result = engine.score(engine.encode_cells(ids, offsets), torch.tensor([0]), torch.tensor([[4]]), "delete", goal)
        assert result.shift_SK.item() == pytest.approx(after - cosine(before, [1, 0]), abs=1e-7)
        assert result.response_S.item() == pytest.approx(1 - cosine(before, [2, 2.5]), abs=1e-7)


def test_overexpression_drops_the_moved_gene_on_both_sides_in_remaining_only():
    """Sentence x y z, z to the front: z (3,4), x (1,1), y (0,3)."""
    goal = torch.tensor([[1.0, 0.0]])
    ids, offsets = torch.tensor([3, 4, 5]), torch.tensor([0, 3])
    for variant, before, after in (("remaining", [1, 2], [1, 4]), ("all", [4, 8], [4, 8])):
        engine = ShiftScorer(encoder=_Lookup(), variant=variant)
        result = engine.score(
            engine.encode_cells(ids, offsets), torch.tensor([0]), torch.tensor([[5]]), "overexpress", goal
        )
        assert result.shift_SK.item() == pytest.approx(cosine(after, [1, 0]) - cosine(before, [1, 0]), abs=1e-7)


def test_deleting_an_absent_gene_shifts_by_exactly_nothing(encoder):
    engine = ShiftScorer(encoder=encoder)
    original = engine.encode_cells(torch.arange(3, 20), torch.tensor([0, 10, 17]))
    result = engine.score(original, torch.tensor([0, 1]), torch.tensor([[50], [50]]), "delete", torch.ones(1, 32))
    assert result.response_S.abs().max() < 1e-12
    assert result.shift_SK.abs().max() < 1e-12


@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_packing_does_not_change_the_result(encoder, operation):
    rng = np.random.default_rng(8)
    ids = torch.cat([torch.tensor(rng.permutation(np.arange(3, 60))[:n]) for n in (20, 11)])
    cells, genes = torch.arange(2).repeat_interleave(30), torch.tensor(rng.integers(3, 60, (60, 1)))
    results = []
    for micro_tokens in (1, 100, 100_000):
        engine = ShiftScorer(encoder=encoder, micro_tokens=micro_tokens, max_len=24)
        original = engine.encode_cells(ids, torch.tensor([0, 20, 31]))
        results.append(engine.score(original, cells, genes, operation, torch.ones(1, 32)).shift_SK)
    assert (results[0] - results[1]).abs().max() < 1e-12
    assert (results[0] - results[2]).abs().max() < 1e-12


def test_a_cell_of_nothing_but_the_gene_gives_numbers(encoder):
    engine = ShiftScorer(encoder=encoder)
    original = engine.encode_cells(torch.tensor([5]), torch.tensor([0, 1]))
    for operation in ("overexpress", "inhibit", "activate"):
        result = engine.score(original, torch.tensor([0]), torch.tensor([[5]]), operation, torch.ones(1, 32))
        assert torch.isfinite(result.shift_SK).all()
        assert torch.isfinite(result.response_S).all()


def test_sentences_are_packed_up_to_the_limit_by_hand():
    assert list(_ranges([5, 5, 1, 30, 2, 2], 10)) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert list(_ranges([10, 1, 9], 10)) == [(0, 1), (1, 3)]
    assert list(_ranges([4, 4, 4, 4], 10)) == [(0, 2), (2, 4)]
    assert list(_ranges([], 10)) == []
    assert list(_ranges([99], 10)) == [(0, 1)]


def test_cells_of_two_genes_are_those_of_the_plain_implementation(encoder):
    engine = ShiftScorer(encoder=encoder)
    original = engine.encode_cells(torch.tensor([5, 9]), torch.tensor([0, 2]))
    goal = np.random.default_rng(1).normal(size=32)
    for operation in operations.OPERATIONS:
        result = engine.score(original, torch.tensor([0]), torch.tensor([[9]]), operation, torch.tensor(goal[None]))
        before = embedding(encoder, [5, 9], "remaining", lead=0, without=(9,), layers=None)
        after = embedding(encoder, plain([5, 9], (9,), operation), "remaining", lead=0, without=(9,), layers=None)
        assert result.shift_SK.item() == pytest.approx(cosine(after, goal) - cosine(before, goal), abs=1e-6)
        assert result.response_S.item() == pytest.approx(1 - cosine(before, after), abs=1e-6)


def test_no_sentences_give_no_shifts(encoder):
    engine = ShiftScorer(encoder=encoder)
    original = engine.encode_cells(torch.tensor([5, 9]), torch.tensor([0, 2]))
    none = engine.score(original, torch.arange(0), torch.empty(0, 1, dtype=torch.int64), "delete", torch.ones(3, 32))
    assert none.response_S.shape == (0,)
    assert none.shift_SK.shape == (0, 3)
    assert none.shift_SK.dtype == none.response_S.dtype == torch.float64


@pytest.mark.parametrize(("variant", "lead"), [("remaining", 0), ("remaining", 1), ("all", 1), ("cls", 1)])
def test_vectors_of_cells_are_the_means_of_the_plain_implementation(encoder, variant, lead):
    engine = ShiftScorer(encoder=encoder, variant=variant, lead=lead, micro_tokens=10)
    sentences = [[CLS] * lead + rest for rest in ([5, 9, 7], [8], [30, 31, 32, 33, 34, 35, 36])]
    ids, offsets = [t for s in sentences for t in s], np.cumsum([0, *map(len, sentences)])
    found = engine.vectors(torch.tensor(ids, dtype=torch.int32), torch.tensor(offsets))
    for vector, sentence in zip(found.numpy(), sentences, strict=True):
        expected = embedding(encoder, sentence, variant, lead=lead, without=(), layers=None)
        assert vector == pytest.approx(expected, abs=5e-6)
    assert found.dtype == torch.float64


def test_half_precision_is_near_full_precision_and_not_equal(encoder):
    ids, offsets = torch.arange(3, 20), torch.tensor([0, 17])
    full, half = (
        ShiftScorer(encoder=encoder, precision=precision).vectors(ids, offsets) for precision in ("fp32", "bf16")
    )
    assert 0 < (full - half).abs().max() < 0.05


def test_an_overexpressed_sentence_has_at_most_2048_genes_unless_another_length_is_given(encoder):
    assert ShiftScorer(encoder=encoder).max_len == 2048
    assert ShiftScorer(encoder=encoder).rank_share == 0.25
