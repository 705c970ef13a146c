"""`tune`: arms times seeds as trials of Ray Tune, each a pretraining under Ray Train that is judged at its rungs.

What a trial found at a rung is a part in storage, and its training lies beside it; Ray Tune only runs what is missing. So a
sweep killed at any moment goes on with the same command and nothing is trained or judged twice. With `tune.stop = halving`
arms are stopped between rungs by the parts alone, so the result is that of an undisturbed sweep.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf import ablation, artifacts, card, checkpoint, classify, judge, scores, splits, storage, sweep, tracking
from mixgf.config import Config, UserError, fingerprint, from_dict, to_dict
from mixgf.dataset import Corpus
from mixgf.drivers import dispatch, prepare, pretrain
from mixgf.drivers.metrics import Meter, watch
from mixgf.drivers.session import session
from mixgf.model import MaskedModel
from mixgf.objectives import Pretraining
from mixgf.progress import Progress, say, warn
from mixgf.splits import Labelled, Split
from mixgf.sweep import Arm
from mixgf.train import LocalContext, fit

SCHEMA = 1
_TOKENS = ("qc", "vocab", "tokens", "prepare", "sources", "species")
"""Parts of the config that decide a corpus: an arm that changes one has a corpus of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One training of one arm, as plain data that travels to its process."""

    arm: str
    """Key of the arm."""
    name: str
    """Of the arm, for people."""
    seed: int
    """Number of the repetition, from 0."""
    config: dict[str, Any]
    """The arm's config with the trial's seed and corpus."""
    uri: str
    """Its folder."""
    steps: tuple[int, ...]
    """Its rungs."""
    base_seed: int
    """Of the sweep: splits and draws of the judge are the same for all trials."""

    def part(self, rung: int) -> str:
        """URI of what the judge found at a rung (its number)."""
        return storage.join(self.uri, f"rung-{rung}.parquet")

    @property
    def failed(self) -> str:
        """URI of why the training cannot be done, if so."""
        return storage.join(self.uri, "failed.json")


Spread = Callable[["Search", Sequence[Trial], range], None]
"""Brings trials through rungs, in any order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Who does the work of a sweep; the result does not depend on it."""

    spread: Spread
    train: Callable[..., None]
    """As `drivers.pretrain.train`."""
    prepare: Callable[[Config], str]
    session: Callable[[Config], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A sweep while it runs."""

    config: Config
    engine: Engine
    tracked: tracking.Run
    meter: Meter


def run(config: Config, *, engine: Engine | None = None) -> str:
    """Make the sweep of `config.tune`; returns the artifact's URI. `engine` replaces Ray (`PLAIN` in tests)."""
    engine = engine or RAY
    uri = storage.join(config.output, "tune")
    arms = sweep.arms(config)
    with engine.session(_wide(config)):
        corpora = {arm.key: _corpus(config, arm, uri, engine) for arm in arms}
        record = _plan(config, arms, corpora)
        if not artifacts.begin(uri, record):
            say(f"tune: {uri} is already there")
            return uri
        _check(config, arms, corpora)
        with (
            tracking.stage(config, "tune", to_dict(config), record.fingerprint) as tracked,
            watch(config, "tune", tracked, uri) as watched,
        ):
            trials = _trials(config, arms, corpora, uri)
            _search(Search(config=config, engine=engine, tracked=tracked, meter=watched.meter), arms, trials)
            _publish(config, uri, record, arms, trials, tracked=tracked)
    return uri


def _wide(config: Config) -> Config:
    """The config by whose size a local Ray is started: room for all trials that run at a time."""
    workers = config.tune.concurrent * config.compute.num_workers
    return replace(config, compute=replace(config.compute, num_workers=workers, min_workers=0))


def _corpus(config: Config, arm: Arm, uri: str, engine: Engine) -> str:
    """The corpus of an arm: the sweep's own, or one that is prepared under the sweep's folder."""
    data, base = to_dict(arm.config), to_dict(config)
    changed = {name: data[name] for name in _TOKENS if data[name] != base[name]}
    if not changed:
        return config.inputs.corpus or storage.join(config.output, "corpus")
    if not config.sources:
        msg = (f"tune.space: {arm.name} needs a corpus of its own, and there are no sources to make it from; "
               "give them as for `mixgf prepare`: mixgf tune human=... mouse=...")  # fmt: skip
        raise UserError(msg)
    own = storage.join(uri, "corpora", fingerprint(changed)[:10])
    tracked = replace(config.tracking, uri=tracking.uri(config))
    return engine.prepare(replace(arm.config, output=own, tracking=tracked))


def _plan(config: Config, arms: Sequence[Arm], corpora: dict[str, str]) -> artifacts.Record:
    """The record of this sweep: everything but how many trials run at a time."""
    data = to_dict(config)
    content = {name: data[name] for name in ("tune", "classify", "embed", "seed")}
    for name in ("concurrent", "register"):
        del content["tune"][name]
    content["arms"] = {arm.key: dict(arm.changes) for arm in arms}
    parents = {}
    for arm in arms:
        parents[f"corpus of {arm.name}"] = artifacts.require(corpora[arm.key], "corpus").fingerprint
    return artifacts.plan(ablation.KIND, SCHEMA, content, parents)


def _check(config: Config, arms: Sequence[Arm], corpora: dict[str, str]) -> None:
    """Refuse what would fail later: splits that cannot be made, arms that cannot be trained."""
    for arm in arms:
        corpus = Corpus(corpora[arm.key])
        Pretraining(arm.config, corpus)
        if int(corpus.lengths_N.max(initial=0)) > arm.config.model.max_positions:
            msg = f"tune.space: {arm.name}: the corpus has cells of {corpus.lengths_N.max()} tokens, model.max_positions is {arm.config.model.max_positions}"
            raise UserError(msg)
    table, made = judged(arms[0].config, Corpus(corpora[arms[0].key]), config.seed)
    absent = [kind for kind in config.tune.splits if kind not in {split.kind for split in made}]
    if absent:
        warn(f"tune.splits: {', '.join(absent)} cannot be made of these cells, and counts nothing")
    tasks = len({(s.kind, s.group, s.direction) for s in made})
    say(
        f"tune: {len(arms)} arms x {config.tune.seeds} seeds, judged on {len(table):,} cells in {tasks} tasks ({', '.join(config.tune.splits)})"
    )


def judged(config: Config, corpus: Corpus, seed: int) -> tuple[Labelled, list[Split]]:
    """The cells and splits that an arm is judged on."""
    settings = replace(config.classify, splits=config.tune.splits, seeds=1)
    table = judge.sample(classify.labelled(corpus, settings), config.tune.cells, seed)
    return table, splits.make(table, settings, seed=seed)


def _trials(config: Config, arms: Sequence[Arm], corpora: dict[str, str], uri: str) -> list[Trial]:
    made = []
    for seed in range(config.tune.seeds):
        for number, arm in enumerate(arms):
            corpus = Corpus(corpora[arm.key])
            own = replace(arm.config, seed=config.seed + seed, inputs=replace(config.inputs, corpus=corpora[arm.key]))
            task = Pretraining(own, corpus)
            made.append(
                Trial(
                    arm=arm.key, name=arm.name, seed=seed, config=to_dict(own),
                    uri=storage.join(uri, "trials", f"{number:03d}-{arm.key[:8]}-{seed}"),
                    steps=tuple(sweep.rungs(config, task.num_steps)), base_seed=config.seed,
                )
            )  # fmt: skip
    return made


# Rungs and Ray Tune


def _search(search: Search, arms: Sequence[Arm], trials: Sequence[Trial]) -> None:
    """Bring every trial as far as the rule says."""
    config = search.config
    last = max(len(trial.steps) for trial in trials) - 1
    alive = [arm.key for arm in arms]
    if config.tune.stop == "asha":
        search.engine.spread(search, [t for t in trials if not _done(t, last)], range(last + 1))
        return
    for rung in range(last + 1):
        mine = [trial for trial in trials if trial.arm in alive]
        todo = [trial for trial in mine if not _done(trial, rung)]
        if todo:
            say(f"tune: rung {rung + 1} of {last + 1}: {len(alive)} arms, {len(todo)} trainings to go on with")
            search.engine.spread(search, todo, range(rung, rung + 1))
        if config.tune.stop == "halving" and rung < last:
            scores = _scores(config, [arm for arm in arms if arm.key in alive], mine, rung)
            alive = sweep.survivors(scores, config.tune.keep, config.tune.seeds)
            names = {arm.key: arm.name for arm in arms}
            stopped = [names[key] for key in scores if key not in alive]
            say(
                f"tune: after rung {rung + 1} {len(stopped)} arms stop" + (f": {'; '.join(stopped)}" if stopped else "")
            )


def _done(trial: Trial, rung: int) -> bool:
    return storage.exists(trial.failed) or storage.exists(trial.part(min(rung, len(trial.steps) - 1)))


def _scores(config: Config, arms: Sequence[Arm], trials: Sequence[Trial], rung: int) -> dict[str, list[float]]:
    """Scores at a rung by arm, the failed trainings left out."""
    found: dict[str, list[float]] = {arm.key: [] for arm in arms}
    for trial in trials:
        part = trial.part(min(rung, len(trial.steps) - 1))
        if not storage.exists(trial.failed):
            frame = storage.read_table(part).to_pandas()
            found[trial.arm].append(judge.objective(frame, config.tune.splits, config.tune.judge))
    return found


def ray_tune(search: Search, trials: Sequence[Trial], rungs: range) -> None:
    """Run trials under Ray Tune, `tune.concurrent` at a time, each to the last of `rungs`."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    config, engine, tracked = search.config, search.engine, search.tracked
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow has it all
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # which prints a table however quiet it is told to be
    scheduler = None
    if len(rungs) > 1:
        scheduler = ASHAScheduler(
            time_attr="rung", max_t=len(rungs), grace_period=1, reduction_factor=max(2, round(1 / config.tune.keep))
        )
    scratch = tempfile.mkdtemp(prefix="mixgf-tune-")  # Ray's own bookkeeping; ours is in the output
    given = {str(i): trial for i, trial in enumerate(trials)}

    def trainable(chosen: dict[str, Any]) -> None:
        trial = given[chosen["trial"]]
        for rung in rungs:
            score = work(trial, min(rung, len(trial.steps) - 1), engine, tracked)
            tune.report({"score": score, "rung": rung + 1})

    shown = _Shown(len(trials), search.meter)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0.01}),
        param_space={"trial": tune.grid_search(list(given))},
        tune_config=tune.TuneConfig(
            metric="score", mode="max", max_concurrent_trials=config.tune.concurrent, scheduler=scheduler
        ),
        run_config=tune.RunConfig(
            name="sweep", storage_path=scratch, verbose=0, callbacks=[shown.callback()],
            failure_config=tune.FailureConfig(max_failures=config.compute.max_failures),
        ),
    )  # fmt: skip
    try:
        found = tuner.fit()
    finally:
        shown.close()
        shutil.rmtree(scratch, ignore_errors=True)
    if found.num_errors:
        raise found.errors[0]


def loop(search: Search, trials: Sequence[Trial], rungs: range) -> None:
    """The plain loop: what Ray must equal."""
    for trial in trials:
        for rung in rungs:
            work(trial, min(rung, len(trial.steps) - 1), search.engine, search.tracked)


def train_here(
    config: Config, corpus: str, uri: str, identity: str, *, num_steps: int, tracked: tracking.Run, until: int = 0
) -> None:
    """`drivers.pretrain.train` in this process."""
    found = Corpus(corpus)
    model = MaskedModel(config.model, found.vocabulary.size, seed=config.seed)
    fit(model, Pretraining(config, found), config.train, LocalContext(), uri=uri, identity=identity, until=until)


RAY = Engine(spread=ray_tune, train=pretrain.train, prepare=prepare.run, session=session)
PLAIN = Engine(
    spread=loop, train=train_here, prepare=partial(prepare.run, spread=dispatch.loop), session=lambda _: nullcontext()
)


class _Shown:
    """Progress of a sweep's trials."""

    def __init__(self, total: int, meter: Meter) -> None:
        self._progress, self._total, self._done, self._meter = Progress("tune", total, "trainings"), total, 0, meter

    def close(self) -> None:
        self._progress.close()

    def callback(self) -> Any:
        from ray.tune import Callback

        shown = self

        class Ended(Callback):  # type: ignore[misc]
            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                shown.ended()

        return Ended()

    def ended(self) -> None:
        self._done += 1
        self._progress.update(self._done)
        self._meter.units(waiting=self._total - self._done, done=self._done)


def work(trial: Trial, rung: int, engine: Engine, parent: tracking.Run) -> float:
    """Train a trial to a rung and judge it there; what is there is not made again. Returns the score; NaN = it failed."""
    config = from_dict(Config, trial.config)
    if storage.exists(trial.failed):
        return float("nan")
    if not storage.exists(trial.part(rung)):
        corpus = Corpus(config.inputs.corpus)
        record = pretrain.planned(config, corpus)
        own = artifacts.plan("trial", SCHEMA, {"trial": record.fingerprint, "sweep": parent.id}, {}).fingerprint
        params = to_dict(config) | {"arm": trial.name}
        name = f"{trial.name} (seed {trial.seed})"
        with tracking.stage(config, name, params, own, parent=parent.id) as tracked:
            _rung(trial, rung, engine.train, config=config, corpus=corpus, identity=record.fingerprint, tracked=tracked)
    if storage.exists(trial.failed):
        return float("nan")
    frame = storage.read_table(trial.part(rung)).to_pandas()
    return judge.objective(frame, config.tune.splits, config.tune.judge)


def _rung(
    trial: Trial,
    rung: int,
    train: Callable[..., None],
    *,
    config: Config,
    corpus: Corpus,
    identity: str,
    tracked: tracking.Run,
) -> None:
    step, uri = trial.steps[rung], storage.join(trial.uri, "pretrain")
    task = Pretraining(config, corpus)
    try:
        train(config, corpus.uri, uri, identity, num_steps=task.num_steps, tracked=tracked, until=step)
    except UserError as error:  # an arm that cannot be trained is a finding, and stops no other
        storage.write_json(trial.failed, {"why": str(error)})
        return
    model = MaskedModel(config.model, corpus.vocabulary.size)
    checkpoint.load_step_weights(uri, step, model)
    table, made = judged(config, corpus, trial.base_seed)
    found = judge.zero_shot(model.encoder, corpus, table, made, run=config, seed=trial.base_seed)
    if rung == len(trial.steps) - 1 and config.tune.finetune:
        found = pd.concat([found, _finetuned(model, corpus, table, config, trial.base_seed)], ignore_index=True)
    tracked.log(_figures(found, config), step)
    storage.write_table(trial.part(rung), pa.Table.from_pandas(found.assign(step=step), preserve_index=False))


def _finetuned(model: MaskedModel, corpus: Corpus, table: Labelled, config: Config, seed: int) -> pd.DataFrame:
    """Scores of the fine-tuned encoder on random splits, in the layout of the judge."""
    rows = []
    start = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    for split in splits.make(table, replace(config.classify, splits=("random",), seeds=1), seed=seed):
        model.encoder.load_state_dict(start)
        tuned = classify.finetune(model.encoder, corpus, table, split, run=config, context=LocalContext())
        true_M, said_M = split.ids(table.labels[split.test]), tuned.probabilities.argmax(1).astype(np.int64)
        totals = scores.totals(scores.confusion(true_M, said_M, len(split.classes)))
        rows += [
            (split.kind, split.group, split.direction, "finetune", name, float(totals[name]))
            for name in ("macro_f1", "accuracy")
        ]
    return pd.DataFrame(rows, columns=judge.COLUMNS)


def _figures(found: pd.DataFrame, config: Config) -> dict[str, float]:
    """What MLflow compares trials by."""
    figures = {"score": judge.objective(found, config.tune.splits, config.tune.judge)}
    for (model, split, metric), part in found.groupby(["model", "split", "metric"], sort=True):
        figures[f"{model}/{split}/{metric}" if model != "space" else str(metric)] = float(part["value"].mean())
    return figures


# The end


def _publish(
    config: Config,
    uri: str,
    record: artifacts.Record,
    arms: Sequence[Arm],
    trials: Sequence[Trial],
    *,
    tracked: tracking.Run,
) -> None:
    """Put the parts together, name the best arm, and register it if asked to."""
    frames, failed = [], {}
    for trial in trials:
        key = {"arm": trial.arm, "name": trial.name, "seed": trial.seed}
        if storage.exists(trial.failed):
            failed[f"{trial.name} (seed {trial.seed})"] = storage.read_json(trial.failed)["why"]
        for rung, _ in enumerate(trial.steps):
            if storage.exists(trial.part(rung)):
                frame = storage.read_table(trial.part(rung)).to_pandas()
                frames.append(frame.assign(rung=rung, share=config.tune.rungs[rung], **key))
    if not frames:
        first = next(iter(failed.items()))
        msg = f"tune: not one training could be done; the first: {first[0]}: {first[1]}"
        raise UserError(msg)
    found = pd.concat(frames, ignore_index=True)
    board = ablation.board(found, config.tune)
    tables = {
        "trials": found,
        "arms": board,
        "effects": ablation.effects(board),
        "interactions": ablation.interactions(board, arms, config),
    }
    files = {}
    for name, frame in tables.items():
        size, digest = storage.write_table(
            storage.join(uri, f"{name}.parquet"), pa.Table.from_pandas(frame, preserve_index=False)
        )
        files[f"{name}.parquet"] = {"bytes": size, "sha256": digest}
    best = ablation.best(board)
    winner = next(arm for arm in arms if arm.key == best)
    chosen = to_dict(replace(winner.config, output=config.output, tune=type(config.tune)()))
    files["best.json"] = _write(storage.join(uri, "best.json"), (json.dumps(chosen, indent=1) + "\n").encode())
    details = {
        "arms": [{"key": a.key, "name": a.name, "changes": dict(a.changes)} for a in arms], "best": best, "failed": failed,
        "sentence": ablation.sentence(tables["effects"], board),
    }  # fmt: skip
    artifacts.finish(
        uri,
        record,
        counts={"arms": len(arms), "trials": len(trials), "failed": len(failed)},
        files=files,
        details=details,
    )
    say(f"tune: {details['sentence']}")
    say(
        f"tune: best arm: {winner.name}; train it whole: mixgf pretrain --config {storage.join(uri, 'best.json')} --output ..."
    )
    tracked.log({"best_score": float(board.loc[board["arm"] == best, "score"].max())})
    if config.tune.register:
        version = _register(config, winner, trials, board=board, tracked=tracked, sentence=str(details["sentence"]))
        say(f"tune: registered in MLflow as {config.tune.register}, version {version}")


def _register(
    config: Config, winner: Arm, trials: Sequence[Trial], *, board: pd.DataFrame, tracked: tracking.Run, sentence: str
) -> str:
    """Register the best arm's first seed in MLflow with its card; returns the version."""
    trial = next(
        trial for trial in trials if trial.arm == winner.key and storage.exists(trial.part(len(trial.steps) - 1))
    )
    corpus = artifacts.require(trial.config["inputs"]["corpus"], "corpus")
    mine = board[(board["arm"] == winner.key) & (board["rung"] == board["rung"].max())]
    lines = [
        f"{title}: {mine[name].mean():.3f} (mean of {mine[name].notna().sum()} seeds; {', '.join(f'{v:.3f}' for v in mine[name])})"
        for name, title in ablation.METRICS.items() if mine[name].notna().any()
    ]  # fmt: skip
    about = {
        "cells": int(corpus.counts["kept"]), "fingerprint": corpus.fingerprint,
        "species": ", ".join(sorted({s["species"] for s in corpus.config.get("sources", [])})),
        "sources": [s["name"] for s in corpus.config.get("sources", [])],
    }  # fmt: skip
    text = card.write(
        name=f"{config.tune.register}: {winner.name}", corpus=about, changes=dict(winner.changes), scores=lines,
        sentence=sentence, config=trial.config,
    )  # fmt: skip
    weights = storage.join(trial.uri, "pretrain", "steps", f"{trial.steps[-1]:08d}", checkpoint.WEIGHTS)
    files = {
        checkpoint.WEIGHTS: storage.read_bytes(weights), "config.json": storage.json_bytes(trial.config),
        "README.md": text.encode(),
    }  # fmt: skip
    return tracked.register(config.tune.register, files, text)


def _write(uri: str, data: bytes) -> dict[str, Any]:
    storage.write_bytes(uri, data)
    return artifacts.summed(uri.rsplit("/", 1)[0], [uri.rsplit("/", 1)[1]])[uri.rsplit("/", 1)[1]]
