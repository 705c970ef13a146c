"""`tune`: arms times seeds as trials of Ray Tune, each a pretraining under Ray Train that is scored at its rungs.

The scores of a trial at a rung are a part in storage, and its training lies beside it; Ray Tune only runs what is missing. So
a sweep killed at any moment goes on with the same command and nothing is trained or scored twice. With `tune.stop = halving`
arms are stopped between rungs by the parts alone, so the result is that of an undisturbed sweep.

Arms are stopped and chosen by the cells of `HeldOut.select`. The test cells are scored once, at the end, for the best arm and the
base.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import pyarrow as pa

from mixgf.config.fields import content_of, names
from mixgf.config.parse import fingerprint, from_dict, to_dict
from mixgf.config.run import Config
from mixgf.console import say, warn
from mixgf.corpus.reader import Corpus
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.metrics import watch
from mixgf.encoder import checkpoint
from mixgf.errors import UserError
from mixgf.execution import Executor, Task
from mixgf.stages import prepare, pretrain
from mixgf.stages.tune_trials import (
    SCHEMA,
    SELECT,
    TEST,
    Search,
    Trial,
    advance_all,
    evaluation_cells,
    score,
    score_test,
)
from mixgf.storage import artifacts, files
from mixgf.storage.tables import read_table
from mixgf.tracking import mlflow_runs, model_card
from mixgf.training import checkpoints
from mixgf.training.pretraining import Pretraining
from mixgf.tuning import analysis, search_space
from mixgf.tuning.search_space import Arm

_TOKENS = names(Config, role="corpus")
"""Parts of the config that decide a corpus: an arm that changes one has a corpus of its own."""


def run(config: Config, *, executor: Executor | None = None) -> str:
    """Make the sweep of `config.tune`; returns the artifact's URI.

    `executor` says where trials run: one after the other in this process if it is local, else under Ray Tune; None = Ray.
    """
    executor = executor or RayExecutor(_wide(config), in_flight=config.compute.num_workers)
    uri = files.join(config.output, "tune")
    arms = search_space.arms(config)
    with executor.session():
        corpora = _corpora(config, arms, uri, executor)
        record = _plan(config, arms, corpora)
        if not artifacts.begin(uri, record):
            say(f"tune: {uri} is already there")
            return uri
        steps = _check(config, arms, corpora)
        with (
            mlflow_runs.stage(config, "tune", to_dict(config), record.fingerprint) as tracked,
            watch(config, "tune", tracked, uri) as watched,
        ):
            trials = _trials(config, arms, corpora, steps=steps, uri=uri)
            search = Search(config=config, executor=executor, tracked=tracked, meter=watched.meter)
            _search(search, arms, trials)
            _publish(search, uri, record, arms, trials)
    return uri


def _wide(config: Config) -> Config:
    """The config by whose size a local Ray is started: room for all trials that run at a time, and for Ray Train's controllers."""
    workers = config.tune.concurrent * (config.compute.num_workers + 1)
    return replace(config, compute=replace(config.compute, num_workers=workers, min_workers=0))


def _corpora(config: Config, arms: Sequence[Arm], uri: str, executor: Executor) -> dict[str, str]:
    """The corpus of each arm, by its key; arms with the same sentences have the same one, made once."""
    base, made, found = to_dict(config), dict[str, str](), {}
    for arm in arms:
        data = to_dict(arm.config)
        changed = {name: data[name] for name in _TOKENS if data[name] != base[name]}
        name = fingerprint(changed)[:10] if changed else ""
        if name not in made:
            made[name] = _corpus(config, arm, files.join(uri, "corpora", name) if changed else "", executor)
        found[arm.key] = made[name]
    return found


def _corpus(config: Config, arm: Arm, own: str, executor: Executor) -> str:
    """The sweep's corpus, or with `own` one that is prepared there for an arm; either is made where it is not there."""
    if not own and (config.inputs.corpus or not config.sources):
        return config.inputs.corpus or files.join(config.output, "corpus")
    if not own:
        return prepare.run(config, executor=executor)
    if not config.sources:
        msg = (f"tune.space: {arm.name} needs a corpus of its own, and there are no sources to make it from; "
               "give them as for `mixgf prepare`: mixgf tune human=... mouse=...")  # fmt: skip
        raise UserError(msg)
    tracked = replace(config.tracking, uri=mlflow_runs.uri(config))
    return prepare.run(replace(arm.config, output=own, tracking=tracked), executor=executor)


def _plan(config: Config, arms: Sequence[Arm], corpora: dict[str, str]) -> artifacts.Record:
    """The record of this sweep: everything but how many trials run at a time."""
    data = to_dict(config)
    content = {name: data[name] for name in ("classify", "embed", "seed")}
    content["tune"] = content_of(config.tune)
    content["arms"] = {arm.key: dict(arm.changes) for arm in arms}
    parents = {}
    for arm in arms:
        parents[f"corpus of {arm.name}"] = artifacts.require(corpora[arm.key], "corpus").fingerprint
    return artifacts.plan(analysis.KIND, SCHEMA, content, parents)


def _check(config: Config, arms: Sequence[Arm], corpora: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """Refuse what would fail later: splits that cannot be made, arms that cannot be trained; returns each arm's rungs."""
    opened = {uri: Corpus(uri) for uri in dict.fromkeys(corpora.values())}
    steps = {}
    for arm in arms:
        corpus = opened[corpora[arm.key]]
        steps[arm.key] = tuple(search_space.rungs(config, Pretraining(arm.config, corpus).num_steps))
    held = evaluation_cells(arms[0].config, opened[corpora[arms[0].key]], config.seed)
    kinds = config.tune.splits
    for part, tasks, use in ((SELECT, held.select, "arms are not chosen by it"), (TEST, held.test, "it is not tested")):
        absent = [kind for kind in kinds if kind not in tasks.kinds]
        if len(absent) == len(kinds):
            msg = (f"tune.splits = {', '.join(kinds)}: none can be made of these cells in three parts (train, select, test); a group "
                   "needs three donors (donor), three data sets (dataset) or two species (species); tune.splits=random needs cells only")  # fmt: skip
            raise UserError(msg)
        if absent:
            warn(
                f"tune.splits: {', '.join(absent)}: too few donors, data sets, species or types for the {part} cells; {use}"
            )
    development, every = len(held.select.table), len(held.test.table)
    say(f"tune: {len(arms)} arms x {config.tune.seeds} seeds; {len(held.select.of(kinds))} tasks on {development:,} cells choose the best "
        f"arm ({', '.join(kinds)}); {every - development:,} test cells are scored at the end for it and the base")  # fmt: skip
    return steps


def _trials(
    config: Config, arms: Sequence[Arm], corpora: dict[str, str], *, steps: dict[str, tuple[int, ...]], uri: str
) -> list[Trial]:
    made = []
    for seed in range(config.tune.seeds):
        for number, arm in enumerate(arms):
            own = replace(arm.config, seed=config.seed + seed, inputs=replace(config.inputs, corpus=corpora[arm.key]))
            made.append(
                Trial(
                    arm=arm.key, name=arm.name, seed=seed, config=to_dict(own),
                    uri=files.join(uri, "trials", f"{number:03d}-{arm.key[:8]}-{seed}"),
                    steps=steps[arm.key], base_seed=config.seed,
                )
            )  # fmt: skip
    return made


# Rungs


def _search(search: Search, arms: Sequence[Arm], trials: Sequence[Trial]) -> None:
    """Bring every trial as far as the rule says."""
    config = search.config
    last = max(len(trial.steps) for trial in trials) - 1
    alive = [arm.key for arm in arms]
    if config.tune.stop == "asha":
        advance_all(search, [t for t in trials if not _done(t, last)], range(last + 1))
        return
    for rung in range(last + 1):
        mine = [trial for trial in trials if trial.arm in alive]
        todo = [trial for trial in mine if not _done(trial, rung)]
        if todo:
            say(f"tune: rung {rung + 1} of {last + 1}: {len(alive)} arms, {len(todo)} trainings to go on with")
            advance_all(search, todo, range(rung, rung + 1))
        if config.tune.stop == "halving" and rung < last:
            scores = _scores(config, [arm for arm in arms if arm.key in alive], mine, rung)
            alive = search_space.survivors(scores, config.tune.keep, config.tune.seeds)
            names = {arm.key: arm.name for arm in arms}
            stopped = [names[key] for key in scores if key not in alive]
            say(
                f"tune: after rung {rung + 1} {len(stopped)} arms stop" + (f": {'; '.join(stopped)}" if stopped else "")
            )


def _done(trial: Trial, rung: int) -> bool:
    return files.exists(trial.failed) or files.exists(trial.part(trial.at(rung)))


def _scores(config: Config, arms: Sequence[Arm], trials: Sequence[Trial], rung: int) -> dict[str, list[float]]:
    """Scores at a rung by arm, the failed trainings left out."""
    found: dict[str, list[float]] = {arm.key: [] for arm in arms}
    for trial in trials:
        if not files.exists(trial.failed):
            found[trial.arm].append(score(trial, trial.at(rung), config.tune))
    return found


# The end


def _publish(search: Search, uri: str, record: artifacts.Record, arms: Sequence[Arm], trials: Sequence[Trial]) -> None:
    """Put the parts together, choose the best arm, score it and the base on the test cells, and register it if asked to."""
    config, tracked = search.config, search.tracked
    failed = {
        f"{trial.name} (seed {trial.seed})": files.read_json(trial.failed)["why"]
        for trial in trials if files.exists(trial.failed)
    }  # fmt: skip
    chosen_on = _collected(trials, SELECT)
    if chosen_on.empty:
        first = next(iter(failed.items()))
        msg = f"tune: not one training could be done; the first: {first[0]}: {first[1]}"
        raise UserError(msg)
    arm_scores = analysis.arm_scores(chosen_on, config.tune)
    best = analysis.best(arm_scores)
    winner = next(arm for arm in arms if arm.key == best)
    _score_test(search, [trial for trial in trials if trial.arm in {best, arms[0].key}])
    tested = _collected(trials, TEST)
    effects = analysis.effects(arm_scores)
    final = analysis.final_scores(arm_scores, analysis.arm_scores(tested, config.tune), best)
    tables = {
        "trials": pd.concat([chosen_on, tested], ignore_index=True),
        "arms": arm_scores,
        "effects": effects,
        "interactions": analysis.interactions(arm_scores, arms, config),
        "final": final,
    }
    checksums = artifacts.write_tables(
        uri, {name: pa.Table.from_pandas(frame, preserve_index=False) for name, frame in tables.items()}
    )
    corpus = next(trial.config["inputs"]["corpus"] for trial in trials if trial.arm == best)
    chosen = replace(
        winner.config, output=files.join(config.output, "best"), tune=type(config.tune)(),
        inputs=replace(winner.config.inputs, corpus=corpus),
    )  # fmt: skip
    files.write_bytes(files.join(uri, "best.json"), (json.dumps(to_dict(chosen), indent=1) + "\n").encode())
    checksums |= artifacts.checksums_of(uri, ["best.json"])
    details = {
        "arms": [{"key": a.key, "name": a.name, "changes": dict(a.changes)} for a in arms], "best": best, "failed": failed,
        "sentence": analysis.sentence(effects, final),
    }  # fmt: skip
    artifacts.finish(
        uri,
        record,
        counts={"arms": len(arms), "trials": len(trials), "failed": len(failed)},
        files=checksums,
        details=details,
    )
    say(f"tune: {details['sentence']}")
    say(f"tune: best arm: {winner.name}; train it by itself: mixgf pretrain --config {files.join(uri, 'best.json')}")
    figures = final[(final["what"] == winner.name) & (final["metric"] == "score")].iloc[0]
    tracked.log({"best_score": float(figures["select"]), "best_test_score": float(figures["test"])})
    if config.tune.register:
        version = _register(config, winner, trials, final=final, tracked=tracked, sentence=str(details["sentence"]))
        say(f"tune: registered in MLflow as {config.tune.register}, version {version}")


def _collected(trials: Sequence[Trial], part: str) -> pd.DataFrame:
    """The scores of all trials on the cells of one part, by rung; the columns of `trials.parquet`."""
    frames = []
    for trial in trials:
        key = {"arm": trial.arm, "name": trial.name, "seed": trial.seed, "part": part}
        last = len(trial.steps) - 1
        for rung, step in enumerate(trial.steps):
            uri = trial.part(rung) if part == SELECT else trial.test_part
            if (part == SELECT or rung == last) and files.exists(uri):
                frame = read_table(uri).to_pandas()
                frames.append(frame.assign(rung=rung, share=step / trial.steps[-1], **key))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _score_test(search: Search, trials: Sequence[Trial]) -> None:
    """Score the test cells for finished trainings, one task each; what is there is not made again."""
    todo = [t for t in trials if files.exists(t.part(len(t.steps) - 1)) and not files.exists(t.test_part)]
    threads = search.config.train.threads
    tasks = [
        Task(part=t.test_part, function=score_test, args=(t, search.tracked), threads=threads, gpu=True) for t in todo
    ]
    for receipt in search.executor.run(tasks):
        if receipt.error:
            msg = f"tune: {todo[receipt.number].name}: {receipt.error}"
            raise UserError(msg)


def _untrained(config: Config) -> int:
    return len(
        pretrain.untrained(
            config, Pretraining(config, Corpus(config.inputs.corpus, max_len=config.model.max_positions))
        )
    )


def _register(
    config: Config,
    winner: Arm,
    trials: Sequence[Trial],
    *,
    final: pd.DataFrame,
    tracked: mlflow_runs.Run,
    sentence: str,
) -> str:
    """Register the best arm's first seed in MLflow with its card; returns the version."""
    trial = next(
        trial for trial in trials if trial.arm == winner.key and files.exists(trial.part(len(trial.steps) - 1))
    )
    corpus = artifacts.require(trial.config["inputs"]["corpus"], "corpus")
    lines = [
        f"{analysis.METRICS[row.metric]}: {row.test:.3f} on test cells (mean of {row.num_seeds} seeds; {row.select:.3f} on the cells that "
        "chose the arm)"
        for row in final[final["what"] == winner.name].itertuples()
    ]  # fmt: skip
    about = {
        "cells": int(corpus.counts["kept"]), "fingerprint": corpus.fingerprint,
        "species": ", ".join(sorted({s["species"] for s in corpus.config.get("sources", [])})),
        "sources": [s["name"] for s in corpus.config.get("sources", [])],
    }  # fmt: skip
    text = model_card.write(
        name=f"{config.tune.register}: {winner.name}", corpus=about, changes=dict(winner.changes), scores=lines,
        sentence=sentence, config=trial.config, untrained=_untrained(from_dict(Config, trial.config)),
    )  # fmt: skip
    weights = files.join(
        checkpoints.step_folder(files.join(trial.uri, "pretrain"), trial.steps[-1]), checkpoint.WEIGHTS
    )
    contents = {
        checkpoint.WEIGHTS: files.read_bytes(weights), "config.json": files.json_bytes(trial.config),
        "README.md": text.encode(),
    }  # fmt: skip
    return tracked.register(config.tune.register, contents, text)
