"""The perturb stage: nothing is computed twice, whatever was killed; a pool gives what one loop gives."""

import dataclasses
import time
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pytest
import torch
from invented import record_shards

from mixgf.config import data, training
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Compute, Config, Inputs
from mixgf.corpus.reader import Corpus
from mixgf.distributed.metrics import Meter
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor, LocalPool, Receipt
from mixgf.perturbation import group_design
from mixgf.perturbation.scoring_tasks import ScoringWorker
from mixgf.report import load
from mixgf.report.sections import perturbation, summary
from mixgf.stages import perturb
from mixgf.storage import artifacts, files, tables
from mixgf.tracking import cost

ROW = training.Model(num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_positions=20, init_sd=0.3)
NUM_CELLS = 40
COLUMNS = [
    "gene", "symbol", "ortholog", "ortholog_symbol", "species", "operation", "variant", "role", "reference", "num_cells", "num_donors", "coverage", "mean_rank", "shift", "shift_low",
    "shift_high", "response", "p_cell", "fdr_cell", "p_donor", "fdr_donor", "null_percentile", "p_null", "fdr_null", "num_null", "hit",
    "rank_expected", "shift_minus_rank_expected", "shift_alternatives", "shift_minus_alternatives", "de_statistic", "de_log_fold",
    "de_rank", "shift_untrained", "hit_untrained", "shift_false_goal", "hit_false_goal", "start_cells", "readable_cells",
    "expressing_cells", "reading_length", "warnings", "shift_alternative_0",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(make_corpus, tmp_path_factory):
    """A corpus with four donors, and an untrained checkpoint on its vocabulary."""
    lengths = np.random.default_rng(1).integers(6, 18, NUM_CELLS)
    corpus = make_corpus(lengths, [0] * NUM_CELLS, [25, 15], genes=24, names=("human",))
    start = 0
    for i, rows in enumerate((25, 15)):
        uri = f"{corpus}/shards/{i:05d}.parquet"
        donors = [f"d{c // 2 % 4}" for c in range(start, start + rows)]
        tables.write_table(uri, tables.read_table(uri).append_column("donor", pa.array(donors)))
        start += rows
    record_shards(corpus)
    weights = str(tmp_path_factory.mktemp("pretrain"))
    vocabulary = Corpus(corpus).vocabulary
    record = artifacts.plan("checkpoint", 1, {}, {})
    artifacts.begin(weights, record)
    model = MaskedModel(ROW, vocabulary.size, seed=5)
    checkpoint.publish_checkpoint(weights, record, model, vocabulary=vocabulary.hash, tokens=data.Tokens(max_len=20))
    return Inputs(corpus=corpus, checkpoint=weights)


def configure(inputs, output, **settings):
    chosen = {
        "start": "cell_type == 'alpha'", "goal": "cell_type == 'beta'", "alternatives": ("donor == 'd1'",), "max_cells": 14,
        "block_cells": 4, "block_genes": 7, "num_permutations": 100,
    } | settings  # fmt: skip
    return Config(output=str(output), inputs=inputs, perturb=Perturb(**chosen), tokens=data.Tokens(max_len=20))


def genes(output):
    return files.read_bytes(f"{output}/perturb/genes.parquet")


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that was never interrupted."""
    output = tmp_path_factory.mktemp("whole")
    perturb.run(configure(inputs, output), executor=LocalExecutor())
    return output


def test_the_table_has_a_row_per_gene_and_operation_ranked_by_shift(whole):
    table = tables.read_table(f"{whole}/perturb/genes.parquet")
    assert table.column_names == COLUMNS
    frame = table.to_pandas()
    record = artifacts.require(f"{whole}/perturb", "perturbation")
    assert len(frame) == 2 * record.counts["genes"]
    assert not frame.duplicated(["gene", "operation"]).any()
    for _, part in frame.groupby("operation"):
        assert part["shift"].is_monotonic_decreasing
    assert (frame["variant"] == "remaining").all()
    assert (frame.loc[frame["operation"] == "overexpress", "num_cells"] == 14).all()
    deleted = frame[frame["operation"] == "delete"]
    assert np.allclose(deleted["num_cells"], deleted["coverage"] * 14)
    assert record.counts["sentences"] == frame["num_cells"].sum()
    assert (frame["p_donor"].between(0, 1) == (frame["num_donors"] >= 3)).all()
    assert ((frame["shift_low"] < frame["shift"]) & (frame["shift"] < frame["shift_high"])).all()


def test_running_again_computes_nothing(inputs, whole, monkeypatch):
    monkeypatch.setattr(ScoringWorker, "__init__", lambda *_, **__: pytest.fail("worked again"))
    before = files.read_json(f"{whole}/perturb/record.json")
    perturb.run(configure(inputs, whole, micro_tokens=50), executor=LocalExecutor())
    assert files.read_json(f"{whole}/perturb/record.json") == before


def test_a_killed_run_computes_only_what_is_missing_and_ends_with_the_same_bytes(inputs, whole, tmp_path, monkeypatch):
    keys, call = [], ScoringWorker.__call__

    def counted(scorer, item):
        if len(keys) == 9 and "stop" not in keys:
            keys.append("stop")
            raise KeyboardInterrupt
        result = call(scorer, item)
        keys.append(item[0].key)
        return result

    monkeypatch.setattr(ScoringWorker, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        perturb.run(configure(inputs, tmp_path), executor=LocalExecutor())
    assert artifacts.find(f"{tmp_path}/perturb") is None
    perturb.run(configure(inputs, tmp_path), executor=LocalExecutor())
    keys.remove("stop")
    assert len(keys) == len(set(keys)) == artifacts.require(f"{tmp_path}/perturb", "perturbation").counts["parts"]
    assert genes(tmp_path) == genes(whole)


def test_a_lost_part_is_the_only_one_made_again(inputs, whole, tmp_path, monkeypatch):
    perturb.run(configure(inputs, tmp_path), executor=LocalExecutor())
    record = artifacts.find(f"{tmp_path}/perturb")
    parts = f"{tmp_path}/perturb/{record.details['parts']}"
    files.remove(f"{tmp_path}/perturb/record.json")
    files.remove(f"{parts}/delete-c00001-g00002.parquet")
    keys, call = [], ScoringWorker.__call__
    monkeypatch.setattr(ScoringWorker, "__call__", lambda self, item: (keys.append(item[0].key), call(self, item))[1])
    perturb.run(configure(inputs, tmp_path), executor=LocalExecutor())
    assert keys == ["delete-c00001-g00002"]
    assert genes(tmp_path) == genes(whole)


def test_a_response_matrix_survives_a_kill_and_a_lost_part_and_leaves_the_shifts_as_they_are(
    inputs, whole, tmp_path, monkeypatch
):
    once, again = tmp_path / "once", tmp_path / "again"
    perturb.run(configure(inputs, once, response=6), executor=LocalExecutor())
    matrix = files.read_bytes(f"{once}/perturb/responses.parquet")
    frame = tables.read_table(f"{once}/perturb/responses.parquet").to_pandas()
    assert genes(once) == genes(whole)
    assert frame["responding"].nunique() == 6
    record = artifacts.find(f"{once}/perturb")
    assert record.counts["responses"] == len(frame)
    assert record.counts["parts"] == artifacts.find(f"{whole}/perturb").counts["parts"]
    write, left = tables.write_table, [9]

    def dying(uri, *rest, **named):  # between a unit's responses and its own part
        left[0] -= "/parts/" in uri and "/responses/" not in uri
        if not left[0]:
            raise KeyboardInterrupt
        return write(uri, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_table", dying)
        with pytest.raises(KeyboardInterrupt):
            perturb.run(configure(inputs, again, response=6), executor=LocalExecutor())
    perturb.run(configure(inputs, again, response=6), executor=LocalExecutor())
    assert files.read_bytes(f"{again}/perturb/responses.parquet") == matrix
    few = tmp_path / "few"
    chosen = {"screen": 4, "screen_sample": 10, "screen_agreement": 0.0, "null_genes": 3}
    corpus = Corpus(inputs.corpus)
    split = group_design.build_design(corpus, configure(inputs, few, response=6, **chosen))
    names = corpus.obs()["cell"].iloc[split.cells_N].tolist()
    every = tmp_path / "every"
    perturb.run(configure(inputs, every, response=6, start=f"cell in {names!r}"), executor=LocalExecutor())
    frame = tables.read_table(f"{every}/perturb/responses.parquet").to_pandas()
    perturb.run(configure(inputs, few, response=6, **chosen), executor=LocalExecutor())
    part = tables.read_table(f"{few}/perturb/responses.parquet").to_pandas()
    keys = ["operation", "gene", "responding"]
    both = part.astype(dict.fromkeys(keys, str)).merge(frame.astype(dict.fromkeys(keys, str)), on=keys)
    assert len(both) == len(part) < len(frame)
    assert both["change_x"].to_numpy() == pytest.approx(both["change_y"].to_numpy(), abs=1e-6)
    assert (both["num_cells_x"] == both["num_cells_y"]).all()


def test_several_alternatives_and_states_by_donor_equal_a_plain_loop(inputs, tmp_path):
    """States are means over all their cells, by donor as well; every alternative has its shift, and their mean stands beside."""
    others = ("donor == 'd1'", "donor in ['d2', 'd3'] and cell_type == 'beta'")
    perturb.run(configure(inputs, tmp_path, alternatives=others, max_cells=3), executor=LocalExecutor())
    corpus, encoder = Corpus(inputs.corpus), checkpoint.load_encoder(inputs.checkpoint)[0].eval()
    obs = corpus.obs()

    def hidden(sentence):
        with torch.no_grad():
            return encoder(torch.tensor(sentence), torch.tensor([0, len(sentence)])).double().numpy()

    vectors = np.stack([hidden(corpus.tokens([c])[0].tolist()).mean(axis=0) for c in range(NUM_CELLS)])
    expressions = {
        "start": "cell_type == 'alpha'",
        "goal": "cell_type == 'beta'",
        "alternative_0": others[0],
        "alternative_1": others[1],
    }
    states = tables.read_table(f"{tmp_path}/perturb/states.parquet").to_pandas()
    means = {}
    for name, text in expressions.items():
        cells = np.flatnonzero(obs.eval(text))
        means[name] = vectors[cells].mean(axis=0)
        mine = states[states["state"] == name].set_index("donor")
        assert set(mine.index) == {"", *obs["donor"].iloc[cells]}
        for donor, row in mine.iterrows():
            chosen = cells if not donor else cells[(obs["donor"].iloc[cells] == donor).to_numpy()]
            assert row["num_cells"] == len(chosen)
            assert np.array(row["vector"]) == pytest.approx(vectors[chosen].mean(axis=0), abs=1e-6)
    frame = tables.read_table(f"{tmp_path}/perturb/genes.parquet").to_pandas()
    perturbed = group_design.build_design(
        corpus, configure(inputs, tmp_path, alternatives=others, max_cells=3)
    ).cells_N.tolist()
    deleted = frame[frame["operation"] == "delete"].set_index("symbol")
    checked = 0
    for symbol, row in deleted.iterrows():
        token, found = corpus.vocabulary.find(symbol, "human"), {name: [] for name in expressions}
        for sentence in (corpus.tokens([c])[0].tolist() for c in perturbed):
            if token in sentence:
                at = sentence.index(token)
                before = np.delete(hidden(sentence), at, axis=0).mean(axis=0)
                after = hidden(sentence[:at] + sentence[at + 1 :]).mean(axis=0)
                for name, goal in means.items():
                    cosine = [v @ goal / np.linalg.norm(v) / np.linalg.norm(goal) for v in (before, after)]
                    found[name].append(cosine[1] - cosine[0])
        for column, name in (("shift", "goal"), *((f"shift_{n}", n) for n in ("alternative_0", "alternative_1"))):
            assert row[column] == pytest.approx(np.mean(found[name]), abs=1e-6)
        both = np.mean([np.mean(found["alternative_0"]), np.mean(found["alternative_1"])])
        assert row["shift_alternatives"] == pytest.approx(both, abs=1e-6)
        assert row["shift_minus_alternatives"] == pytest.approx(np.mean(found["goal"]) - both, abs=1e-6)
        checked += 1
    assert checked > 5
    assert deleted["shift"].abs().max() > 1e-3


@pytest.mark.ray
def test_two_ray_workers_give_what_the_local_loop_gives(ray_local, inputs, whole, tmp_path):
    perturb.run(configure(inputs, tmp_path))
    assert genes(tmp_path) == genes(whole)
    states = [files.read_bytes(f"{output}/perturb/states.parquet") for output in (tmp_path, whole)]
    assert states[0] == states[1]


@pytest.mark.ray
def test_workers_that_the_cluster_has_no_room_for_are_not_charged(ray_local, inputs, whole, tmp_path):
    chosen = dataclasses.replace(configure(inputs, tmp_path), compute=Compute(num_workers=40))
    began = time.monotonic()
    perturb.run(chosen)
    most = ray_local.cluster_resources()["CPU"] * (time.monotonic() - began)
    budget = artifacts.find(f"{tmp_path}/perturb").details["budget"]
    assert 0 < budget["worker_hours"] * cost.HOUR <= most
    assert genes(tmp_path) == genes(whole)


def test_other_settings_in_the_same_place_are_refused_and_a_wrong_expression_leaves_nothing(inputs, whole, tmp_path):
    with pytest.raises(UserError, match=r"perturb\.goal: .*Choose another output"):
        perturb.run(configure(inputs, whole, goal="donor == 'd2'"), executor=LocalExecutor())
    with pytest.raises(UserError, match=r"perturb\.goal: cell_type has no value 'bet'; did you mean one of beta"):
        perturb.run(configure(inputs, tmp_path, goal="cell_type == 'bet'"), executor=LocalExecutor())
    assert not files.exists(f"{tmp_path}/perturb")


def test_a_part_that_fails_is_named_and_the_others_are_kept(inputs, tmp_path, monkeypatch):
    call = ScoringWorker.__call__

    def broken(scorer, item):
        if item[0].key == "delete-c00000-g00001":
            msg = "no"
            raise ValueError(msg)
        return call(scorer, item)

    class Patient(LocalPool):
        def run(self, tasks, *, stop=None):
            errors = []
            for number, task in enumerate(tasks):
                try:
                    (receipt,) = super().run([task], stop=stop)
                    yield Receipt(number, result=receipt.result)
                except ValueError as error:
                    errors.append(Receipt(number, error=str(error)))
            yield from errors

    executor = LocalExecutor()
    monkeypatch.setattr(executor, "pool", lambda make: nullcontext(Patient(make)))
    monkeypatch.setattr(ScoringWorker, "__call__", broken)
    told = []
    monkeypatch.setattr(Meter, "units", lambda self, **states: told.append(states))
    with pytest.raises(UserError, match=r"1 of \d+ parts failed every time; delete-c00000-g00001: no\. The others are"):
        perturb.run(configure(inputs, tmp_path), executor=executor)
    assert artifacts.find(f"{tmp_path}/perturb") is None
    assert told[-1] == {"waiting": 0, "done": told[-2]["done"], "failed": 1}


def test_overexpressing_the_gene_that_marks_the_goal_is_the_strongest_shift(inputs, tmp_path):
    """Planted truth: cells are `with` or `without` gene human3 in their sentence; putting it in front moves towards `with`
    and away from `without`."""
    corpus = Corpus(inputs.corpus)
    token = corpus.vocabulary.find("human3", "human")
    copy = str(tmp_path / "corpus")
    for name in ("vocabulary.parquet", "index.parquet", "record.json"):
        files.write_bytes(f"{copy}/{name}", files.read_bytes(f"{inputs.corpus}/{name}"))
    for name in ("00000.parquet", "00001.parquet"):
        table = tables.read_table(f"{inputs.corpus}/shards/{name}")
        sentences = table["tokens"].to_pylist()
        marked = []
        for i, sentence in enumerate(sentences):
            rest = [t for t in sentence if t != token]
            spare = next(t for t in corpus.vocabulary.species_tokens("human").tolist() if t not in sentence)
            rest += [spare] * (len(sentence) - len(rest))
            sentences[i] = [token, *rest[:-1]] if i % 3 == 0 else rest
            marked.append("with" if i % 3 == 0 else "without")
        table = table.set_column(
            table.column_names.index("tokens"), "tokens", pa.array(sentences, pa.list_(pa.int32()))
        )
        tables.write_table(f"{copy}/shards/{name}", table.append_column("state", pa.array(marked)))
    record_shards(copy)
    inputs = Inputs(corpus=copy, checkpoint=inputs.checkpoint)
    chosen = {
        "start": "state == 'without'",
        "goal": "state == 'with'",
        "variant": "all",
        "operations": ("overexpress",),
        "alternatives": ("state == 'without'",),
    }
    settings = configure(inputs, tmp_path, **chosen, genes=tuple(f"human{i}" for i in range(24)))
    perturb.run(settings, executor=LocalExecutor())
    frame = tables.read_table(f"{tmp_path}/perturb/genes.parquet").to_pandas()
    frame = frame.sort_values("shift_minus_alternatives", ascending=False, ignore_index=True)
    assert frame["symbol"][0] == "human3"
    assert frame["shift_minus_alternatives"][0] > 3 * frame["shift_minus_alternatives"][1]
    assert frame["de_log_fold"][0] > 3
    assert "differs itself between start and goal" in frame["warnings"][0]


def shifts(output):
    frame = tables.read_table(f"{output}/perturb/genes.parquet").to_pandas()
    return frame.set_index(["operation", "gene"])["shift"]


@pytest.fixture(scope="module")
def reported(inputs, tmp_path_factory):
    """A run without a screen, of the cells that runs with one report."""
    corpus = Corpus(inputs.corpus)
    plan = group_design.build_design(corpus, configure(inputs, "unused", screen=4))
    alpha = np.flatnonzero(corpus.obs()["cell_type"] == "alpha")
    assert len(plan.cells_N) == len(plan.screened_N) == len(alpha) / 2
    assert np.array_equal(np.union1d(plan.cells_N, plan.screened_N), alpha)
    names = corpus.obs()["cell"].iloc[plan.cells_N].tolist()
    output = tmp_path_factory.mktemp("reported")
    perturb.run(configure(inputs, output, start=f"cell in {names!r}"), executor=LocalExecutor())
    return output


def test_a_screen_scores_its_best_and_a_sample_exactly_and_says_how_well_it_agrees(inputs, reported, tmp_path):
    chosen = {"screen": 4, "screen_sample": 10, "screen_agreement": 0.0, "screen_grid": 6, "null_genes": 3}
    perturb.run(configure(inputs, tmp_path, **chosen), executor=LocalExecutor())
    every, found = shifts(reported), shifts(tmp_path)
    assert 10 < len(found) / 2 < len(every) / 2
    reference = tables.read_table(f"{tmp_path}/perturb/genes.parquet").to_pandas().groupby("gene")["reference"].first()
    assert reference.all()  # 13 drawn ones are no company
    assert np.allclose(found, every[found.index], atol=1e-6)
    fate = tables.read_table(f"{tmp_path}/perturb/not_scored.parquet").to_pandas()
    assert len(fate) == len(every)
    assert set(fate.loc[fate["fate"] == "scored", "gene"]) == set(found.index.get_level_values("gene"))
    for end in (slice(None, 2), slice(-2, None)):  # two that move cells there, two that move them away
        assert (fate.groupby("operation")["fate"].apply(lambda f, end=end: (f.iloc[end] == "scored").all())).all()
    record = artifacts.find(f"{tmp_path}/perturb")
    assert record.counts["screened_out"] == (fate["fate"] == "screened out").sum() / 2
    for seen in record.details["screen"].values():  # estimates and exact shifts of the cells of the screen
        assert seen["num_genes"] == 10
        assert seen["spearman"] > 0.5
        assert 0 <= seen["recall"] <= 1
    assert any("drawn at random" in text for text in record.details["warnings"])
    assert any("screen of 10 start cells; shifts are of 10 others" in text for text in record.details["warnings"])


def test_after_a_screen_the_drawn_genes_are_the_company_and_all_genes_count(make_corpus, inputs, tmp_path):
    corpus = make_corpus([18] * 40, [0] * 40, [40], genes=70, names=("human",))
    weights, vocabulary = f"{tmp_path}/pretrain", Corpus(corpus).vocabulary
    record = artifacts.plan("checkpoint", 1, {}, {})
    artifacts.begin(weights, record)
    model = MaskedModel(ROW, vocabulary.size, seed=5)
    checkpoint.publish_checkpoint(weights, record, model, vocabulary=vocabulary.hash, tokens=data.Tokens(max_len=20))
    mine = Inputs(corpus=corpus, checkpoint=weights)
    chosen = {
        "screen": 6,
        "screen_sample": 12,
        "null_genes": 14,
        "screen_agreement": -1.0,
        "alternatives": (),
        "operations": ("delete",),
    }
    perturb.run(configure(mine, tmp_path, **chosen), executor=LocalExecutor())
    frame = tables.read_table(f"{tmp_path}/perturb/genes.parquet").to_pandas()
    record = artifacts.find(f"{tmp_path}/perturb")
    whole = record.counts["screened_out"] + len(frame)
    drawn = int(frame["reference"].sum())
    assert 24 <= drawn <= 26
    assert drawn < len(frame) <= 32 < whole
    fate = tables.read_table(f"{tmp_path}/perturb/not_scored.parquet").to_pandas()
    best = set(fate["gene"].iloc[:3]) | set(fate.dropna(subset="estimate")["gene"].iloc[-3:])
    assert best <= set(frame["gene"])
    assert set(frame.loc[~frame["reference"], "gene"]) <= best  # who was not drawn was chosen
    blank = frame["null_percentile"].isna()  # of the first ranks, where too few drawn genes are alike
    assert frame.loc[blank, "mean_rank"].max() < frame["mean_rank"].median()
    order = frame.sort_values("p_cell", ignore_index=True)
    assert order["fdr_cell"].iloc[-1] == pytest.approx(min(1, order["p_cell"].iloc[-1] * whole / len(frame)))
    assert any(f"count all {whole} genes" in text for text in record.details["warnings"])


def test_a_screen_that_agrees_too_little_is_not_followed(inputs, reported, tmp_path):
    perturb.run(configure(inputs, tmp_path, screen=4, screen_sample=10, screen_agreement=1.0), executor=LocalExecutor())
    every, found = shifts(reported), shifts(tmp_path)
    assert np.allclose(found[every.index], every, atol=1e-6)
    record = artifacts.find(f"{tmp_path}/perturb")
    assert record.counts["screened_out"] == 0
    assert any("agrees too little" in text for text in record.details["warnings"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"goal": ""}, r"perturb\.screen = 4: must be 0 without perturb\.goal"),
        ({"operations": ("inhibit",)}, r"perturb\.screen = 4: must be 0 with inhibit"),
        ({"budget_cost": 3.0}, r"perturb\.budget_cost = 3\.0: must be 0 without perturb\.price"),
        ({"screen_sample": 2}, r"perturb\.screen_sample = 2: must be at least 10"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Perturb(**({"screen": 4, "goal": "cell_type == 'beta'"} | settings))


def report_of(inputs, output):
    """What the report says of a run's perturbation, in its section and in brief."""
    run = load.load_results(configure(inputs, output), light=True)
    sections = (summary.section(run), perturbation.section(run))
    return "\n".join(str(block) for section in sections for block in section.blocks).lower()


def test_a_budget_ends_a_run_cleanly_and_a_larger_one_computes_only_the_rest(inputs, whole, tmp_path, monkeypatch):
    keys, call = [], ScoringWorker.__call__
    monkeypatch.setattr(ScoringWorker, "__call__", lambda self, item: (keys.append(item[0].key), call(self, item))[1])
    ticks, spend = iter(range(10_000)), cost.Spend
    monkeypatch.setattr(cost, "Spend", lambda *a, **k: spend(*a, **k, clock=lambda: float(next(ticks))))
    with pytest.raises(
        UserError, match=r"perturb\.budget_hours: .* were spent before .*: run again with a larger budget"
    ):
        perturb.run(configure(inputs, tmp_path, budget_hours=1 / 3600), executor=LocalExecutor())
    perturb.run(configure(inputs, tmp_path, budget_hours=60 / 3600), executor=LocalExecutor())
    record, first, done = artifacts.find(f"{tmp_path}/perturb"), shifts(tmp_path), len(keys)
    assert 0 < record.counts["not_scored"] < record.counts["genes"] + record.counts["not_scored"]
    with pytest.raises(UserError, match=r"holds a partial perturbation, not a perturbation"):
        artifacts.require(f"{tmp_path}/perturb", "perturbation")
    assert record.fingerprint != artifacts.find(f"{whole}/perturb").fingerprint == record.details["completed_by"]
    said = report_of(inputs, tmp_path)
    assert f"not complete: the budget was spent before {record.counts['not_scored']} of " in said
    assert f"not complete: its budget was spent before {record.counts['not_scored']} gene" in said
    assert record.details["budget"]["worker_hours"] <= 60 / 3600
    assert np.allclose(first, shifts(whole)[first.index], atol=1e-6)
    fate = tables.read_table(f"{tmp_path}/perturb/not_scored.parquet").to_pandas()
    assert (fate["fate"] == "beyond the budget").sum() == 2 * record.counts["not_scored"]
    perturb.run(configure(inputs, tmp_path, budget_hours=60 / 3600), executor=LocalExecutor())
    assert len(keys) == done  # the same budget: nothing to do
    before = {name: files.sha256(f"{tmp_path}/perturb/{name}") for name in ("record.json", "genes.parquet")}
    with pytest.raises(UserError, match="no such file"):
        perturb.run(configure(inputs, tmp_path, reference_genes=("gone.csv",)), executor=LocalExecutor())
    with monkeypatch.context() as killed:
        killed.setattr(perturb, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            perturb.run(configure(inputs, tmp_path), executor=LocalExecutor())
    assert {name: files.sha256(f"{tmp_path}/perturb/{name}") for name in before} == before, "the old result stays"
    perturb.run(configure(inputs, tmp_path), executor=LocalExecutor())
    assert len(keys) == len(set(keys))
    ours, theirs = (artifacts.require(f"{output}/perturb", "perturbation") for output in (tmp_path, whole))
    assert ours.counts == theirs.counts
    assert ours.counts["not_scored"] == 0
    assert ours.fingerprint == theirs.fingerprint
    assert genes(tmp_path) == genes(whole)
    assert "not complete" not in report_of(inputs, tmp_path)


@pytest.mark.ray
def test_a_dry_run_writes_nothing_and_says_what_the_run_then_does(ray_local, inputs, whole, tmp_path):
    for executor in (LocalExecutor(), None):
        text = perturb.dry_run(configure(inputs, tmp_path, price=2.0), executor=executor)
        assert "measured on one worker" in text
    assert not files.exists(f"{tmp_path}/perturb")
    stated = perturb.dry_run(configure(inputs, tmp_path, worker_flops=1e3, price=2.0), executor=LocalExecutor())
    counts = artifacts.find(f"{whole}/perturb").counts
    numbers = {line.split("  ")[0]: line.split() for line in stated.splitlines()}
    sentences = sum(int(numbers[name][1].replace(",", "")) for name in ("delete", "overexpress"))
    assert sentences == counts["sentences"]
    assert "cost " in stated


def test_scored_sentences_are_counted_for_the_boards(inputs, whole, tmp_path, monkeypatch):
    added = []
    monkeypatch.setattr(Meter, "add", lambda self, name, amount=1.0, **_: added.append((self.stage, name, amount)))
    perturb.run(configure(inputs, tmp_path), executor=LocalExecutor())
    counted = sum(amount for stage, name, amount in added if (stage, name) == ("perturb", "sentences_scored"))
    assert counted == 2 * artifacts.find(f"{whole}/perturb").counts["sentences"]  # of the encoder and its twin
