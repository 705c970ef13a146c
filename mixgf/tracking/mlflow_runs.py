"""Runs in MLflow: one per output, and under it one per stage.

Only the driver of a stage talks to MLflow, through a queue (`mixgf.tracking.delivery`): a tracker that is down or slow neither
ends nor slows the work, and what it misses is sent later. Without MLFLOW_TRACKING_URI the store is SQLite under the output.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import os
import re
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mixgf.config import recipes
from mixgf.config.fields import sections_of
from mixgf.config.parse import by_field, fingerprint, flat, to_dict
from mixgf.config.run import Config
from mixgf.console import say
from mixgf.errors import UserError
from mixgf.redact import redact
from mixgf.storage import artifacts, files
from mixgf.tracking import datasets
from mixgf.tracking.delivery import OPEN_SECONDS, QUIET_SECONDS, STOPPED_SECONDS, Delivery, Operation
from mixgf.tracking.store import OFF, SQLITE, VIEW_KEY, Store, client_of, require_store, sqlite_artifacts, sqlite_uri

FOLDER = "tracking"
"""Folder of an output with the key of its run, and what could not be sent."""
SHOWN_ROWS = 50
"""Rows of a table that are logged."""
TRAINING_PAGES = "workflowType=machine_learning"
"""Part of a URL that opens MLflow's pages for model training, not those for language models."""
PACE_SECONDS = 10.0
"""Between two records of the progress of tasks."""
_UNSENT = "unsent-"
_GROUPS = {
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "cells_per_s": "speed/cells_per_s",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "wait_share": "speed/wait_share",
    "memory_gb": "speed/memory_gb",
    "alignment": "vectors/alignment",
    "uniformity": "vectors/uniformity",
}
"""Names in MLflow of the figures of a training; all others are losses, of held-out cells or not. MLflow's pages draw the charts of a group side by side."""

_deliveries: dict[str, Delivery] = {}
_lock = threading.Lock()


def _delivery(where: str) -> Delivery:
    """The queue of this process to a tracker."""
    with _lock:
        if where not in _deliveries:
            store = Store(where)
            _deliveries[where] = Delivery(where, store.apply, store.answers)
        return _deliveries[where]


def uri(config: Config) -> str:
    """Where the run is tracked: `tracking.uri`, MLFLOW_TRACKING_URI, or SQLite beside the artifacts; `OFF` = nowhere.

    Raises:
        UserError: The URI is of no store that MLflow has.
    """
    for field, chosen in (
        ("tracking.uri", config.tracking.uri),
        ("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI", "")),
    ):
        if chosen:
            require_store(chosen, field)
            return chosen
    folder = (
        files.local_path(config.output).absolute()
        if files.is_local(config.output)
        else files.local_path("mlflow").absolute()
    )
    folder.mkdir(parents=True, exist_ok=True)
    return sqlite_uri(str(folder / "mlflow.db"))


def how_to_look(config: Config) -> list[str]:
    """Lines that say where a person sees the run of an output: a page, or the command that starts MLflow's pages first."""
    where = uri(config)
    if where == OFF:
        return []
    scheme = where.partition("://")[0]
    if scheme in ("http", "https"):
        return [page(config, _without_user(where))]
    stored = redact(where)
    if stored != where:
        stored = "$MLFLOW_TRACKING_URI"
    stored = stored if stored.startswith("$") else shlex.quote(stored)
    return [f"mlflow ui --backend-store-uri {stored} --port 5000", f"then open {page(config)}"]


def page(config: Config, server: str = "http://127.0.0.1:5000") -> str:
    """URL of the experiment's runs on MLflow's server, in the view for model training."""
    try:
        experiment = client_of(uri(config)).get_experiment_by_name(config.tracking.experiment)
    except Exception:  # noqa: BLE001 (a tracker that is down has no number to show)
        experiment = None
    where = f"/experiments/{experiment.experiment_id}/runs" if experiment is not None else "/experiments"
    return f"{server}/#{where}?viewStateShareKey={VIEW_KEY}&{TRAINING_PAGES}"


@dataclass(frozen=True, slots=True)
class Run:
    """A tracked run of the driver; where `uri` is `OFF`, nothing is logged. No method waits, unless it says so."""

    uri: str
    key: str
    """Identifies the run, in a tag."""
    id: str
    """Of MLflow; the key where MLflow has not answered."""
    stage: str = ""
    above: str = ""
    """Key of the output's run."""

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at one step."""
        self.log_many([(step, name, value) for name, value in metrics.items()])

    def log_many(self, rows: Sequence[tuple[int, str, float]]) -> None:
        """Log (step, name, value) rows; values that are not finite are left out."""
        if rows:
            self._put("metrics", rows=list(rows), when=_now())

    def log_missing(self, rows: Sequence[tuple[int, str, float]]) -> None:
        """Log the (step, name, value) rows whose metric has no value yet at their step."""
        if rows:
            self._put("missing", rows=list(rows), when=_now())

    def summary(self, metrics: Mapping[str, float], *, own: bool = True) -> None:
        """Log final figures, also on the output's run, as `STAGE/NAME`; with `own` false only there."""
        if own:
            self.log(metrics)
        if self.above:
            rows = [(0, f"{self.stage}/{name}", value) for name, value in metrics.items()]
            self._put("metrics", key=self.above, rows=rows, when=_now())

    def corpus(self, uri: str, context: str) -> None:
        """Log a corpus as the data set of the run and of the output.

        Args:
            uri: Of a finished corpus.
            context: What it is used for, such as `training`.
        """
        if self.uri == OFF:
            return
        made = datasets.corpus(uri, context)
        self._put("inputs", datasets=[made])
        if self.above:
            self._put("inputs", key=self.above, datasets=[made | {"context": "corpus"}])

    def sources(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log sources of a corpus, as rows of its record, as data sets."""
        if self.uri != OFF:
            self._put("inputs", datasets=datasets.sources([dict(row) for row in rows]))

    def table(self, name: str, table: pa.Table) -> None:
        """Log the first rows of a table, which MLflow's pages show as one.

        Args:
            name: Of the artifact, without ending.
            table: Any; numbers are rounded to 6 digits.
        """
        if self.uri == OFF:
            return
        head = table.slice(0, SHOWN_ROWS)
        rows = [[_shown(value) for value in row.values()] for row in head.to_pylist()]
        text = redact(json.dumps({"columns": head.column_names, "data": rows}))
        self._put("table", name=f"{name}.json", text=text)

    def text(self, name: str, text: str) -> None:
        """Log a text artifact."""
        self._put("text", name=name, text=redact(text))

    def files(self, uris: Sequence[str], folder: str = "") -> None:
        """Log files that stay where they are until the stage ends."""
        self._put("files", uris=list(uris), folder=folder)

    def model(self, name: str, model: Mapping[str, Any], register: str = "") -> None:
        """Log a model of `packaged_model`.

        Args:
            name: In the run.
            model: From `packaged_model.encoder` or `classifier`.
            register: Name in MLflow's registry; empty = not registered.
        """
        self._put("model", above=self.above, name=name, model=dict(model), register=register)

    def flush(self) -> None:
        """Wait until all is sent that this process logged, or the tracker finishes nothing any more."""
        if self.uri != OFF:
            _delivery(self.uri).settle()

    def children(self) -> set[str]:
        """Keys of the finished runs under this one (`child`); empty if MLflow does not answer. Waits for it."""
        if self.uri == OFF:
            return set()
        found = _delivery(self.uri).ask({"do": "children", "key": self.key}, _patience(self.uri))
        return set(found or ())

    def child(self, name: str, key: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Log a finished piece of work as a run of its own under this one.

        Args:
            name: Shown as the run's name.
            key: Identifies it for the caller. A run that was only partly logged is completed under the same key.
            params: Flat or nested; nested ones get dotted names.
            metrics: Values that are not finite are left out.
        """
        arguments = {"name": name, "params": flat(params), "metrics": dict(metrics), "tags": _tags(self.stage)}
        if self.uri != OFF:
            _delivery(self.uri).put({"do": "child", "parent": self.key, "key": key, "when": _now(), **arguments})

    def register(self, name: str, model: Mapping[str, Any]) -> str:
        """Log a model and register it; returns its version, "" if MLflow does not answer. Waits for it.

        Raises:
            UserError: Tracking is off.
        """
        if self.uri == OFF:
            msg = (
                "tune.register: needs MLflow, but tracking.uri = 'off'; set tracking.uri, or leave tune.register empty"
            )
            raise UserError(msg)
        operation = {
            "do": "model",
            "key": self.key,
            "above": self.above,
            "name": "encoder",
            "model": dict(model),
            "register": name,
        }
        return str(_delivery(self.uri).ask(operation, 0.0) or "")

    def _put(self, do: str, **arguments: Any) -> None:
        if self.uri != OFF:
            _delivery(self.uri).put({"do": do, "key": self.key} | arguments)


class Pace:
    """Logs the progress of tasks to a run: at most every `PACE_SECONDS`, and at the end.

    Args:
        run: Gets the figures, as `progress/WHAT/...`; their step is the number of parts that are done.
        what: Name of the work.
        total: Number of parts.
        unit: Of the work, for the rate.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, run: Run, what: str, total: int, unit: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._run, self._what, self._total, self._unit, self._clock = run, what, total, unit, clock
        self._began: tuple[float, float] | None = None
        self._logged = clock()

    def update(self, done: int, work: float, failed: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """Say how many parts are done, how much work that is, and how many failed.

        Args:
            done: Parts, those of earlier sessions too.
            work: In the unit, of these parts.
            failed: Parts that failed in this session.
            figures: Further figures; only called when they are logged.
        """
        now = self._clock()
        if self._began is None:
            self._began = now, work
        if now - self._logged < PACE_SECONDS and done + failed < self._total:
            return
        self._logged = now
        rate = (work - self._began[1]) / max(now - self._began[0], 1e-9) if now > self._began[0] else math.nan
        rows = {
            "parts_done": float(done), "parts_left": float(self._total - done), "parts_failed": float(failed),
            f"{self._unit.replace(' ', '_')}_per_s": rate, **figures(),
        }  # fmt: skip
        self._run.log({f"progress/{self._what}/{name}": value for name, value in rows.items()}, step=done)


def training_rows(rows: Iterable[tuple[int, int, str, float]]) -> list[tuple[int, str, float]]:
    """(step, epoch, name, value) rows of a training as rows for MLflow, whose names have a group."""
    return [(step, training_name(name), value) for step, _, name, value in rows]


def training_name(name: str) -> str:
    """Name in MLflow of a figure of the training loop."""
    if name.startswith("heldout_"):
        return name.replace("_", "/", 1)
    return _GROUPS.get(name, f"loss/{'total' if name == 'loss' else name}")


@contextlib.contextmanager
def stage(
    config: Config, name: str, params: Mapping[str, Any], fingerprint_: str, *, parent: str = ""
) -> Iterator[Run]:
    """Open the run of one stage, or continue the unfinished run of the same fingerprint.

    Args:
        config: The whole config, for the tracking server and the experiment.
        name: Of the stage, shown as the run's name.
        params: Flat or nested parameters; nested ones get dotted names.
        fingerprint_: Of the artifact that the stage makes; a restart with the same one continues the run.
        parent: Key of the run above this one; empty = the output's run.
    """
    where = uri(config)
    if where == OFF:
        yield Run(OFF, "", "")
        return
    delivery, above = _delivery(where), "" if parent else _output_key(config.output)
    if above:
        delivery.put(*_kept(config.output))
    key = fingerprint({"above": parent or above, "fingerprint": fingerprint_})[:32]
    opened = _openings(config, name, params, where=where, key=key, above=above, parent=parent)
    delivery.put(*opened[:-1])
    ids = delivery.ask(opened[-1], _patience(where))
    if ids is None:
        delivery.tell("the work goes on, and what there is to log is sent when it answers")
    run = Run(where, key, ids[1] if ids else key, stage=name, above=above)
    if ids and not parent and (shown := _page(where, *ids)):
        say(f"{name}: {shown}")
    delivery.put({"do": "text", "key": key, "name": "config.json", "text": _config_text(config)})
    status = "FAILED"
    try:
        if above:
            delivery.put({"do": "system", "key": key})
        yield run
        status = "FINISHED"
    finally:
        delivery.put({"do": "end", "key": key, "status": status})
        if above:
            note = {"mlflow.note.content": _output_note(config)}
            delivery.put({"do": "tags", "key": above, "tags": note}, {"do": "end", "key": above, "status": status})
        _deliver(delivery, config.output, opened, QUIET_SECONDS if status == "FINISHED" else STOPPED_SECONDS)


def publish_report(config: Config, uri_: str, figures: Mapping[str, str], tables: Mapping[str, str]) -> None:
    """Log the report of an output on the output's run: the page, its figures (SVG) and its tables (CSV), by name.

    Nothing is logged where no stage of the output has been.
    """
    where = uri(config)
    if where == OFF or not files.exists(files.join(config.output, FOLDER, "run.json")):
        return
    delivery, above = _delivery(where), _output_key(config.output)
    opened = _openings(config, "", {}, where=where, key=above, above="", parent="")
    delivery.put(*_kept(config.output), *opened)
    delivery.put({"do": "files", "key": above, "uris": [uri_], "folder": ""})
    for folder, ending, texts in (("figures", "svg", figures), ("tables", "csv", tables)):
        for name, text in texts.items():
            delivery.put({"do": "text", "key": above, "name": f"{folder}/{name}.{ending}", "text": redact(text)})
    delivery.put({"do": "end", "key": above, "status": "FINISHED"})
    _deliver(delivery, config.output, opened, QUIET_SECONDS)


def _openings(
    config: Config, name: str, params: Mapping[str, Any], *, where: str, key: str, above: str, parent: str
) -> list[Operation]:
    """The operations that open a run: that of the output first, where `above` or `key` is its key."""
    common = {"do": "open", "experiment": config.tracking.experiment, "artifacts": _artifacts(where, config.output)}
    made: list[Operation] = []
    for output_key in (above, "" if name else key):
        if output_key:
            folder = [part for part in redact(config.output).rstrip("/").split("/") if part]
            made.append(common | {
                "key": output_key, "name": folder[-1] if folder else config.output, "parent": "",
                "params": {"recipe": config.recipe, "output": redact(config.output)}, "note": "",
                "tags": _tags("") | {"mixgf.output": redact(config.output), "mixgf.stage": "output"},
            })  # fmt: skip
    if name:
        tags = _tags(name) | {"mixgf.output": redact(config.output), "mixgf.stage": name if not parent else "trial"}
        made.append(common | {
            "key": key, "name": name, "parent": parent or above, "tags": tags,
            "params": {"recipe": config.recipe, **{n: _plain(v) for n, v in flat(params).items()}},
            "note": _changes_note(config, name),
        })  # fmt: skip
    return made


def _deliver(delivery: Delivery, output: str, opened: list[Operation], quiet: float) -> None:
    """Send what is queued; keep in the output what cannot be sent to a tracker that finishes nothing for `quiet` seconds.

    The queue may hold operations of stages that go on, such as the sweep of a training. What is kept can be sent by itself: it
    opens the runs that it needs. An end is the last operation of a run, so a run that is opened there without its end is only made
    if it is missing.
    """
    if delivery.settle(quiet):
        return
    left = delivery.take()
    ended = {one["key"] for one in left if one["do"] == "end"}
    waiting = [one for one in left if one["do"] == "open"]
    go_on = [one for one in waiting if one["key"] not in ended]
    # a run whose end has arrived is not opened again
    before = [one for one in opened if one["key"] in ended - {one["key"] for one in waiting}]
    kept = [_to_keep(one, ended) for one in left if one["do"] not in ("children", "system", "sent")]
    if records := sum(one["do"] != "open" for one in kept):
        folder = files.join(_home(output), FOLDER)
        files.write_json(files.join(folder, f"{_UNSENT}{time.time_ns():020d}.json"), [*before, *kept])
        delivery.tell(f"{records} records are kept in {folder} and sent by the next command for this output")
    delivery.put(*go_on)
    for one in left:
        if one["do"] == "sent":  # a file of earlier commands, whose operations are in the new one
            files.remove(one["uri"])


def _to_keep(operation: Operation, ended: Collection[str]) -> Operation:
    """An operation that is sent later; `ended`: keys of runs whose end is sent later, too."""
    if operation["do"] == "metrics":  # some of them may have arrived
        return operation | {"do": "missing"}
    if operation["do"] == "open" and operation["key"] not in ended:
        return operation | {"again": False}
    return operation


def _kept(output: str) -> list[Operation]:
    """Operations that earlier commands could not send, each file followed by its removal."""
    folder = files.join(_home(output), FOLDER)
    found: list[Operation] = []
    for name in sorted(files.list_dir(folder)):
        if name.startswith(_UNSENT):
            there = files.join(folder, name)
            found += [*files.read_json(there), {"do": "sent", "uri": there}]
    return found


def claim(config: Config) -> None:
    """Give an output a run of its own, if it has none, before stages in folders inside it: their runs belong to it."""
    if uri(config) != OFF:
        _output_key(config.output)


def _home(output: str) -> str:
    """The folder with the run of an output: itself, or one above it, such as the run that a comparison belongs to."""
    folder = output.rstrip("/")
    for _ in range(4):
        if files.exists(files.join(folder, FOLDER, "run.json")):
            return folder
        folder = folder.rpartition("/")[0]
        if not folder or folder.endswith((":/", ":")):
            break
    return output


def _output_key(output: str) -> str:
    """Key of the run of an output's home."""
    there = files.join(_home(output), FOLDER, "run.json")
    if not files.exists(there):
        files.create_bytes(there, files.json_bytes({"key": uuid.uuid4().hex}))
    return str(files.read_json(there)["key"])


def _patience(where: str) -> float:
    """Seconds to wait for an answer; 0 = as long as it takes, for a file of this machine."""
    return 0.0 if where.startswith("sqlite:") else OPEN_SECONDS


def _now() -> int:
    return int(time.time() * 1000)


def _tags(stage_: str) -> dict[str, str]:
    tags = {
        "mlflow.source.name": f"mixgf {stage_}".rstrip(),
        "mlflow.source.type": "LOCAL",
        "mixgf.code": artifacts.code_version(),
    }
    if found := re.search(r"\+(?:.*-g)?([0-9a-f]{7,})", tags["mixgf.code"]):
        tags["mlflow.source.git.commit"] = found[1]
    with contextlib.suppress(KeyError, OSError, ImportError):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> Any:
    """A value of a table as JSON."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value if isinstance(value, str | int | bool | type(None)) else str(value)


def changes(config: Config, stage_: str) -> dict[str, tuple[Any, Any]]:
    """Settings of a stage that differ from the config's recipe: field to value, and the recipe's value."""
    base = by_field(recipes.RECIPES[config.recipe]() if config.recipe in recipes.RECIPES else Config())
    used = {*sections_of(Config, stage_), "compute"}
    return {
        name: (value, base.get(name))
        for name, value in by_field(config).items()
        if value != base.get(name) and (name.partition(".")[0] in used or name == "seed")
    }


def _changes_note(config: Config, stage_: str) -> str:
    """The run's description: what differs from the recipe."""
    found = changes(config, stage_)
    rows = [f"| `{n}` | `{redact(_plain(a))[:200]}` | `{redact(_plain(b))[:200]}` |" for n, (a, b) in found.items()]
    head = f"Settings that differ from the recipe `{config.recipe}`"
    table = "\n".join([f"{head}:", "", "| setting | here | recipe |", "|---|---|---|", *rows])
    return f"{table if rows else f'{head}: none.'}\n\nAll settings are in the artifact `config.json`."


_KINDS = ("corpus", "pretrain", "embed", "classify", "perturb", "compare", "tune")


def _output_note(config: Config) -> str:
    """The description of an output's run: its finished stages."""
    rows = []
    for folder in _KINDS:
        record = artifacts.find(files.join(config.output, folder))
        if record is not None:
            counts = [f"{v:,} {k.replace('_', ' ')}" for k, v in record.counts.items() if isinstance(v, int)]
            rows.append(f"| {folder} | {', '.join(counts[:4])} | {record.created[:16].replace('T', ' ')} |")
    stages_ = (
        "\n".join(["| finished | counts | begun (UTC) |", "|---|---|---|", *rows])
        if rows
        else "No stage has finished yet."
    )
    return redact(
        f"Output `{config.output}`, recipe `{config.recipe}`.\n\n{stages_}\n\nThe runs below this one are its stages."
    )


def _config_text(config: Config) -> str:
    return redact(json.dumps(to_dict(config), indent=1)) + "\n"


def _without_user(where: str) -> str:
    scheme, _, address = where.partition("://")
    return f"{scheme}://{address.rpartition('@')[2].rstrip('/')}"


def _page(where: str, experiment: str, run: str) -> str:
    """URL of a run's page on a tracking server, without user name and password; "" for a database."""
    if where.partition("://")[0] not in ("http", "https"):
        return ""
    return f"{_without_user(where)}/#/experiments/{experiment}/runs/{run}?{TRAINING_PAGES}"


def _artifacts(where: str, output: str) -> str:
    """Folder for files of a database: beside it if it is a file, else beside the output; empty for a server, which has its own."""
    if where.partition("://")[0] in ("http", "https") or where.startswith("databricks"):
        return ""
    if where.startswith(SQLITE):
        return sqlite_artifacts(where)
    return files.join(output.rstrip("/").rpartition("/")[0], "mlflow-artifacts")
