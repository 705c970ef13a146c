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


@pytest.mark.parametrize("at_a_time", [1 << 20, 7 * 2 * 11])
def test_removed_and_exchanged_keys_change_the_attention_exactly(monkeypatch, at_a_time):
    """Of all tokens but the one itself; the cosine changes by the gradient."""
    monkeypatch.setattr(screen, "_PROBE_ELEMENTS", at_a_time)
    generator = torch.Generator().manual_seed(4)
    q, k, v, grad, other_k, other_v = torch.randn(6, 2, 11, 8, generator=generator, dtype=torch.float64).unbind(0)
    q *= 2  # some weights are large

    def attended(query, keys, values):
        return torch.softmax(keys @ query / 8**0.5, 0) @ values

    output = torch.stack([torch.stack([attended(x, k[h], v[h]) for x in q[h]]) for h in range(2)])
    removal, exchange = torch.zeros(2, 11, dtype=torch.float64)
    for token in range(11):
        rest = torch.arange(11) != token
        for h in range(2):
            keys, values = k[h].clone(), v[h].clone()
            keys[token], values[token] = other_k[h, token], other_v[h, token]
            for x in torch.nonzero(rest)[:, 0]:
                removal[token] += grad[h, x] @ (attended(q[h, x], k[h][rest], v[h][rest]) - output[h, x])
                exchange[token] += grad[h, x] @ (attended(q[h, x], keys, values) - output[h, x])
    layer = screen._Attention(queries=q, keys=k, values=v, output=output, grad=grad)
    state = screen._State(hidden_LD=torch.zeros(11, 16), keys=(k,), values=(v,))
    traced = screen._Trace(sum_D=torch.zeros(16), count=11, state=state, attention=(layer,))
    found = screen._effects(traced, [(other_k, other_v)])
    torch.testing.assert_close(found, (removal, exchange), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("variant", ["remaining", "all"])
def test_the_gradient_by_the_attention_output_is_that_of_the_cosine(monkeypatch, variant):
    ids, _ = cell(0, 12)
    goal = torch.nn.functional.normalize(torch.linspace(-1, 1, 32, dtype=torch.float64), dim=0)
    engine = ShiftScorer(encoder=encoder().double(), variant=variant)
    places, plain = torch.arange(12), screen.F.scaled_dot_product_attention
    found = screen._trace(engine, ids, places, goal).attention[1].grad[2, 7, 3]

    def cosine(step):
        calls = []

        def attention(*heads):
            out = plain(*heads)
            if len(calls) == 1:
                out[0, 2, 7, 3] += step
            calls.append(0)
            return out

        with monkeypatch.context() as patch:
            patch.setattr(screen.F, "scaled_dot_product_attention", attention)
            return screen._cosine(screen._forward(engine, ids, places).hidden_LD.sum(0)[None], goal).item()

    assert found.item() == pytest.approx((cosine(1e-4) - cosine(-1e-4)) / 2e-4, rel=1e-5)


def test_the_traced_pass_is_the_encoder_s_pass():
    ids, _ = cell(1, 25)
    engine = ShiftScorer(encoder=encoder(), lead=1)
    places = torch.arange(25)
    traced = screen._trace(engine, ids, places, torch.ones(32).double()).state
    plain = screen._forward(engine, ids, places)
    torch.testing.assert_close(traced.hidden_LD, engine.hidden(ids, torch.tensor([0, 25])), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.hidden_LD, engine.hidden(ids, torch.tensor([0, 25])), atol=1e-5, rtol=0)
    torch.testing.assert_close(list(traced.keys + traced.values), list(plain.keys + plain.values), atol=1e-5, rtol=0)


def test_the_number_of_genes_at_a_time_changes_little(monkeypatch):
    ids, genes = cell(0, 40)
    goal = torch.from_numpy(np.random.default_rng(1).normal(size=32))
    wide = screen.estimate(ShiftScorer(encoder=encoder()), ids, genes, "overexpress", goal, grid=12)
    monkeypatch.setattr(screen, "_PROBE_ELEMENTS", 4 * 40 * 7)  # seven genes at a time
    narrow = screen.estimate(ShiftScorer(encoder=encoder()), ids, genes, "overexpress", goal, grid=12)
    assert (wide - narrow).abs().max() < 1e-6


def test_a_cell_of_one_gene_gives_numbers():
    for operation in screen.OPERATIONS:
        found = screen.estimate(
            ShiftScorer(encoder=encoder()), torch.tensor([5]), torch.tensor([5, 6]), operation, torch.ones(32)
        )
        assert torch.isfinite(found).all()


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


def rank_shifts(engine, ids, operation, grid):
    """Change of the cosine by the moves at every rank: by the screen, and by a pass for each."""
    lead, places = engine.lead, torch.arange(len(ids))
    goal = torch.nn.functional.normalize(torch.linspace(-1, 1, 32, dtype=torch.float64), dim=0)
    base = screen._trace(engine, ids, places, goal)
    step = -1 if operation == "delete" else 1
    found, _ = screen._rank_shifts(engine, ids, base, step, goal, grid)
    exact = []
    for rank in range(len(ids) - lead):
        moved = places.clone()
        if step < 0:
            moved[lead + rank + 1 :] -= 1
        else:
            moved[lead : lead + rank] += 1
        hidden = engine.encoder(ids, torch.tensor([0, len(ids)]), positions_T=moved, layers=engine.layers).detach()
        exact.append(screen._cosine(engine.sums(hidden, torch.tensor([0, len(ids)]))[0], goal))
    return found, torch.cat(exact) - screen._cosine(base.sum_D[None], goal)


@pytest.mark.parametrize("operation", screen.OPERATIONS)
@pytest.mark.parametrize(("variant", "lead"), VARIANTS)
@pytest.mark.parametrize(("grid", "knots"), [(2, [0, 19]), (4, [0, 6, 13, 19]), (50, list(range(20)))])
def test_moves_of_ranks_are_exact_at_the_ranks_of_the_grid(grid, knots, variant, lead, operation):
    engine = ShiftScorer(encoder=encoder(), variant=variant, lead=lead)
    found, exact = rank_shifts(engine, cell(lead, 20 + lead)[0], operation, grid)
    assert found[knots] == pytest.approx(exact[knots], abs=1e-6)
    assert exact.abs().max() > 1e-3


@pytest.mark.parametrize("operation", screen.OPERATIONS)
@pytest.mark.parametrize(("variant", "lead"), VARIANTS)
def test_moves_of_ranks_are_exact_at_all_ranks_where_no_gene_knows_of_another(variant, lead, operation):
    """A cell's vector is then the sum of vectors of which each has one of two values."""
    engine = ShiftScorer(encoder=encoder(deaf=True), variant=variant, lead=lead)
    found, exact = rank_shifts(engine, cell(lead, 30)[0], operation, grid=2)
    assert found == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("operation", screen.OPERATIONS)
@pytest.mark.parametrize(("variant", "lead"), VARIANTS)
def test_two_ranks_are_enough_for_an_encoder_whose_positions_are_random(variant, lead, operation):
    """Every move has then an effect of its own, on the gene's vector and on the others' (all of it in the variant `cls`)."""
    sizes = training.Model(num_layers=3, dim=32, num_heads=4, ffn_dim=64, max_positions=41, init_sd=0.05)
    engine = ShiftScorer(encoder=Encoder(sizes, 90, seed=3).eval(), variant=variant, lead=lead)
    found, exact = rank_shifts(engine, cell(lead, 40)[0], operation, grid=2)
    assert ((found - exact).std() / exact.std()).item() < 0.15


@pytest.mark.parametrize(("grid", "passes"), [(2, 1), (4, 3), (50, 19)])
@pytest.mark.parametrize("operation", screen.OPERATIONS)
def test_the_rank_at_which_no_gene_moves_takes_no_pass(monkeypatch, operation, grid, passes):
    ids, genes = cell(1, 21)
    seen = []
    plain = screen._forward
    monkeypatch.setattr(screen, "_forward", lambda *a: (seen.append(a), plain(*a))[1])
    screen.estimate(ShiftScorer(encoder=encoder(), lead=1), ids, genes, operation, torch.ones(32), grid=grid)
    assert len(seen) == passes


def unit(x):
    return torch.nn.functional.normalize(x.double(), dim=-1)


@pytest.mark.parametrize(("variant", "lead"), VARIANTS)
@pytest.mark.parametrize("max_len", [20, 41], ids=["full", "with room"])
def test_the_estimate_is_the_sum_of_its_parts(variant, lead, max_len):
    """Ranks, removal, insertion and mean, gene by gene. A gene in front moves all others behind it by one place; <cls> stays."""
    ids, genes = cell(lead, 20)
    goal = unit(torch.from_numpy(np.random.default_rng(1).normal(size=32)))
    engine = ShiftScorer(encoder=encoder(), variant=variant, lead=lead, max_len=max_len)
    num, sentence = 20 - lead, ids.tolist()
    asked = torch.cat([genes[:num], genes[30:34]])  # all genes of the cell, and four others
    base = screen._trace(engine, ids, torch.arange(20), goal)
    plain = screen._cosine(base.sum_D[None], goal).item()
    kept = min(20, max_len - 1)
    moved_down = torch.tensor([p + 1 if p >= lead else p for p in range(20)])
    front = screen._trace(engine, ids[:kept], moved_down[:kept], goal)
    insertion, vector = screen._inserted(engine, front, asked)
    for operation, step in (("delete", -1), ("overexpress", 1)):
        by_rank, removal = screen._rank_shifts(engine, ids, base, step, goal, 5)
        found = screen.estimate(engine, ids, asked, operation, goal, grid=5)
        for k, gene in enumerate(asked.tolist()):
            at = sentence.index(gene) if gene in sentence else None
            sums = base.sum_D if at is None else base.sum_D - base.state.hidden_LD[at].double()
            if operation == "delete":
                if at is None:
                    assert found[k].item() == pytest.approx(0, abs=1e-15)
                    continue
                expected = by_rank[at - lead].item()
                expected += removal[at].item() * (1 if variant == "cls" else base.count / (base.count - 1))
                before, after = base.sum_D, sums
            elif at is None:
                expected = insertion[k].item() + screen._cosine(front.sum_D[None], goal).item() - plain
                before, after = front.sum_D, front.sum_D + vector[k]
            else:
                expected = insertion[k].item() + by_rank[at - lead].item() + removal[at].item()
                before, after = base.sum_D, sums + vector[k]
            if variant == "all":
                expected += (unit(after) @ goal - unit(before) @ goal).item()
            assert found[k].item() == pytest.approx(expected, abs=2e-6), (operation, k)


def test_an_inserted_gene_is_one_more_key_of_every_token_s_softmax(monkeypatch):
    """Change of the cosine: the gradient by each layer's attention output, times the change of that output, written out."""
    ids, genes = cell(0, 9)
    goal = unit(torch.linspace(-1, 1, 32))
    engine = ShiftScorer(encoder=encoder())
    traced = screen._trace(engine, ids, torch.arange(9), goal)
    asked = genes[20:25]
    monkeypatch.setattr(screen, "_PROBE_ELEMENTS", 4 * 9 * 2)  # two genes at a time
    found, _ = screen._inserted(engine, traced, asked)
    for k, gene in enumerate(asked):
        h = engine.encoder.embed_tokens(gene[None], torch.tensor([0])).detach()
        expected = 0.0
        for layer, seen in zip(engine.encoder.layers, traced.attention, strict=True):
            gene_q, gene_k, gene_v = (x.detach()[:, 0] for x in screen._heads(engine.encoder, layer.qkv(h)))  # (H, E)
            own = []
            for head in range(4):
                keys = torch.cat([seen.keys[head], gene_k[head][None]])
                values = torch.cat([seen.values[head], gene_v[head][None]])
                new = torch.softmax(seen.queries[head] @ keys.T / 8**0.5, dim=1) @ values
                expected += (seen.grad[head] * (new - seen.output[head])).sum().item()
                own.append(torch.softmax(gene_q[head] @ keys.T / 8**0.5, dim=0) @ values)
            h = layer.after_attention(h, torch.cat(own)[None]).detach()
        assert found[k].item() == pytest.approx(expected, abs=1e-6)
    assert found.abs().max() > 1e-4
