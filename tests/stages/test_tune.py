"""A sweep from end to end on small real cells: resumed equals undisturbed, Ray Tune equals the plain loop, bad arms stop nothing."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata
import fake_cluster
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from processes import die_with_us
from scipy import sparse

from mixgf.config import parse
from mixgf.config.classification import Classify
from mixgf.config.data import Source, Tokens, Vocab
from mixgf.config.run import Compute, Config, Inputs, Tracking
from mixgf.config.training import Model, Train
from mixgf.config.tuning import Tune
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.report import build, load
from mixgf.stages import prepare, pretrain, tune, tune_trials
from mixgf.storage import artifacts, files
from mixgf.storage.tables import read_table
from mixgf.tracking import mlflow_runs
from mixgf.training import checkpoints
from mixgf.tuning import held_out

TYPES = ("beta cell", "alpha cell", "ductal cell")
SPACE = ({"objective.contrast_weight": (0.0,)}, {"objective.view": ("mask",)}, {"train.lr": (1e12,)})


def cells(name, folder, each):
    data = anndata.read_h5ad(files.local_path(f"resource:pancreas_{name}_baron.h5ad"))
    labels = data.obs["cell_type"].astype(str).to_numpy()
    rows = np.concatenate([np.flatnonzero(labels == kind)[:each] for kind in TYPES])
    obs = pd.DataFrame(
        {"cell_type": labels[rows], "organ": "pancreas", "donor": [f"{name}{i % 3}" for i in range(len(rows))]}
    )
    obs.index = [f"{name}{i}" for i in range(len(rows))]
    x = sparse.csr_matrix(
        (data.X.data.astype(np.int32), data.X.indices.astype(np.int32), data.X.indptr), shape=data.shape
    )[rows]
    path = folder / f"{name}.h5ad"
    anndata.AnnData(x, obs=obs, var=data.var[["ensembl_id"]]).write_h5ad(path)
    return Source(uri=str(path), species=name, name=name)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tracking_uri):
    """A corpus of 150 cells of both species, and a sweep of four arms over it that takes seconds."""
    folder = tmp_path_factory.mktemp("tune")
    run = Config(
        output=str(folder / "run"), sources=(cells("human", folder, 30), cells("mouse", folder, 20)),
        vocab=Vocab(sharing="ortholog"), tokens=Tokens(max_len=32),
        model=Model(num_layers=1, dim=16, num_heads=2, ffn_dim=32, max_positions=32),
        train=Train(max_steps=8, batch_cells=8, lr=1e-3, warmup_steps=2, checkpoint_steps=3, log_steps=4),
        classify=Classify(epochs=1, batch_cells=16, lr=1e-3, warmup_steps=2, keep=False),
        tune=Tune(space=SPACE, seeds=2, rungs=(0.5, 1.0), keep=0.4, cells=120),
        compute=Compute(num_workers=1), tracking=Tracking(uri=tracking_uri),
    )  # fmt: skip
    prepare.run(run, executor=LocalExecutor())
    return run


def at(base, folder, **changes):
    corpus = files.join(base.output, "corpus")
    mine = replace(base.tracking, experiment=str(folder))
    return replace(base, output=str(folder / "sweep"), inputs=Inputs(corpus=corpus), tracking=mine, **changes)


def tables(uri):
    return {
        name: files.sha256(f"{uri}/{name}.parquet") for name in ("trials", "arms", "effects", "interactions", "final")
    }


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """The sweep by the plain loop, registered."""
    settings = at(base, tmp_path_factory.mktemp("plain"))
    return replace(settings, tune=replace(settings.tune, register="pancreas")), tune.run(
        replace(settings, tune=replace(settings.tune, register="pancreas")), executor=LocalExecutor()
    )


def test_the_board_has_what_was_trained_and_arms_stop_at_the_rung(undisturbed):
    _, uri = undisturbed
    record = artifacts.require(uri, "sweep")
    board = read_table(f"{uri}/arms.parquet").to_pandas()
    reached = board.groupby("name")["rung"].agg(lambda rungs: sorted(set(rungs)))
    assert set(reached.index) == {"base", "contrast_weight=0.0", "view=mask"}
    assert reached["base"] == [0, 1]
    assert sum(1 for rungs in reached if rungs == [0, 1]) in (2, 3), "the best 40 % of four arms, and the base"
    assert {name.split(" (")[0] for name in record.details["failed"]} == {"lr=1000000000000.0"}
    assert all("lower train.lr" in why for why in record.details["failed"].values())
    scores = board[["score", "knn/donor", "knn/species", "probe/donor"]].to_numpy()
    assert ((scores >= 0) & (scores <= 1)).all()
    assert np.allclose(board["score"], board[["knn/donor", "knn/species"]].mean(axis=1))
    ended = board["rung"] == 1
    assert board.loc[ended, "finetuned"].notna().all()
    assert board.loc[~ended, "finetuned"].isna().all()
    assert (board["alignment"] > 0).all()
    assert (board["uniformity"] < 0).all()


def test_mlflow_has_one_parent_and_a_child_per_training_with_the_arms_parameters(undisturbed):
    settings, _ = undisturbed
    client = MlflowClient(mlflow_runs.uri(settings))
    ident = client.get_experiment_by_name(settings.tracking.experiment).experiment_id
    runs = client.search_runs([ident])
    parents = [run for run in runs if run.info.run_name == "tune"]
    assert len(parents) == 1
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == 8
    off = [run for run in children if run.data.params["arm"] == "contrast_weight=0.0"]
    assert {run.data.params["objective.contrast_weight"] for run in off} == {"0.0"}
    assert {run.data.params["seed"] for run in off} == {"0", "1"}
    assert all(0 <= run.data.metrics["score"] <= 1 and "knn/donor/macro_f1" in run.data.metrics for run in off)
    versions = client.search_model_versions("name='pancreas'")
    assert len(versions) == 1
    for part in ("## Data", "## Recipe", "## Scores", "## Limits", "human", "zero-shot macro F1"):
        assert part in versions[0].description, part
    assert len(parents[0].outputs.model_outputs) == 1
    assert [one.tags[0].value for one in parents[0].inputs.dataset_inputs] == ["training"]
    shown = {one["path"] for one in json.loads(parents[0].data.tags["mlflow.loggedArtifacts"])}
    assert shown == {"final.json", "effects.json", "arms.json"}


def test_the_best_arm_is_a_config_that_pretrain_takes_as_it_is(undisturbed):
    settings, uri = undisturbed
    best = parse.from_dict(Config, json.loads(files.read_bytes(f"{uri}/best.json")))
    record = artifacts.require(uri, "sweep")
    arm = next(a for a in record.details["arms"] if a["key"] == record.details["best"])
    data = parse.to_dict(best)
    for field, value in arm["changes"].items():
        part, leaf = field.split(".")
        assert data[part][leaf] == value
    assert pretrain.run(best, executor=LocalExecutor()) == f"{settings.output}/best/pretrain"


def test_test_cells_are_scored_for_the_best_arm_and_the_base_only(undisturbed):
    _, uri = undisturbed
    record = artifacts.require(uri, "sweep")
    rows = read_table(f"{uri}/trials.parquet").to_pandas()
    best = record.details["best"]
    base = record.details["arms"][0]["key"]
    tested = rows[rows["part"] == "test"]
    assert set(tested["arm"]) == {best, base}
    assert set(tested["rung"]) == {1}
    final = read_table(f"{uri}/final.parquet").to_pandas()
    arms = read_table(f"{uri}/arms.parquet").to_pandas()
    row = final[(final["what"] == "base") & (final["metric"] == "score")].iloc[0]
    chosen_on = arms[(arms["arm"] == base) & (arms["rung"] == 1)]["score"].mean()
    knn = tested[(tested["arm"] == base) & (tested["model"] == "knn") & (tested["metric"] == "macro_f1")]
    assert row["select"] == pytest.approx(chosen_on)
    assert row["test"] == pytest.approx(knn.groupby(["seed", "split"])["value"].mean().mean())
    assert row["optimism"] == pytest.approx(row["select"] - row["test"])


def test_labels_of_test_cells_do_not_change_the_choice(base, undisturbed, tmp_path, monkeypatch):
    """The same sweep with the labels of the test cells shuffled: every score that chooses is the same, the final ones are not."""
    divide = held_out.divide

    def shuffled(table, *args, **settings):
        held = divide(table, *args, **settings)
        rows = np.unique(np.concatenate([split.test for split in held.test.splits]))
        labels = held.test.table.labels.copy()
        labels[rows] = np.random.default_rng(0).permutation(labels[rows])
        return replace(held, test=replace(held.test, table=replace(held.test.table, labels=labels)))

    monkeypatch.setattr(held_out, "divide", shuffled)
    uri = tune.run(at(base, tmp_path), executor=LocalExecutor())
    mine, theirs = tables(uri), tables(undisturbed[1])
    for name in ("arms", "effects", "interactions"):
        assert mine[name] == theirs[name]
    assert mine["final"] != theirs["final"]
    assert artifacts.require(uri, "sweep").details["best"] == artifacts.require(undisturbed[1], "sweep").details["best"]


def test_the_report_says_the_sentence_and_draws_the_effects(undisturbed):
    settings, uri = undisturbed
    page = build.render(load.load_results(settings), "key")
    sentence = artifacts.require(uri, "sweep").details["sentence"]
    assert sentence.split(" [")[0][1:] in page
    assert "with the contrast instead of without" in sentence
    assert "sweep-effects" in page
    assert "Cells that chose" in page
    assert "lr=1000000000000.0" in page


@pytest.mark.parametrize("after", [1, 9])
def test_a_sweep_killed_anywhere_goes_on_and_ends_the_same_with_nothing_done_twice(
    base, undisturbed, tmp_path, monkeypatch, after
):
    """`after` trainings are done, then the driver dies; in the next life only the others are."""
    settings = at(base, tmp_path)
    done = []

    train_here = pretrain.train_here

    def dies_after(limit):
        def train(run, corpus, uri, identity, *, num_steps, tracked, until=0):
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append((uri, until))
            train_here(run, corpus, uri, identity, num_steps=num_steps, tracked=tracked, until=until)

        monkeypatch.setattr(pretrain, "train_here", train)

    dies_after(after)
    with pytest.raises(KeyboardInterrupt):
        tune.run(settings, executor=LocalExecutor())
    assert artifacts.find(f"{settings.output}/tune") is None
    dies_after(-1)
    uri = tune.run(settings, executor=LocalExecutor())
    assert len(done) == len(set(done)), "no training went to the same rung twice"
    assert tables(uri) == tables(undisturbed[1])
    dies_after(len(done))
    assert tune.run(settings, executor=LocalExecutor()) == uri, "a finished sweep trains nothing"


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_tune_gives_what_the_plain_loop_gives(ray_local, base, undisturbed, tmp_path):
    """Arms of several kinds of values, by names that Ray Tune shows; one worker trains inside the trial."""
    settings = at(base, tmp_path)
    space = ({"objective.contrast_weight": (0.0,)}, {"train.species_mix": ({"human": 0.5, "mouse": 0.5},)})
    few = replace(settings, tune=replace(settings.tune, space=space, seeds=2, rungs=(1.0,), finetune=False))
    there = at(base, tmp_path / "plain", tune=few.tune)
    assert tables(tune.run(few)) == tables(tune.run(there, executor=LocalExecutor()))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("workers", "arms", "seeds"), [(1, 2, 2), (2, 1, 1)])
def test_a_sweep_whose_driver_is_killed_under_ray_goes_on_and_makes_no_part_twice(base, tmp_path, workers, arms, seeds):
    """SIGKILL to the driver when the first scores are there; the same command again keeps them and ends as undisturbed.

    With two workers, each training is a Ray Train group inside its trial.
    """
    settings = at(base, tmp_path, compute=Compute(num_workers=workers))
    few = replace(settings, tune=replace(settings.tune, space=SPACE[:arms], seeds=seeds, finetune=False, concurrent=1))
    first = 2 if workers == 1 else 1
    path, trials = tmp_path / "config.json", tmp_path / "sweep" / "tune" / "trials"
    path.write_text(json.dumps(parse.to_dict(few)))
    command = [sys.executable, "-m", "mixgf", "tune", "--config", str(path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 600
    while len(list(trials.glob("*/rung-*.parquet"))) < first:
        assert driver.poll() is None, "it ends with all parts only"
        assert time.monotonic() < give_up
        time.sleep(0.05)
    driver.kill()
    assert driver.wait() == -9
    before = {part: part.stat().st_mtime_ns for part in trials.glob("*/rung-*.parquet")}
    assert first <= len(before) < 2 * seeds * (arms + 1)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(part.stat().st_mtime_ns == made for part, made in before.items())
    plain = at(base, tmp_path / "plain", tune=few.tune, compute=few.compute)
    if workers == 1:
        assert tables(f"{tmp_path}/sweep/tune") == tables(tune.run(plain, executor=LocalExecutor()))
        return
    path.write_text(json.dumps(parse.to_dict(plain)))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert tables(f"{tmp_path}/sweep/tune") == tables(f"{plain.output}/tune")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_of_groups_killed_on_a_cluster_frees_all_it_reserved_and_trains_nothing_twice(base, tmp_path):
    """The cluster outlives the driver, which gets SIGKILL while a group of two trains and another one waits for its place."""
    settings = at(base, tmp_path, compute=Compute(num_workers=2))
    few = replace(settings.tune, space=SPACE[:1], seeds=1, stop="none", finetune=False, concurrent=2)
    train = replace(settings.train, max_steps=120, checkpoint_steps=10, keep_checkpoints=100)
    settings = replace(settings, tune=few, train=train)
    with fake_cluster.cluster(num_cpus=2) as made:
        driver = submitted(settings, made)
        killed_in = fake_cluster.until(
            lambda: driver.poll() is not None or in_the_middle(settings), "a training after a first score"
        )
        assert driver.poll() is None, "the sweep ends with all parts only"
        assert len(groups(made)) > 1, "trials reserve something, and so does a group of workers"
        driver.kill()
        assert driver.wait() == -9
        fake_cluster.until(lambda: not groups(made) and free_cpus(made) == 2, "two free CPUs without a placement group")
        before = files_of_trainings(settings)
        assert any(path.name == "rung-0.parquet" for path in before)
        last = checkpoints.complete_steps(killed_in)[-1]
        assert 0 < last < train.max_steps
        again = submitted(settings, made)
        assert again.wait() == 0
        fake_cluster.until(lambda: not groups(made) and free_cpus(made) == 2, "two free CPUs without a placement group")
        after = files_of_trainings(settings)
        assert {path: after[path] for path in before} == before, "no score and no checkpoint is made again"
        whole = at(base, tmp_path / "whole", compute=settings.compute, tune=few, train=train)
        assert submitted(whole, made).wait() == 0
    assert tables(f"{settings.output}/tune") == tables(f"{whole.output}/tune")
    mine, theirs = (files_of_trainings(each) for each in (settings, whole))
    assert len(mine) == len(theirs)


def submitted(settings, made):
    """`mixgf tune` in a process of its own, on a cluster that is there."""
    path = Path(settings.output).parent / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(parse.to_dict(settings)))
    with (path.parent / "said.log").open("a") as said:
        return subprocess.Popen(
            die_with_us([sys.executable, "-m", "mixgf", "tune", "--config", str(path)]),
            stdout=said, stderr=said, env=os.environ | {"RAY_ADDRESS": made.address},
        )  # fmt: skip


def groups(made):
    """Ids of the placement groups that are not removed."""
    return {one for one, facts in made.global_state.placement_group_table().items() if facts["state"] != "REMOVED"}


def free_cpus(made):
    """CPUs that nothing reserves."""
    return sum(node.get("CPU", 0) for node in made.global_state.available_resources_per_node().values())


def in_the_middle(settings):
    """URI of a training between two rungs, where some training has a score already."""
    trials = Path(settings.output) / "tune" / "trials"
    if not list(trials.glob("*/rung-*.parquet")):
        return ""
    for folder in trials.glob("*/pretrain"):
        steps = checkpoints.complete_steps(str(folder))
        if steps and steps[-1] % 60:
            return str(folder)
    return ""


def files_of_trainings(settings):
    """Scores, and states of complete checkpoints, with the time at which each was written."""
    trials = Path(settings.output) / "tune" / "trials"
    found = [*trials.glob("*/rung-*.parquet"), *trials.glob("*/pretrain/steps/*/state.json")]
    return {path: path.stat().st_mtime_ns for path in found}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_optuna_chooses_arms_by_names_of_fields_and_lists_those_that_cannot_be_made(ray_local, base, tmp_path):
    pytest.importorskip("optuna")
    settings = at(base, tmp_path)
    space = ({"objective.temperature": ("loguniform(0.02, 0.5)",), "model.num_heads": ("choice(2, 3)",)},)
    search = replace(settings.tune, space=space, search="optuna", stop="asha", num_arms=4, seeds=1, finetune=False)
    uri = tune.run(replace(settings, tune=search))
    record = artifacts.require(uri, "sweep")
    found = [arm["changes"] for arm in record.details["arms"]]
    assert found[0] == {}
    assert all(
        set(changes) == {"objective.temperature"} and 0.02 <= changes["objective.temperature"] <= 0.5
        for changes in found[1:]
    )
    assert len(found) + len(record.details["failed"]) == 5
    assert all("model.num_heads (3)" in why for why in record.details["failed"].values())
    board = read_table(f"{uri}/arms.parquet").to_pandas()
    assert board.loc[board["name"] == "base", "rung"].max() == 1, "the base never stops"
    with pytest.raises(UserError, match="runs under Ray Tune only"):
        tune.run(replace(settings, output=f"{tmp_path}/local", tune=search), executor=LocalExecutor())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asha_stops_trainings_by_their_scores_and_keeps_what_they_showed(ray_local, base, tmp_path):
    settings = at(base, tmp_path)
    asha = replace(settings.tune, space=SPACE[:2], stop="asha", seeds=1, finetune=False)
    uri = tune.run(replace(settings, tune=asha, train=replace(settings.train, max_steps=4)))
    board = read_table(f"{uri}/arms.parquet").to_pandas()
    assert set(board["name"]) == {"base", "contrast_weight=0.0", "view=mask"}
    assert board["rung"].max() == 1
    best_first = board[board["rung"] == 0].sort_values("score")["name"].iloc[-1]
    assert best_first in set(board.loc[board["rung"] == 1, "name"])


def reserved(ray):
    """Placement groups that are not removed, and what is free."""
    groups = {one for one, facts in ray.util.placement_group_table().items() if facts["state"] != "REMOVED"}
    return groups, ray.available_resources().get("CPU", 0)


def waited(condition):
    """Whether something holds, which Ray may need a moment for."""
    give_up = time.monotonic() + 60
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.2)
    return condition()


def expected_stops(board, order):
    """Arms that the median rule stops at the first of two rungs, where trials run one after the other in this order."""
    scores = board.pivot_table(index="arm", columns="rung", values="score")
    seen, stopped = [], set()
    for arm in order:
        first = scores.loc[arm, 0]
        if len(seen) >= 3 and first < np.median(seen):
            stopped.add(arm)
        seen.append(first)
    return stopped


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_median_rule_stops_arms_and_groups_of_workers_inside_trials_leave_nothing_reserved(
    ray_local, base, tmp_path, workers
):
    """Two CPUs are free for trials of two workers each, of which two run at a time: no deadlock, no placement group is left."""
    taken = ray_local.util.placement_group([{"CPU": 2}])
    ray_local.get(taken.ready())
    try:
        assert waited(lambda: reserved(ray_local)[1] == 2)
        before = reserved(ray_local)
        settings = at(base, tmp_path, compute=Compute(num_workers=workers))
        space = ({"train.lr": (1e-9, 1e-4, 1e-2)}, {"objective.contrast_weight": (0.0,)})
        median = replace(settings.tune, space=space, stop="median", seeds=1, finetune=False, concurrent=workers)
        uri = tune.run(replace(settings, tune=median))
        assert waited(lambda: reserved(ray_local) == before), reserved(ray_local)
    finally:
        ray_local.util.remove_placement_group(taken)
    record = artifacts.require(uri, "sweep")
    board = read_table(f"{uri}/arms.parquet").to_pandas()
    order = [arm["key"] for arm in record.details["arms"]]
    reached = board.groupby("arm")["rung"].max()
    assert set(reached.index) == set(order)
    assert reached[order[0]] == 1, "the base never stops"
    if workers == 1:
        stopped = expected_stops(board, order)
        assert stopped, "the test needs an arm that is worse than the median of those before"
        assert {arm for arm in order if reached[arm] == 0} == stopped


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(base, tmp_path):
    settings = at(base, tmp_path)
    for changes, said in (
        ({"tune": replace(settings.tune, space=())}, "tune.space: empty"),
        ({"tune": replace(settings.tune, splits=("dataset",)), "sources": base.sources}, "none can be made"),
        (
            {"tune": replace(settings.tune, space=({"tokens.max_len": (16,)},)), "sources": ()},
            "needs a corpus of its own",
        ),
        ({"tune": replace(settings.tune, space=({"model.num_heads": (3,)},))}, "tune.space: model.dim"),
    ):
        with pytest.raises(UserError, match=said):
            tune.run(replace(settings, **changes), executor=LocalExecutor())
    assert not files.exists(f"{settings.output}/tune/record.json")


def test_an_arm_of_other_tokens_is_trained_on_a_corpus_of_its_own(base, tmp_path):
    """And the base's corpus is prepared, too, where there is none."""
    settings = replace(at(base, tmp_path), inputs=Inputs())
    other = replace(settings.tune, space=({"tokens.scaling": ("multiply",)},), seeds=1, rungs=(1.0,), finetune=False)
    uri = tune.run(replace(settings, tune=other), executor=LocalExecutor())
    board = read_table(f"{uri}/arms.parquet").to_pandas()
    assert board["name"].tolist() == ["base", "scaling=multiply"]
    corpora = files.list_dir(f"{uri}/corpora")
    assert len(corpora) == 1
    made = artifacts.require(f"{uri}/corpora/{corpora[0]}/corpus", "corpus")
    assert made.config["tokens"]["scaling"] == "multiply"
    assert board["score"].nunique() == 2


def test_a_ladder_with_held_out_cells_has_their_loss_at_every_rung_and_its_curve_comes_first(base, tmp_path):
    settings = at(base, tmp_path)
    ladder = replace(settings.tune, space=({"train.max_steps": (2, 4)},), stop="none", seeds=1, finetune=False)
    train = replace(settings.train, heldout_share=0.2, heldout_steps=100)
    settings = replace(settings, tune=ladder, train=train)
    uri = tune.run(settings, executor=LocalExecutor())
    board = read_table(f"{uri}/arms.parquet").to_pandas()
    assert len(board) == 6
    assert (board["heldout_loss"] > 0).all()
    for row in board[board["rung"] == 1].itertuples():
        rows = read_table(f"{uri}/trials/{row.arm[:12]}-0/pretrain/history.parquet").to_pylist()
        logged = {one["step"]: one["value"] for one in rows if one["name"] == "heldout_loss"}
        assert row.heldout_loss == pytest.approx(logged[row.step], rel=1e-6), "as the training itself has it at its end"
    other = replace(settings, train=replace(settings.train, max_steps=500))  # a report by another recipe
    page = build.render(load.load_results(other), "key")
    assert "Optimizer steps: at 8 the fitted held-out loss is" in page
    assert page.index("Loss on held-out cells by optimizer steps") < page.index("Zero-shot macro F1 by optimizer steps")


def test_progress_counts_arms_and_scores_are_metrics_by_the_names_of_arms():
    """Hyperparameters that no arm can have, as Optuna may choose them, have no metric; a score that is not finite has none, too."""
    found = {}
    meter = SimpleNamespace(
        set=lambda name, value, arm: found.update({(name, arm): value}), units=lambda **states: found.update(states)
    )
    shown = tune_trials._Shown(SimpleNamespace(config=Config(train=Train(lr=1e-3)), meter=meter), 2)
    shown.scored({"objective.view": "mask", "train.lr": 1e-3}, 1, 0.25)
    shown.scored({"objective.view": "dropout", "train.lr": 1e-3}, 2, float("nan"))
    shown.scored({"model.num_heads": 3}, 1, 0.0)
    shown.ended()
    shown.close()
    assert found == {
        ("arm_rungs", "view=mask"): 1, ("arm_score", "view=mask"): 0.25, ("arm_rungs", "base"): 2, "waiting": 1, "done": 1,
    }  # fmt: skip
