"""The screen: what it splits exactly is exact, its derivatives are derivatives, and it ranks genes as exact scoring does."""

import numpy as np
import pytest
import torch

from mixgf.config import training
from mixgf.encoder.bert import Encoder
from mixgf.perturbation import screen
from mixgf.perturbation.shift import ShiftScorer

CLS = 2
ROW = training.Model(num_layers=3, dim=32, num_heads=4, ffn_dim=64, max_positions=41, init_sd=0.2)
VARIANTS = [("remaining", 0), ("remaining", 1), ("all", 0), ("all", 1), ("cls", 1)]


def encoder(*, deaf=False):
    """Random weights; positions that change slowly from place to place, as trained ones do."""
    made = Encoder(ROW, 90, seed=3).eval()
    angles = torch.outer(torch.arange(ROW.max_positions) / ROW.max_positions, torch.arange(ROW.dim) / 8)
    with torch.no_grad():
        made.positions.copy_(0.2 * torch.sin(angles + torch.arange(ROW.dim)))
    if deaf:  # attention brings nothing: no token knows of another
        with torch.no_grad():
            for layer in made.layers:
                layer.out.weight.zero_()
    return made


def cell(lead, length, seed=6):
    genes = np.random.default_rng(seed).permutation(np.arange(3, 90))
    return torch.tensor([CLS] * lead + genes[: length - lead].tolist()), torch.tensor(genes)


def both(engine, ids, genes, operation, goal, **settings):
    """Estimated and exact shifts."""
    original = engine.encode_cells(ids, torch.tensor([0, len(ids)]))
    cells = torch.zeros(len(genes), dtype=torch.int64)
    exact = engine.score(original, cells, genes[:, None], operation, goal[None]).shift_SK[:, 0]
    return screen.estimate(engine, ids, genes, operation, goal, **settings), exact


@pytest.mark.parametrize("max_len", [30, 41], ids=["full", "with room"])
@pytest.mark.parametrize("operation", screen.OPERATIONS)
@pytest.mark.parametrize(("variant", "lead"), [v for v in VARIANTS if v[0] == "all"])
def test_where_no_gene_knows_of_another_the_estimate_is_almost_exact(operation, variant, lead, max_len):
    """Ranks and means are then all there is; only that the effects of several parts add up is an approximation."""
    ids, genes = cell(lead, 30)
    goal = torch.from_numpy(np.random.default_rng(1).normal(size=32))
    engine = ShiftScorer(encoder=encoder(deaf=True), variant=variant, lead=lead, max_len=max_len)
    estimated, exact = both(engine, ids, genes, operation, goal, grid=30)
    assert (estimated - exact).abs().max() < 0.06 * exact.abs().max()


@pytest.mark.parametrize("layers", [None, 2], ids=["last layer", "one before"])
@pytest.mark.parametrize("operation", screen.OPERATIONS)
@pytest.mark.parametrize(("variant", "lead"), VARIANTS)
def test_ranks_genes_as_exact_scoring_does(operation, variant, lead, layers):
    ids, genes = cell(lead, 40)
    goal = torch.from_numpy(np.random.default_rng(1).normal(size=32))
    engine = ShiftScorer(encoder=encoder(), variant=variant, lead=lead, layers=layers, max_len=41)
    estimated, exact = both(engine, ids, genes, operation, goal, grid=10)
    chosen = exact != 0
    ranked = [torch.argsort(torch.argsort(x[chosen])).double() for x in (estimated, exact)]
    assert torch.corrcoef(torch.stack(ranked))[0, 1] > 0.95


def test_deleting_an_absent_gene_is_estimated_as_nothing():
    ids, genes = cell(0, 20)
    estimated = screen.estimate(ShiftScorer(encoder=encoder()), ids, genes, "delete", torch.ones(32))
    assert (estimated[20:] == 0).all()
    assert (estimated[:20] != 0).all()


def test_the_removal_term_is_the_derivative_by_the_log_weight_of_a_key(monkeypatch):
    ids, _ = cell(0, 12)
    goal = torch.nn.functional.normalize(torch.linspace(-1, 1, 32, dtype=torch.float64), dim=0)
    engine = ShiftScorer(encoder=encoder().double(), variant="all")
    places = torch.arange(12)
    found = screen._trace(engine, ids, places, goal).removal_L
    plain = screen._weighted

    def cosine(step):
        moved = torch.zeros(12, dtype=torch.float64)
        moved[7] = step
        with monkeypatch.context() as patch:
            patch.setattr(screen, "_weighted", lambda q, k, v, w: plain(q, k, v, w + moved))
            return screen._cosine(screen._trace(engine, ids, places, goal).sum_D[None], goal).item()

    assert found[7].item() == pytest.approx(-(cosine(1e-4) - cosine(-1e-4)) / 2e-4, rel=1e-5)


def test_the_traced_pass_is_the_encoder_s_pass():
    ids, _ = cell(1, 25)
    engine = ShiftScorer(encoder=encoder(), lead=1)
    traced = screen._trace(engine, ids, torch.arange(25), torch.ones(32).double()).hidden_LD
    assert traced == pytest.approx(engine.hidden(ids, torch.tensor([0, 25])), abs=1e-5)


def test_the_grid_s_size_and_the_packing_change_little(monkeypatch):
    ids, genes = cell(0, 40)
    goal = torch.from_numpy(np.random.default_rng(1).normal(size=32))
    wide = screen.estimate(ShiftScorer(encoder=encoder()), ids, genes, "overexpress", goal, grid=12)
    monkeypatch.setattr(screen, "_PROBE_ELEMENTS", 4 * 40 * 7)  # seven genes at a time
    narrow = screen.estimate(ShiftScorer(encoder=encoder(), micro_tokens=50), ids, genes, "overexpress", goal, grid=12)
    assert (wide - narrow).abs().max() < 1e-6


def test_a_cell_of_one_gene_gives_numbers():
    for operation in screen.OPERATIONS:
        found = screen.estimate(
            ShiftScorer(encoder=encoder()), torch.tensor([5]), torch.tensor([5, 6]), operation, torch.ones(32)
        )
        assert torch.isfinite(found).all()


def test_interpolation_between_knots_by_hand():
    knots, values = torch.tensor([0, 1, 4]), torch.tensor([0.0, 10.0, 40.0], dtype=torch.float64)
    at = torch.tensor([0, 1, 2, 3, 4])
    assert screen._interpolate(knots, values, at).tolist() == [0, 10, 20, 30, 40]
    assert screen._interpolate(knots[:1], values[1:2], at).tolist() == [10] * 5


def test_an_inserted_gene_reads_the_cell_and_itself():
    """In one layer without positions its last vector is that of the sentence with the gene in front."""
    ids, genes = cell(0, 20)
    one = Encoder(
        training.Model(num_layers=1, dim=32, num_heads=4, ffn_dim=64, max_positions=41, init_sd=0.2), 90, seed=3
    ).eval()
    with torch.no_grad():
        one.positions.zero_()
    engine = ShiftScorer(encoder=one, variant="all")
    goal = torch.nn.functional.normalize(torch.linspace(-1, 1, 32, dtype=torch.float64), dim=0)
    traced = screen._trace(engine, ids, torch.arange(20), goal)
    _, own = screen._inserted(engine, traced, genes[20:24])
    for k, gene in enumerate(genes[20:24]):
        whole = engine.hidden(torch.cat([gene[None], ids]), torch.tensor([0, 21]))
        torch.testing.assert_close(own[k], whole[0].double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("grid", "knots"), [(1, [0]), (2, [0, 19]), (4, [0, 6, 13, 19]), (50, list(range(20)))])
def test_ranks_are_computed_exactly_from_the_first_to_the_last(monkeypatch, grid, knots):
    ids, genes = cell(1, 21)
    seen = []
    plain = screen._rank_shift_cosines
    monkeypatch.setattr(screen, "_rank_shift_cosines", lambda *a: (seen.append(a[2].tolist()), plain(*a))[1])
    screen.estimate(ShiftScorer(encoder=encoder(), lead=1), ids, genes, "delete", torch.ones(32), grid=grid)
    assert seen == [knots]
