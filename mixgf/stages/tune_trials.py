"""The trials of a sweep: each is one arm with one training per seed, scored at its rungs.

The scores of a training at a rung are a part in storage, beside the training's checkpoints, and are not made again. They are of
the cells that choose arms. The scores of the test cells are a part of their own, made at the end for the best arm and the base
(`tuning.held_out`). These parts are all that a sweep goes on with: nothing of Ray Tune's own state is read again.

Where trials run:

| executor | workers | a trial | a training | its scores |
|---|---|---|---|---|
| local | any | in this process, one after the other | in this process | in this process |
| Ray | 1 | reserves the CPUs and GPUs of a worker | in the trial | in the trial |
| Ray | more | reserves next to nothing | in a Ray Train group | in a task with a worker's CPUs and GPUs |

A trial reports between trainings only. So Ray Tune never ends a trial while a Ray Train group of it runs: with Ray 2.60 such a
group would keep its placement group for ever on a Ray without a dashboard.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf.classification import labels
from mixgf.config.parse import fingerprint, from_dict, to_dict
from mixgf.config.run import Config
from mixgf.config.tuning import Tune
from mixgf.console import Progress, say
from mixgf.corpus.reader import Corpus
from mixgf.distributed.metrics import Meter
from mixgf.encoder.bert import MaskedModel
from mixgf.encoder.device import pick_device
from mixgf.errors import UserError
from mixgf.execution import Executor, LocalExecutor, Task
from mixgf.stages import pretrain, pretrain_inputs
from mixgf.storage import artifacts, files, tables
from mixgf.storage.sealed import read_sealed, write_sealed
from mixgf.tracking import mlflow_runs
from mixgf.training import checkpoints
from mixgf.training.held_out_loss import HeldOutLoss
from mixgf.training.pretraining import Pretraining, blank_model
from mixgf.training.worker_group import LocalContext
from mixgf.tuning import evaluate, held_out, search_space
from mixgf.tuning.held_out import HeldOut, Tasks
from mixgf.tuning.search_space import Arm, Factor

SCHEMA = 2
SELECT, TEST = "select", "test"
"""The cells that a score is of: those that choose arms, and those that take no part in the choice."""
_WORST = 0.0
"""Score that Ray Tune gets for an arm that cannot be trained: the lowest macro F1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One training of one arm, as plain data that travels to its process."""

    arm: str
    """Key of the arm."""
    name: str
    """Of the arm, for people."""
    seed: int
    """Number of the repetition, from 0."""
    config: dict[str, Any]
    """The arm's config with the training's seed and corpus."""
    uri: str
    """Its folder."""
    steps: tuple[int, ...]
    """Steps of its rungs; the last is the end."""
    base_seed: int
    """Seed of the sweep: splits and draws of the scores are the same for all trainings."""

    def at(self, rung: int) -> int:
        """Number of its rung at a rung of the sweep; a short training has fewer rungs than the sweep."""
        return min(rung, len(self.steps) - 1)

    def part(self, rung: int) -> str:
        """URI of its scores at a rung (a number)."""
        return files.join(self.uri, f"rung-{rung}.parquet")

    @property
    def test_part(self) -> str:
        """URI of its scores on the test cells after the whole training."""
        return files.join(self.uri, "test.parquet")

    @property
    def failed(self) -> str:
        """URI of why the training cannot be done, if so."""
        return files.join(self.uri, "failed.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep while it runs; plain data that travels to the trials."""

    config: Config
    uri: str
    executor: Executor
    tracked: mlflow_runs.Run
    meter: Meter
    corpora: Mapping[str, str] = field(default_factory=dict)
    """Key of an arm to its corpus; an arm that is not in it has the corpus of the base."""
    steps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Key of an arm to the steps of its rungs, for the arms that are known before the sweep begins."""

    @property
    def base(self) -> Arm:
        """The arm with the config as it is."""
        return search_space.make(self.config, {})

    def trainings(self, arm: Arm) -> list[Training]:
        """The trainings of an arm, one per seed.

        Raises:
            UserError: The arm cannot be trained on its corpus.
        """
        config = self.config
        corpus = self.corpora.get(arm.key, self.corpora[self.base.key])
        steps = self.steps.get(arm.key) or rungs_of(arm, corpus)
        return [
            Training(
                arm=arm.key, name=arm.name, seed=seed,
                config=to_dict(replace(arm.config, seed=config.seed + seed, inputs=replace(config.inputs, corpus=corpus))),
                uri=files.join(self.uri, "trials", f"{arm.key[:12]}-{seed}"), steps=steps, base_seed=config.seed,
            )
            for seed in range(config.tune.seeds)
        ]  # fmt: skip

    def note(self, chosen: Mapping[str, Any], why: str = "") -> None:
        """Keep hyperparameters that the search chose on the way, once, and why they make no arm, if so."""
        uri = files.join(self.uri, "arms", f"{fingerprint(dict(chosen))[:12]}.json")
        if not files.exists(uri):
            write_sealed(uri, {"chosen": dict(chosen), "why": why})

    def noted(self) -> list[dict[str, Any]]:
        """What was kept by `note`, in the order of file names."""
        folder = files.join(self.uri, "arms")
        return [read_sealed(files.join(folder, name)) for name in sorted(files.list_dir(folder))]


def rungs_of(arm: Arm, corpus: str) -> tuple[int, ...]:
    """Steps of an arm's rungs.

    Raises:
        UserError: The arm cannot be trained on this corpus.
    """
    return tuple(search_space.rungs(arm.config, Pretraining(arm.config, Corpus(corpus)).num_steps))


def evaluation_cells(config: Config, corpus: Corpus, seed: int) -> HeldOut:
    """The cells and splits that score an arm; fine-tuning needs random splits."""
    settings = config.tune
    table = evaluate.sample(labels.labelled(corpus, config.classify), settings.cells, seed)
    kinds = (*settings.splits, "random") if settings.finetune else settings.splits
    return held_out.divide(table, config.classify, tuple(dict.fromkeys(kinds)), seed=seed)


def done(training: Training, rung: int) -> bool:
    """Whether a training needs nothing more at a rung of the sweep."""
    return files.exists(training.failed) or files.exists(training.part(training.at(rung)))


def score(training: Training, rung: int, settings: Tune) -> float:
    """The score of a training at a rung of the sweep, by which arms are stopped and chosen; NaN = it failed."""
    if files.exists(training.failed):
        return float("nan")
    found = tables.read_table(training.part(training.at(rung))).to_pandas()
    return evaluate.objective(found, settings.splits, settings.head)


def advance(sweep: Sweep, arm: Arm, rung: int) -> float:
    """Bring the trainings of an arm to a rung and score them there; what is there is not made again.

    Returns:
        The mean score over seeds; NaN where a training failed.
    """
    trainings = sweep.trainings(arm)
    for training in trainings:
        if not done(training, rung):
            _advance(sweep, training, training.at(rung))
    return float(np.mean([score(training, rung, sweep.config.tune) for training in trainings]))


def _advance(sweep: Sweep, training: Training, rung: int) -> None:
    """Train to a rung of the training, and score it there."""
    config = from_dict(Config, training.config)
    corpus = Corpus(config.inputs.corpus, max_len=config.model.max_positions)
    identity = pretrain.planned(config, corpus).fingerprint
    alone = sweep.executor.local or config.compute.num_workers == 1
    train = pretrain.train_here if alone else pretrain.trainer(sweep.executor)
    with _tracked(training, config, identity, sweep.tracked) as tracked:
        uri, steps = files.join(training.uri, "pretrain"), training.steps
        whole = replace(config, train=replace(config.train, patience=0))  # every rung is reached
        try:
            whole = with_inputs(whole, corpus, sweep.uri, worker=f"{training.arm[:12]}-{training.seed}")
            train(whole, corpus.uri, uri, identity, num_steps=steps[-1], tracked=tracked, until=steps[rung])
        except UserError as error:  # an arm that cannot be trained is a finding, and stops no other
            write_sealed(training.failed, {"why": str(error)})
            return
        if alone:
            score_rung(training, rung, tracked)
        else:
            task = _task(training.part(rung), score_rung, training, rung, tracked, config=config)
            run_tasks(sweep.executor, [task])


def with_inputs(config: Config, corpus: Corpus, sweep: str, *, worker: str = "") -> Config:
    """The config of a training with gene vectors and neighbours, which all trainings of a sweep (URI) share."""
    return pretrain_inputs.prepared(config, corpus, LocalExecutor(), folder=files.join(sweep, "inputs"), worker=worker)


def _task(part: str, function: Any, *args: Any, config: Config) -> Task:
    return Task(part=part, function=function, args=args, threads=config.train.threads, gpu=True)


def run_tasks(executor: Executor, todo: Sequence[Task]) -> None:
    """Run tasks; the first error ends the sweep."""
    for receipt in executor.run(todo):
        if receipt.error:
            msg = f"tune: {todo[receipt.number].args[0].name}: {receipt.error}"
            raise UserError(msg)


def score_rung(training: Training, rung: int, tracked: mlflow_runs.Run) -> None:
    """Score the weights at a rung of the training on the cells that choose, and write the scores as their part."""
    config, corpus, held = _opened(training)
    found = _evaluated(training, rung, held.select, config, corpus)
    if config.train.heldout_share > 0:
        found = pd.concat([found, _held_out_loss(training, rung, config, corpus)], ignore_index=True)
    tracked.log(_figures(found, config), training.steps[rung])
    tracked.flush()  # a worker may end after its task
    _write(training.part(rung), found, training.steps[rung])


def score_test(training: Training, parent: mlflow_runs.Run) -> None:
    """Score the test cells after the whole training, and write the scores as their part."""
    config, corpus, held = _opened(training)
    found = _evaluated(training, len(training.steps) - 1, held.test, config, corpus)
    with _tracked(training, config, pretrain.planned(config, corpus).fingerprint, parent) as tracked:
        figures = {f"{TEST}/{name}": value for name, value in _figures(found, config).items()}
        tracked.log(figures, training.steps[-1])
    _write(training.test_part, found, training.steps[-1])


def test_tasks(sweep: Sweep, trainings: Sequence[Training]) -> list[Task]:
    """A task for each finished training whose test cells have no scores yet."""
    todo = [t for t in trainings if files.exists(t.part(len(t.steps) - 1)) and not files.exists(t.test_part)]
    return [_task(t.test_part, score_test, t, sweep.tracked, config=sweep.config) for t in todo]


def _opened(training: Training) -> tuple[Config, Corpus, HeldOut]:
    config = from_dict(Config, training.config)
    corpus = Corpus(config.inputs.corpus, max_len=config.model.max_positions)
    return config, corpus, evaluation_cells(config, corpus, training.base_seed)


def _write(part: str, found: pd.DataFrame, step: int) -> None:
    tables.write_table(part, pa.Table.from_pandas(found.assign(step=step), preserve_index=False))


def _tracked(
    training: Training, config: Config, identity: str, parent: mlflow_runs.Run
) -> AbstractContextManager[mlflow_runs.Run]:
    """The run of a training in MLflow, under that of the sweep."""
    own = artifacts.plan("trial", SCHEMA, {"trial": identity, "sweep": parent.key}, {}).fingerprint
    data = to_dict(config)
    shown = ("seed", "tokens", "model", "objective", "train", "embed")
    params = {name: data[name] for name in shown} | {"arm": training.name}
    return mlflow_runs.stage(config, f"{training.name} (seed {training.seed})", params, own, parent=parent.key)


def _evaluated(training: Training, rung: int, tasks: Tasks, config: Config, corpus: Corpus) -> pd.DataFrame:
    """Scores of the weights at a rung (a number): without fine-tuning, and after the last rung with it, too."""
    device = pick_device(config.compute.gpus_per_worker)
    encoder, chosen = _weights(training, rung, config, corpus).encoder.to(device), tasks.of(config.tune.splits)
    found = evaluate.zero_shot(encoder, corpus, tasks.table, chosen, run=config, seed=training.base_seed)
    if rung == len(training.steps) - 1 and config.tune.finetune:
        random, context = tasks.of(["random"]), LocalContext(device)
        tuned = evaluate.finetuned(encoder, corpus, tasks.table, random, run=config, context=context)
        found = pd.concat([found, tuned], ignore_index=True)
    return found


def _weights(training: Training, rung: int, config: Config, corpus: Corpus) -> MaskedModel:
    """The model of a training at a rung (a number)."""
    model = blank_model(config, corpus.vocabulary.size)
    checkpoints.load_step_weights(files.join(training.uri, "pretrain"), training.steps[rung], model)
    return model


def _held_out_loss(training: Training, rung: int, config: Config, corpus: Corpus) -> pd.DataFrame:
    """The losses at a rung on the cells that are never trained on, as rows of scores."""
    context = LocalContext(pick_device(config.compute.gpus_per_worker))
    model = _weights(training, rung, config, corpus).to(context.device).eval()
    whole = with_inputs(config, corpus, training.uri.rsplit("/", 2)[0])
    figures = HeldOutLoss(Pretraining(whole, corpus))(model, context)
    rows = [("all", "", "", evaluate.TRAINING, name, value) for name, value in figures.items()]
    return pd.DataFrame(rows, columns=evaluate.COLUMNS)


def _figures(found: pd.DataFrame, config: Config) -> dict[str, float]:
    """Scores for MLflow."""
    figures = {"score": evaluate.objective(found, config.tune.splits, config.tune.head)}
    for (model, split, metric), part in found.groupby(["model", "split", "metric"], sort=True):
        whole = model in ("space", evaluate.TRAINING)
        figures[str(metric) if whole else f"{model}/{split}/{metric}"] = float(part["value"].mean())
    return figures


# Many trials


def advance_all(sweep: Sweep, arms: Sequence[Arm], rungs: range, *, stop: bool = False) -> None:
    """Bring arms to the last of `rungs`: under Ray Tune, or one after the other if the executor is local.

    Args:
        sweep: The sweep.
        arms: Each becomes a trial.
        rungs: Ascending.
        stop: Whether the rule of `tune.stop` may end an arm before. A local executor has no such rule.
    """
    if not arms:
        return
    shown = _Shown(sweep, len(arms))
    try:
        if sweep.executor.local:
            for arm in arms:
                for rung in rungs:
                    shown.arm(arm, rung + 1, advance(sweep, arm, rung))
                shown.ended()
            return
        from mixgf.distributed import tune_search

        space = search_space.factors(sweep.config)
        points = [search_space.point(arm, list(space)) for arm in arms]
        work = functools.partial(_report, sweep)
        tune_search.run_points(sweep.config, _plain(space), points, rungs, advance=work, shown=shown, stop=stop)
    finally:
        shown.close()


def explore(sweep: Sweep, rungs: range) -> None:
    """Let Optuna choose arms one after the other by their scores; arms of an earlier life of the sweep come first.

    Raises:
        UserError: The executor is local, or Optuna is not installed.
    """
    if sweep.executor.local:
        msg = "tune.search = 'optuna': runs under Ray Tune only; use the command `mixgf tune`, or tune.search=random"
        raise UserError(msg)
    from mixgf.distributed import tune_search

    shown = _Shown(sweep, sweep.config.tune.num_arms)
    space = search_space.factors(sweep.config)
    known = [note["chosen"] for note in sweep.noted()]
    try:
        work = functools.partial(_report, sweep)
        tune_search.run_optuna(sweep.config, _plain(space), known, rungs, advance=work, shown=shown)
    finally:
        shown.close()


def _plain(space: Mapping[str, Factor]) -> dict[str, tuple[str, list[Any]]]:
    return {name: factor.plain for name, factor in space.items()}


def _report(sweep: Sweep, chosen: Mapping[str, Any], rung: int) -> float:
    """Advance the arm of some hyperparameters; returns its score."""
    try:
        arm = search_space.from_point(sweep.config, chosen)
        sweep.trainings(arm)
    except UserError as error:  # only what Optuna chooses was not checked before
        sweep.note(chosen, str(error))
        return _WORST
    if arm.key not in sweep.corpora:
        sweep.note(chosen)
    found = advance(sweep, arm, rung)
    return found if np.isfinite(found) else _WORST


class _Shown:
    """Shows the trials of a sweep (`tune_search.Shown`): progress, the scores of arms as metrics, and tables.

    Args:
        sweep: The sweep.
        total: Its trials.
    """

    def __init__(self, sweep: Sweep, total: int) -> None:
        self._sweep, self._progress, self._total, self._done = sweep, Progress("tune", total, "arms"), total, 0

    def close(self) -> None:
        self._progress.close()

    def ended(self) -> None:
        self._done += 1
        self._progress.update(self._done)
        self._sweep.meter.units(waiting=self._total - self._done, done=self._done)

    def scored(self, chosen: Mapping[str, Any], rung: int, score: float) -> None:
        with suppress(UserError):  # of what Optuna chooses not all can be made
            self.arm(search_space.from_point(self._sweep.config, chosen), rung, score)

    def arm(self, arm: Arm, rung: int, score: float) -> None:
        """Take note of the score of an arm after a number of rungs."""
        self._sweep.meter.set("arm_rungs", rung, arm=arm.name)
        if np.isfinite(score):
            self._sweep.meter.set("arm_score", score, arm=arm.name)

    def table(self, lines: Sequence[str]) -> None:
        self._progress.close()
        for line in lines:
            say(f"tune:   {line}")
