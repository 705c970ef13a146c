import math

import numpy as np
import pytest
import torch

from mixgf.config import data, parse, training
from mixgf.config.run import Config
from mixgf.corpus import reader
from mixgf.encoder.bert import MaskedModel
from mixgf.training import losses, pretraining
from mixgf.training.loop import TaskForward, compute_gradients
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


def run(
    corpus,
    *,
    workers=1,
    micro_tokens=10_000,
    step=0,
    epochs=2,
    batch_cells=10,
    model_row=ROW,
    orthologs="",
    whole_last_layer=False,
    **objective,
):
    """Losses and flat gradient of one step, summed over simulated workers (threads that meet in every reduction)."""
    import threading

    settings = Config(
        model=model_row, tokens=data.Tokens(max_len=40, cls=corpus.cls), objective=training.Objective(**objective), vocab=data.Vocab(orthologs=(orthologs,)),
        train=training.Train(epochs=epochs, batch_cells=batch_cells, micro_tokens=micro_tokens),
    )  # fmt: skip
    barrier, buffers, lock = threading.Barrier(workers), {}, threading.Lock()

    class Worker(LocalContext):
        calls = 0

        def all_reduce(self, x):
            key, self.calls = self.calls, self.calls + 1
            with lock:
                buffers.setdefault(key, {})[self.rank] = x.clone()
            barrier.wait(60)
            x.copy_(sum(buffers[key][r] for r in range(workers)))

    results = {}

    def work(rank):
        task = pretraining.Pretraining(settings, corpus)
        if whole_last_layer:
            assert task.last_layer_at_queries
            task.last_layer_at_queries = False
        model = MaskedModel(model_row, corpus.vocabulary.size)
        context = Worker(torch.device("cpu"), rank, workers)
        figures = compute_gradients(TaskForward(model, task), task.work(step, rank, workers), context)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        results[rank] = ({k: v.item() for k, v in figures.items()}, torch.cat([g.reshape(-1) for g in grads]))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == workers
    figures = {k: sum(results[r][0][k] for r in results) for k in results[0][0]}
    return figures, sum(results[r][1] for r in results)


@pytest.fixture(scope="module")
def uri(make_corpus):
    lengths = np.random.default_rng(0).integers(5, 30, 23)
    return make_corpus(lengths, np.arange(23) % 2, [9, 14])


@pytest.fixture(scope="module")
def corpus(uri):
    return reader.Corpus(uri)


def same(a, b, tolerance=1e-6):
    assert a[0].keys() == b[0].keys()
    for name, value in a[0].items():
        assert value == pytest.approx(b[0][name], rel=tolerance, abs=tolerance), name
    assert (a[1] - b[1]).abs().max() <= tolerance * max(1.0, a[1].abs().max().item())


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
