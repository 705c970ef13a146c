"""Held-out cells: whole donors, never trained on, evaluated with the same bits at any number of workers; early end and best weights."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from invented import record_shards
from thread_workers import run_workers

from mixgf.config import data, run, training
from mixgf.corpus import held_out, overlap, reader
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.storage import artifacts, files, tables
from mixgf.training import checkpoints, held_out_loss, loop
from mixgf.training.pretraining import Pretraining
from mixgf.training.worker_group import LocalContext

CELLS = 60
ROW = training.Model(num_layers=1, dim=32, num_heads=4, ffn_dim=48, max_positions=40, dropout=0.1)
TRAIN = training.Train(
    epochs=2, batch_cells=8, lr=1e-2, warmup_steps=2, log_steps=1, checkpoint_steps=4, micro_tokens=200,
    heldout_share=0.25, heldout_steps=3,
)  # fmt: skip
CONFIG = run.Config(model=ROW, tokens=data.Tokens(max_len=40), train=TRAIN)
DONORS = np.repeat([f"d{i}" for i in range(10)], 6)


@pytest.fixture(scope="module")
def uri(make_corpus):
    """60 cells of ten donors, six each, in two shards."""
    lengths = np.random.default_rng(0).integers(5, 30, CELLS)
    made = make_corpus(lengths, np.arange(CELLS) % 2, [25, 35])
    add_column(made, "donor", DONORS)
    return made


def add_column(uri, name, values):
    start = 0
    for path in sorted(files.list_dir(f"{uri}/shards")):
        where = f"{uri}/shards/{path.rsplit('/', 1)[-1]}"
        table = tables.read_table(where)
        part = pa.array(list(values[start : start + table.num_rows]))
        tables.write_table(where, table.append_column(name, part))
        start += table.num_rows
    record_shards(uri)


def fit(uri, output="", *, until=0, **train):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, **train))
    corpus = reader.Corpus(uri)
    task, model = Pretraining(config, corpus), MaskedModel(ROW, corpus.vocabulary.size, seed=1)
    selection = held_out_loss.selection(task)
    rows = loop.fit(model, task, config.train, LocalContext(), uri=output, until=until, selection=selection)
    return rows, model, selection


def curve(rows, name):
    return {step: value for step, _, found, value in rows if found == name}


def test_whole_donors_are_held_out_and_the_share_is_an_upper_bound(uri):
    found = held_out.held_out_cells(reader.Corpus(uri), 0.25)
    assert (found.unit, found.units, len(found.cells)) == ("donor", 2, 12)
    kept = np.setdiff1d(np.arange(CELLS), found.cells)
    assert not set(DONORS[found.cells]) & set(DONORS[kept])


def test_without_donors_single_cells_are_held_out(make_corpus):
    corpus = reader.Corpus(make_corpus([9] * 20, [0] * 20, [20]))
    found = held_out.held_out_cells(corpus, 0.25)
    assert (found.unit, len(found.cells)) == ("cell", 5)


def test_a_donor_without_a_name_is_not_a_donor(make_corpus):
    made = make_corpus([9] * 20, [0] * 20, [20])
    add_column(made, "donor", np.array(["unknown"] * 20))
    assert held_out.held_out_cells(reader.Corpus(made), 0.25).unit == "cell"


def test_one_donor_that_is_larger_than_the_share_is_trained_on(make_corpus):
    made = make_corpus([9] * 20, [0] * 20, [20])
    add_column(made, "donor", np.array(["large"] * 18 + ["a", "b"]))
    found = held_out.held_out_cells(reader.Corpus(made), 0.1)
    assert (found.unit, sorted(found.cells.tolist())) == ("donor", [18, 19])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_held_out_cells_are_never_trained_on_and_all_others_once_per_epoch(uri, share):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, cells_share=share))
    task = Pretraining(config, reader.Corpus(uri))
    works = [task.work(step, 0, 1) for step in range(task.steps_per_epoch)]
    seen = [c for w in works for m in w.micros for c in m.batch.cells_B[: m.batch.num_cells // 2].tolist()]
    assert len(seen) == len(set(seen))
    assert not set(seen) & set(task.held_out.cells.tolist())
    if share == 1:
        assert len(seen) == CELLS - 12


def test_figures_by_hand(uri):
    """One batch, recomputed from the model: the loss of masked genes without dropout, and the nearest other vector."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, micro_tokens=10_000, batch_cells=12))
    corpus = reader.Corpus(uri)
    task, model = Pretraining(config, corpus), MaskedModel(ROW, corpus.vocabulary.size, seed=1)
    evaluate = held_out_loss.HeldOutLoss(task)
    figures = evaluate(model, LocalContext())
    (cells,) = evaluate.batches
    (micro,) = task.evaluation_batches(cells, ["input"], held_out_loss._KEY)
    with torch.no_grad():
        h = model(micro.batch.ids_T, micro.batch.offsets_B1)[micro.masked_K]
        assert figures["heldout_mlm"] == pytest.approx(
            F.cross_entropy(model.logits(h), micro.targets_K).item(), rel=1e-5
        )
    assert figures["heldout_loss"] == figures["heldout_mlm"] + figures["heldout_contrast"]
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.1], [1.0, 0.2]])
    assert held_out_loss.contrast_accuracy(a, b) == 1
    assert held_out_loss.contrast_accuracy(a, b.flip(0)) == 0
    b[1] = torch.tensor([-1.0, 0.05])  # now both vectors of the first view are nearest to the first one of the second
    assert held_out_loss.contrast_accuracy(a, b) == 0.5


@pytest.mark.parametrize("workers", [2, 3])
def test_figures_have_the_same_bits_at_any_number_of_workers(uri, workers):
    corpus = reader.Corpus(uri)
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, batch_cells=3))

    def work(context):
        model = MaskedModel(ROW, corpus.vocabulary.size, seed=1)
        return held_out_loss.HeldOutLoss(Pretraining(config, corpus))(model, context)

    found = run_workers(workers, work)
    alone = held_out_loss.HeldOutLoss(Pretraining(config, corpus))(
        MaskedModel(ROW, corpus.vocabulary.size, seed=1), LocalContext()
    )
    assert len(alone) == 4
    assert found == [alone] * workers


def test_evaluations_are_logged_and_do_not_change_the_training(uri):
    rows, _, _ = fit(uri)
    assert list(curve(rows, "heldout_mlm")) == [3, 6, 9, 12]
    assert all(0 <= v <= 1 for v in curve(rows, "heldout_contrast_accuracy").values())
    often, _, _ = fit(uri, heldout_steps=1)
    assert curve(often, "loss") == curve(rows, "loss")
    assert len(curve(often, "heldout_mlm")) == 12


def test_a_training_that_gets_worse_ends_early_and_goes_on_ended(uri, tmp_path, monkeypatch):
    """The held-out loss is made to rise from the second evaluation on."""
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.1])
    monkeypatch.setattr(held_out_loss.HeldOutLoss, "__call__", lambda *_: {held_out_loss.METRIC: next(losses)})
    output = str(tmp_path)
    rows, _, selection = fit(uri, output, patience=2, epochs=4)
    assert curve(rows, "heldout_loss") == {3: 1.0, 6: 0.5, 9: 0.6, 12: 0.7}
    assert (selection.best_step, selection.ended) == (6, True)
    assert checkpoints.last_and_best(output) == (12, 6)
    assert set(checkpoints.complete_steps(output)) == {6, 8, 12}
    again, model, _ = fit(uri, output, patience=2, epochs=4)
    assert again == rows
    before = [p.clone() for p in model.parameters()]
    selection.restore(model, output)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("stop", [4, 6, 7])
def test_a_stopped_training_goes_on_with_the_same_choice(uri, tmp_path, stop):
    whole, model, selection = fit(uri)
    fit(uri, str(tmp_path), until=stop)
    rows, resumed, other = fit(uri, str(tmp_path))
    for name in ("loss", "heldout_loss", "heldout_contrast_accuracy"):
        assert curve(rows, name) == curve(whole, name)
    assert (other.best_step, other.best) == (selection.best_step, selection.best)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    selection.restore(model)
    other.restore(resumed, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_an_audit_counts_held_out_cells_apart(uri):
    corpus = reader.Corpus(uri)
    record = artifacts.plan("checkpoint", 1, {"train": {"heldout_share": 0.25}}, {})
    unseen = overlap.held_out_of(record, corpus)
    trained = dataclasses.replace(overlap.corpus_cells(uri), held_out=unseen)
    found = overlap.compare_cells(overlap.corpus_cells(uri), trained)
    assert (found.cells, found.held_out) == ((48, 60), 12)
    assert "12 more were in the corpus, but held out from training" in found.line
    assert found.json()["held_out"] == 12
    assert "held_out" not in overlap.compare_cells(overlap.corpus_cells(uri), overlap.corpus_cells(uri)).json()


def test_a_share_that_leaves_nothing_is_refused(uri):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, heldout_share=0.001))
    with pytest.raises(
        UserError, match=r"train.heldout_share = 0.001: leaves 60 cells to train on and 0 held out of 60"
    ):
        Pretraining(config, reader.Corpus(uri))
    with pytest.raises(UserError, match=r"train.patience = 2: needs held-out cells"):
        training.Train(patience=2)
