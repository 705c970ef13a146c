import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from thread_workers import assert_same_step, run_first_step

from mixgf.config import data, parse, training
from mixgf.config.run import Config
from mixgf.corpus import reader
from mixgf.encoder.bert import MaskedModel
from mixgf.training import losses, pretraining
from mixgf.training.loop import TaskForward, compute_gradients, fit
from mixgf.training.worker_group import LocalContext

ROW = training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=48, max_positions=40, dropout=0.1)


def test_nt_xent_by_hand():
    # four anchors: a0 = b0 = (1, 0), a1 = b1 = (0, 1): each sees its positive at cosine 1 and two negatives at cosine 0
    a = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    b = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 2))
    assert losses.simcse_loss(a, b, 0.5).item() == pytest.approx(expected, rel=1e-6)
    # one pair turned by 90 degrees: its anchors see the positive at 0; worked term by term
    c = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    e = math.e
    terms = [1 / (1 + 1 + 1), e / (1 + e + e), 1 / (1 + e + e), e / (1 + e + e)]  # anchors a0, a1, c0, c1
    expected = -sum(map(math.log, terms)) / 4
    assert losses.simcse_loss(torch.eye(2), c, 1.0).item() == pytest.approx(expected, rel=1e-6)


def test_a_single_pair_has_no_negatives_and_no_loss():
    assert losses.simcse_loss(torch.ones(1, 3), torch.ones(1, 3), 0.05).item() == 0


def test_dimension_contrast_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    # a.T @ b = [[1, 1], [0, 2]]; temperature 2
    expected = -(math.log(0.5) + math.log(math.e / (1 + math.e))) / 2
    assert losses.dimension_loss(a, b, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_alignment_and_uniformity_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 5.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert losses.alignment(a, b).item() == pytest.approx((0 + 2) / 2)
    assert losses.uniformity(a).item() == pytest.approx(-2 * 2)
    assert losses.uniformity(a[:1]).item() == 0
    c = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])  # squared distances 2, 2 and 4, each in both orders
    assert losses.uniformity(c).item() == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3), rel=1e-5)
    assert losses.uniformity(torch.ones(4, 3)).item() == pytest.approx(0, abs=1e-6)  # all in one direction


def test_the_whole_loss_is_the_weighted_mean_over_masked_genes_plus_the_losses_on_vectors():
    assert losses.masked_gene_loss(torch.tensor(6.0), torch.tensor(4)).item() == 1.5
    assert losses.total_loss(torch.tensor(3.0), torch.tensor(5.0), masked_gene_weight=2.0).item() == 11


def run(
    corpus,
    *,
    workers=1,
    micro_tokens=10_000,
    epochs=2,
    batch_cells=10,
    model_row=ROW,
    orthologs="",
    whole_last_layer=False,
    **objective,
):
    """Losses and flat gradient of the first step, summed over workers."""
    settings = Config(
        model=model_row, tokens=data.Tokens(max_len=40, cls=corpus.cls), objective=training.Objective(**objective), vocab=data.Vocab(orthologs=(orthologs,)),
        train=training.Train(epochs=epochs, batch_cells=batch_cells, micro_tokens=micro_tokens),
    )  # fmt: skip

    def make():
        task = pretraining.Pretraining(settings, corpus)
        if whole_last_layer:
            assert task.last_layer_at_queries
            task.last_layer_at_queries = False
        return task, MaskedModel(model_row, corpus.vocabulary.size)

    return run_first_step(make, workers)


@pytest.fixture(scope="module")
def uri(make_corpus):
    lengths = np.random.default_rng(0).integers(5, 30, 23)
    return make_corpus(lengths, np.arange(23) % 2, [9, 14])


@pytest.fixture(scope="module")
def corpus(uri):
    return reader.Corpus(uri)


same = partial(assert_same_step, tolerance=1e-6)
ALL = {"simcsepp_weight": 0.1, "ortholog_weight": 0.5}


@pytest.mark.parametrize("view", ["dropout", "mask", "subsample", "ortholog"])
def test_workers_together_give_the_losses_and_gradients_of_one(corpus, uri, view):
    one = run(corpus, view=view, orthologs=f"{uri}/orthologs.parquet", **ALL)
    assert set(one[0]) == {"loss", "mlm", "contrast", "simcsepp", "ortholog", "alignment", "uniformity"}
    assert all(np.isfinite(v) for v in one[0].values())
    same(run(corpus, view=view, workers=3, orthologs=f"{uri}/orthologs.parquet", **ALL), one)


@pytest.fixture(scope="module")
def corpus_cls(make_corpus):
    return reader.Corpus(
        make_corpus(np.random.default_rng(0).integers(5, 30, 23), np.arange(23) % 2, [9, 14], cls=True)
    )


@pytest.mark.parametrize("pooling", ["first", "cls", "mlm only"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_last_layer_only_where_the_losses_look_gives_the_losses_and_gradients_of_all_of_it(
    corpus_cls, pooling, workers
):
    chosen = {"contrast_weight": 0.0} if pooling == "mlm only" else {"pooling": pooling, "simcsepp_weight": 0.1}
    whole = run(corpus_cls, whole_last_layer=True, **chosen)
    assert whole[1].abs().max() > 1e-3
    same(run(corpus_cls, workers=workers, micro_tokens=10_000 if workers == 1 else 100, **chosen), whole)


def test_gradient_caching_gives_the_losses_and_gradients_of_one_pass(corpus, uri):
    one = run(corpus, orthologs=f"{uri}/orthologs.parquet", **ALL)
    same(run(corpus, micro_tokens=100, orthologs=f"{uri}/orthologs.parquet", **ALL), one)
    same(run(corpus, micro_tokens=1, workers=2, orthologs=f"{uri}/orthologs.parquet", **ALL), one)


def test_more_workers_than_cells_is_the_same_step(corpus):
    same(run(corpus, batch_cells=2, workers=4), run(corpus, batch_cells=2))


def test_without_contrast_there_is_one_view_and_only_the_mlm_loss(corpus):
    figures, _ = run(corpus, contrast_weight=0.0)
    assert set(figures) == {"loss", "mlm"}
    assert figures["loss"] == figures["mlm"]
    # untrained and small weights: nearly uniform over the vocabulary
    assert figures["mlm"] == pytest.approx(math.log(corpus.vocabulary.size), abs=0.1)


def test_both_passes_of_one_step_see_the_same_dropout_and_views_differ(corpus):
    with_dropout, _ = run(corpus)
    assert with_dropout["alignment"] > 1e-4
    still = training.Model(**(parse.to_dict(ROW) | {"dropout": 0.0}))
    assert run(corpus, model_row=still)[0]["alignment"] == pytest.approx(0, abs=1e-9)
    assert run(corpus, model_row=still, view="mask")[0]["alignment"] > 1e-4


def test_the_ortholog_term_has_gradients(corpus, uri):
    alone = {"mlm_weight": 0.0, "contrast_weight": 0.0, "ortholog_weight": 1.0}
    figures, gradient = run(corpus, orthologs=f"{uri}/orthologs.parquet", **alone)
    assert figures["ortholog"] > 0
    assert gradient.abs().max() > 1e-4


def test_negatives_of_all_workers_enter_unless_gather_is_off(corpus):
    one = run(corpus)
    apart = run(corpus, workers=2, gather_negatives=False)
    assert apart[0]["contrast"] < one[0]["contrast"]
    assert apart[0]["mlm"] == pytest.approx(one[0]["mlm"], rel=1e-6)


def test_a_batch_of_few_cells_at_the_end_is_not_logged_and_the_step_before_it_is(corpus):
    """23 cells in batches of 11: each epoch ends with a batch of one cell, whose contrast is 0."""
    settings = Config(model=ROW, train=training.Train(epochs=2, batch_cells=11, log_steps=2))
    task = pretraining.Pretraining(settings, corpus)
    assert [len(task.plan.batch(step)) for step in range(task.num_steps)] == [11, 11, 1, 11, 11, 1]
    rows = fit(pretraining.initial_model(settings, corpus), task, settings.train, LocalContext())
    contrast = {step: value for step, _, name, value in rows if name == "contrast"}
    assert list(contrast) == [1, 2, 4, 5]
    assert min(contrast.values()) > 0
    whole = replace(settings, train=replace(settings.train, batch_cells=12, log_steps=100))
    rows = fit(
        pretraining.initial_model(whole, corpus), pretraining.Pretraining(whole, corpus), whole.train, LocalContext()
    )
    assert sorted({step for step, *_ in rows}) == [1, 4], "11 of 12 cells are enough"


def test_a_contrast_without_anything_to_teach_is_told_once(caplog):
    watch = pretraining.ContrastWatch(Config(train=training.Train(batch_cells=64)))
    assert watch.chance == pytest.approx(math.log(127))
    with caplog.at_level("WARNING", logger="mixgf"):
        watch(1, {"mlm": 0.0})
        watch(10, {"contrast": 0.05})
        assert not caplog.messages
        watch(20, {"contrast": 0.006})
        watch(30, {"contrast": 0.005})
    (said,) = caplog.messages
    assert "contrast loss is 0.006 at step 20, under 1%" in said


@pytest.mark.parametrize("cells", [3, 5, 9])
def test_without_gathering_each_worker_counts_by_its_cells(corpus, cells):
    """Shares are unequal: the figures and the gradient are means over cells of what each worker has alone."""
    alone = {"gather_negatives": False, "mlm_weight": 0.0}
    settings = Config(
        model=ROW, objective=training.Objective(**alone), train=training.Train(epochs=1, batch_cells=cells)
    )
    task = pretraining.Pretraining(settings, corpus)
    works = [task.work(0, rank, 2) for rank in range(2)]
    assert works[0].num_cells != works[1].num_cells
    totals, gradient = {"contrast": 0.0, "alignment": 0.0, "uniformity": 0.0}, 0.0
    for rank, work in enumerate(works):
        model, context = MaskedModel(ROW, corpus.vocabulary.size), LocalContext(torch.device("cpu"), rank, 1)
        slots = [micro.slots_B for micro in work.micros]
        mine = torch.cat(slots).argsort().argsort()
        micros = [
            replace(micro, slots_B=part)
            for micro, part in zip(work.micros, mine.split([len(s) for s in slots]), strict=True)
        ]
        own = replace(work, micros=micros, batch_cells=work.num_cells)
        figures = compute_gradients(TaskForward(model, task), own, context)
        share = work.num_cells / cells
        totals = {name: value + share * figures[name].item() for name, value in totals.items()}
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        gradient = gradient + share * torch.cat([g.reshape(-1) for g in grads])
    found, together = run(corpus, workers=2, epochs=1, batch_cells=cells, **alone)
    for name, value in totals.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert gradient.abs().max() > 1e-4
    assert (together - gradient).abs().max() < 1e-6 * max(1.0, gradient.abs().max().item())


def by_cell(work, values_T):
    """Values of the tokens of each cell of a batch, by cell, in the first view."""
    (micro,) = work.micros
    bounds = micro.batch.offsets_B1.numpy()
    slots, count = micro.slots_B.numpy(), len(micro.slots_B)
    return {int(slots[i]): values_T[bounds[i] : bounds[i + 1]].tolist() for i in range(count)}


def test_masks_and_dropout_of_a_cell_differ_between_epochs_and_not_between_runs(corpus):
    """A batch is the whole corpus, so that each step is an epoch and has each cell once."""
    settings = Config(model=ROW, train=training.Train(epochs=3, batch_cells=23))
    task = pretraining.Pretraining(settings, corpus)
    masks, dropout = [], []
    for step in (0, 0, 1, 2):
        work = task.work(step, 0, 1)
        cells = task.plan.share(step).cells_B
        slots = task.plan.share(step).slots_B
        cell_of = dict(zip(slots.tolist(), cells.tolist(), strict=True))
        ids, keys = (by_cell(work, getattr(work.micros[0].batch, name)) for name in ("ids_T", "keys_T"))
        masks.append({cell_of[slot]: row for slot, row in ids.items()})
        dropout.append({cell_of[slot]: row for slot, row in keys.items()})
    for found in (masks, dropout):
        assert found[0] == found[1]
        for a, b in ((1, 2), (1, 3), (2, 3)):
            assert found[a].keys() == found[b].keys()
            assert sum(found[a][cell] != found[b][cell] for cell in found[a]) > 15, "short cells may be equal"


@pytest.mark.parametrize(
    "chosen", [{}, {"pooling": "first"}, {"contrast_weight": 0.0}], ids=["mean", "first", "mlm only"]
)
def test_the_work_foretold_is_the_work_done(corpus, chosen):
    settings = Config(
        model=ROW,
        tokens=data.Tokens(max_len=40),
        objective=training.Objective(**chosen),
        train=training.Train(batch_cells=6),
    )
    task = pretraining.Pretraining(settings, corpus)
    facts = task.facts()
    done = sum(task.work(step, 0, 1).flops for step in range(task.steps_per_epoch)) / 23
    assert facts["gflop_per_cell"] * 1e9 == pytest.approx(
        done, rel=0.05
    )  # the masks are drawn, the forecast is their mean
    assert facts["tokens_per_cell"] == pytest.approx(corpus.lengths_N.mean())
    assert 1 <= facts["padding_grouped"] < facts["padding_random"]
