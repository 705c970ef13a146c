"""`tune`: arms as trials of Ray Tune. A trial pretrains one arm with several seeds and scores it at the rungs.

The scores of a training at a rung are a part in storage, and its checkpoints lie beside them; Ray Tune only runs what is missing.
So a sweep killed at any moment goes on with the same command and nothing is trained or scored twice. With `tune.stop = halving`
arms are stopped between rungs by the parts alone, so the result is that of an undisturbed sweep.

Arms are stopped and chosen by the cells of `HeldOut.select`. The test cells are scored once, at the end, for the best arm and the
base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf.config.fields import content_of, names
from mixgf.config.parse import by_field, fingerprint, from_dict, to_dict
from mixgf.config.run import Config
from mixgf.console import say, warn
from mixgf.corpus.reader import Corpus
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.metrics import watch
from mixgf.encoder import checkpoint
from mixgf.errors import UserError
from mixgf.execution import Executor
from mixgf.redact import redact
from mixgf.stages import prepare, pretrain
from mixgf.stages.tune_trials import (
    SCHEMA,
    SELECT,
    TEST,
    Sweep,
    Training,
    advance_all,
    done,
    evaluation_cells,
    explore,
    run_tasks,
    rungs_of,
    score,
    test_tasks,
    with_inputs,
)
from mixgf.storage import artifacts, files
from mixgf.storage.sealed import read_sealed
from mixgf.storage.tables import read_table
from mixgf.tracking import mlflow_runs, model_card, packaged_model
from mixgf.training import checkpoints
from mixgf.training.pretraining import Pretraining, blank_model, start_tokens
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
            mlflow_runs.stage(config, "tune", {"tune": record.config["tune"]}, record.fingerprint) as tracked,
            watch(config, "tune", tracked, uri) as watched,
        ):
            tracked.corpus(corpora[arms[0].key], "training")
            sweep = Sweep(
                config=config, uri=uri, executor=executor, tracked=tracked, meter=watched.meter, corpora=corpora, steps=steps
            )  # fmt: skip
            _publish(sweep, record, _search(sweep, arms))
    return uri


def _wide(config: Config) -> Config:
    """The config by whose size a local Ray is started: room for all trials that run at a time."""
    compute = config.compute
    cpus = max(compute.cpus_per_worker, float(config.train.threads))
    wide = replace(
        compute, num_workers=config.tune.concurrent * compute.num_workers, min_workers=0, cpus_per_worker=cpus
    )
    return replace(config, compute=wide)


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
    steps = {}
    for arm in arms:
        steps[arm.key] = rungs_of(arm, corpora[arm.key])
    held = evaluation_cells(arms[0].config, Corpus(corpora[arms[0].key]), config.seed)
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
    number = f"{config.tune.num_arms} arms and the base" if config.tune.search == "optuna" else f"{len(arms)} arms"
    say(f"tune: {number} x {config.tune.seeds} seeds; {len(held.select.of(kinds))} tasks on {development:,} cells choose the best "
        f"arm ({', '.join(kinds)}); {every - development:,} test cells are scored at the end for it and the base")  # fmt: skip
    return steps


# Rungs


def _search(sweep: Sweep, arms: Sequence[Arm]) -> list[Arm]:
    """Bring every arm as far as the rule says; returns all arms, those that Optuna chose behind the others."""
    settings, base = sweep.config.tune, arms[0]
    if settings.search == "optuna":
        rungs = range(len(settings.rungs))
        advance_all(sweep, [base], rungs)
        explore(sweep, rungs)
        chosen = [search_space.from_point(sweep.config, note["chosen"]) for note in sweep.noted() if not note["why"]]
        return list({arm.key: arm for arm in (base, *sorted(chosen, key=lambda arm: arm.key))}.values())
    last = max(len(steps) for steps in sweep.steps.values()) - 1
    if settings.stop in ("asha", "median"):
        advance_all(sweep, _undone(sweep, arms, last), range(last + 1), stop=True)
        # the other arms are compared with the base, so it never stops early
        advance_all(sweep, _undone(sweep, [base], last), range(last + 1))
        return list(arms)
    alive = list(arms)
    for rung in range(last + 1):
        todo = _undone(sweep, alive, rung)
        if todo:
            say(f"tune: rung {rung + 1} of {last + 1}: {len(alive)} arms, {len(todo)} to go on with")
            advance_all(sweep, todo, range(rung, rung + 1))
        if settings.stop == "halving" and rung < last:
            alive = _halved(sweep, alive, rung, last)
    return list(arms)


def _undone(sweep: Sweep, arms: Sequence[Arm], rung: int) -> list[Arm]:
    """The arms with a training that needs something at a rung."""
    return [arm for arm in arms if not all(done(training, rung) for training in sweep.trainings(arm))]


def _halved(sweep: Sweep, arms: Sequence[Arm], rung: int, last: int) -> list[Arm]:
    """The arms that go on after a rung."""
    settings = sweep.config.tune
    scores = {
        arm.key: [score(training, rung, settings) for training in sweep.trainings(arm) if not files.exists(training.failed)]
        for arm in arms
    }  # fmt: skip
    keys = search_space.survivors(scores, settings.keep, settings.seeds)
    stopped = {arm.key for arm in arms} - set(keys)
    say(f"tune: after rung {rung + 1} of {last + 1}, {len(stopped)} of {len(arms)} arms stop")
    _show(sweep.config, {arm.name: (scores[arm.key], "stops" if arm.key in stopped else "") for arm in arms})
    return [arm for arm in arms if arm.key in keys]


def _show(config: Config, found: Mapping[str, tuple[Sequence[float], str]]) -> None:
    """Print the arms with mean and range of their scores over seeds, the best first: name to scores and a remark."""
    say(f"tune: zero-shot macro F1 ({config.tune.head}) on the cells that choose: mean [range over seeds]")
    for name, (scores, remark) in sorted(
        found.items(), key=lambda item: -np.mean(item[1][0]) if item[1][0] else np.inf
    ):
        text = f"{np.mean(scores):.3f} [{min(scores):.3f}, {max(scores):.3f}]" if scores else "failed" + " " * 14
        say(f"tune:   {text}  {name}{f' ({remark})' if remark else ''}")


# The end


def _publish(sweep: Sweep, record: artifacts.Record, arms: Sequence[Arm]) -> None:
    """Put the parts together, choose the best arm, score it and the base on the test cells, and register it if asked to."""
    config, uri, tracked = sweep.config, sweep.uri, sweep.tracked
    trainings = [training for arm in arms for training in sweep.trainings(arm)]
    failed = {
        f"{training.name} (seed {training.seed})": read_sealed(training.failed)["why"]
        for training in trainings if files.exists(training.failed)
    }  # fmt: skip
    failed |= {json.dumps(note["chosen"]): note["why"] for note in sweep.noted() if note["why"]}
    chosen_on = _collected(trainings, SELECT)
    if chosen_on.empty:
        first = next(iter(failed.items()))
        msg = f"tune: not one training could be done; the first: {first[0]}: {first[1]}"
        raise UserError(msg)
    arm_scores = analysis.arm_scores(chosen_on, config.tune)
    best = analysis.best(arm_scores)
    winner = next(arm for arm in arms if arm.key == best)
    run_tasks(sweep.executor, test_tasks(sweep, [one for one in trainings if one.arm in {best, arms[0].key}]))
    tested = _collected(trainings, TEST)
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
    corpus = next(training.config["inputs"]["corpus"] for training in trainings if training.arm == best)
    chosen = replace(
        winner.config, output=files.join(config.output, "best"), tune=type(config.tune)(),
        inputs=replace(winner.config.inputs, corpus=corpus),
    )  # fmt: skip
    files.write_bytes(files.join(uri, "best.json"), (redact(json.dumps(to_dict(chosen), indent=1)) + "\n").encode())
    checksums |= artifacts.checksums_of(uri, ["best.json"])
    details = {
        "arms": [{"key": a.key, "name": a.name, "changes": dict(a.changes)} for a in arms], "best": best, "failed": failed,
        "sentence": analysis.sentence(effects, final),
        "base": {name: value for name, value in by_field(arms[0].config).items() if name.startswith("train.")},
    }  # fmt: skip
    artifacts.finish(
        uri,
        record,
        counts={"arms": len(arms), "trainings": len(trainings), "failed": len(failed)},
        files=checksums,
        details=details,
    )
    _show(config, {
        str(name): (part["score"].tolist(), "" if part["share"].iloc[0] == 1 else f"stopped after {part['share'].iloc[0]:.0%}")
        for name, part in arm_scores.sort_values("rung").groupby(["arm", "seed"]).tail(1).groupby("name")
    })  # fmt: skip
    say(f"tune: {details['sentence']}")
    say(f"tune: best arm: {winner.name}; train it by itself: mixgf pretrain --config {files.join(uri, 'best.json')}")
    figures = final[(final["what"] == winner.name) & (final["metric"] == "score")].iloc[0]
    for name in ("final", "effects", "arms"):
        tracked.table(name, pa.Table.from_pandas(tables[name], preserve_index=False))
    tracked.summary({"best_score": float(figures["select"]), "best_test_score": float(figures["test"])})
    if config.tune.register:
        version = _register(config, winner, trainings, final=final, tracked=tracked, sentence=str(details["sentence"]))
        say(f"tune: registered in MLflow as {config.tune.register}, version {version}")


def _collected(trainings: Sequence[Training], part: str) -> pd.DataFrame:
    """The scores of all trainings on the cells of one part, by rung; the columns of `trials.parquet`."""
    frames = []
    for training in trainings:
        key = {"arm": training.arm, "name": training.name, "seed": training.seed, "part": part}
        last = len(training.steps) - 1
        for rung, step in enumerate(training.steps):
            uri = training.part(rung) if part == SELECT else training.test_part
            if (part == SELECT or rung == last) and files.exists(uri):
                frame = read_table(uri).to_pandas()
                frames.append(frame.assign(rung=rung, share=step / training.steps[-1], **key))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _register(
    config: Config,
    winner: Arm,
    trainings: Sequence[Training],
    *,
    final: pd.DataFrame,
    tracked: mlflow_runs.Run,
    sentence: str,
) -> str:
    """Register the best arm's first seed in MLflow with its card; returns the version."""
    training = next(
        training
        for training in trainings
        if training.arm == winner.key and files.exists(training.part(len(training.steps) - 1))
    )
    best = _published(training, files.join(config.output, "tune", "best"))
    corpus = artifacts.require(training.config["inputs"]["corpus"], "corpus")
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
        sentence=sentence, config=training.config,
        untrained=len(checkpoint.untrained_ids(artifacts.require(best, checkpoint.KIND))),
    )  # fmt: skip
    return tracked.register(
        config.tune.register, packaged_model.encoder(best, training.config["inputs"]["corpus"], text)
    )


def _published(training: Training, uri: str) -> str:
    """The weights of a training's last rung as a checkpoint at `uri`, which the other stages take."""
    config = from_dict(Config, training.config)
    corpus = Corpus(config.inputs.corpus, max_len=config.model.max_positions)
    record = pretrain.planned(config, corpus)
    if artifacts.begin(uri, record):
        model = blank_model(config, corpus.vocabulary.size)
        whole = with_inputs(config, corpus, uri.rsplit("/", 1)[0])
        checkpoints.load_step_weights(files.join(training.uri, "pretrain"), training.steps[-1], model)
        checkpoint.publish_checkpoint(
            uri, record, model, vocabulary=corpus.vocabulary.hash, tokens=corpus.token_settings,
            objective=config.objective, counts={"steps": training.steps[-1]}, untrained=pretrain.untrained(config, Pretraining(config, corpus)),
            start_VD=start_tokens(whole, corpus),
        )  # fmt: skip
    return uri
