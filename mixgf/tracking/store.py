"""What can be done at a tracker, as operations on MLflow's client. Each may be done twice: the second time changes nothing.

Runs are known by keys that mixgf makes, so that operations can be written down while a tracker is down.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from mixgf import proxies
from mixgf.errors import UserError
from mixgf.redact import is_redacted, redact
from mixgf.storage import files
from mixgf.tracking import packaged_model
from mixgf.tracking.delivery import Operation, Rejected

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

# the signature of a model is given; here, because filters that a thread sets do not last
warnings.filterwarnings("ignore", "(?s).*An input example was not provided")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the stage prints the one line that is useful
os.environ.setdefault(
    "MLFLOW_HTTP_REQUEST_TIMEOUT", "20"
)  # seconds; MLflow's own 120 with 7 tries is a quarter of an hour
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
SQLITE = "sqlite:///"
OFF = "off"
"""Value of `tracking.uri` without tracking: MLflow is not imported, and nothing is logged."""
KEY, PARENT = "mixgf.key", "mlflow.parentRunId"
KIND, MODEL_TRAINING = "mlflow.experimentKind", "custom_model_development"
"""Tag of an experiment by which MLflow's pages show it as one of model training, not of language models."""
VIEW_KEY = "mixgf"
VIEW = f"mlflow.sharedViewState.{VIEW_KEY}"
"""Tag of an experiment with a shared view of the table of runs: the columns that are shown at first."""
COLUMNS = (
    ("attributes", "Dataset"),
    ("attributes", "Models"),
    ("metrics", "prepare/cells/kept"),
    ("metrics", "pretrain/loss/total"),
    ("metrics", "classify/kept/macro_f1"),
    ("metrics", "loss/total"),
    ("metrics", "score"),
)
"""Figures of outputs, then of trainings and of the trials of a sweep."""
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")
_NOT_ALLOWED = re.compile(r"[^\w\-. /:]")  # in names of parameters and metrics
_LATER = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED")
"""Error codes of MLflow after which the same request may work another time."""
BATCH = 1000
"""Metrics in one request: MLflow's limit."""


def require_store(uri: str, field: str) -> None:
    """Refuse a URI that is no tracker.

    Raises:
        UserError: It is a plain folder, which MLflow takes no longer, or of an unknown scheme, or its password is missing.
    """
    scheme, separator, _ = uri.partition("://")
    name = scheme.partition("+")[0].lower() if separator else uri
    if is_redacted(uri):
        msg = f"{field} = {uri!r}: its password was removed when the config was written; set MLFLOW_TRACKING_URI to the whole URI"
        raise UserError(msg)
    if (separator and name in _SCHEMES) or uri in ("databricks", OFF):
        return
    if name == "file" or not separator:
        folder = uri.removeprefix("file://") or "mlruns"
        msg = (f"{field} = {uri!r}: MLflow keeps runs in plain folders no longer; give a server (http://HOST:5000) or a database "
               f"(sqlite:///{folder.rstrip('/')}/mlflow.db), or leave it empty")  # fmt: skip
        raise UserError(msg)
    msg = f"{field} = {redact(uri)!r}: MLflow has no store of this scheme; give a server (http://HOST:5000) or a database (sqlite:///FILE.db)"
    raise UserError(msg)


def client_of(uri: str) -> MlflowClient:
    """MLflow's client. MLflow is imported here, because the import takes seconds and most processes never log."""
    from mlflow.tracking import MlflowClient

    proxies.go_past(uri)
    for name in ("mlflow", "alembic"):  # after the import, which sets their levels
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in (
        "urllib3.connectionpool",
        "mlflow.system_metrics",
    ):  # a tracker that is down is told once, by `Delivery`
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(uri)


def sqlite_uri(path: str) -> str:
    """URI of a SQLite database. SQLAlchemy reads `%` and `?` of a path as marks of a URL from version 2.1 on."""
    return f"{SQLITE}{path.replace('%', '%25').replace('?', '%3F') if _paths_are_quoted() else path}"


def sqlite_path(uri: str) -> str:
    """Path of the database of `sqlite_uri`."""
    path = uri.removeprefix(SQLITE)
    return unquote(path) if _paths_are_quoted() else path


def sqlite_artifacts(uri: str) -> str:
    """Folder beside the database of `sqlite_uri`, for the files of its runs."""
    folder = f"{sqlite_path(uri).removesuffix('.db')}-artifacts"
    return Path(folder).absolute().as_uri() if "%" in folder else folder  # MLflow decodes a path as it decodes a URI


def _paths_are_quoted() -> bool:
    major, minor = version("sqlalchemy").split(".")[:2]  # MLflow brings it
    return (int(major), int(minor)) >= (2, 1)


def make_database(uri: str) -> None:
    """Make a local SQLite database that is not there, or that was never finished, in one step.

    MLflow makes its tables one by one. A process that is killed meanwhile would leave a database that MLflow can neither use
    nor finish. So they are made in a file of another name, which is renamed.
    """
    if not uri.startswith(SQLITE) or "?" in uri:
        return
    path = Path(sqlite_path(uri))
    if _is_whole(path):
        return
    scratch = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        client_of(sqlite_uri(str(scratch))).search_experiments(max_results=1)
        with sqlite3.connect(scratch) as found:
            found.execute("pragma wal_checkpoint(truncate)")
        if path.exists() and not _is_whole(path):
            path.unlink()  # a database without a version holds no run
        with suppress(FileExistsError):  # another process was faster
            os.link(scratch, path)
    finally:
        for name in (scratch, *(scratch.with_name(scratch.name + end) for end in ("-wal", "-shm", "-journal"))):
            name.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Whether a file is a database in which MLflow has made its tables: their version is written last."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(path, timeout=60)) as found:
            tables = [name for (name,) in found.execute("select name from sqlite_master where type = 'table'")]
            return not tables or bool(found.execute("select count(*) from alembic_version").fetchone()[0])
    except sqlite3.OperationalError as error:
        return "no such table" not in str(error)
    except sqlite3.DatabaseError:
        return True  # not ours to remove


class Store:
    """One tracker, used by one thread."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._made: MlflowClient | None = None
        self._runs: dict[str, tuple[str, str]] = {}
        self._monitors: dict[str, Any] = {}

    @property
    def client(self) -> MlflowClient:
        """MLflow's client; a SQLite database is made here."""
        if self._made is None:
            make_database(self._uri)
            self._made = client_of(self._uri)
        return self._made

    def answers(self) -> bool:
        """Whether a small request works."""
        try:
            self.client.search_experiments(max_results=1)
        except Exception:  # noqa: BLE001 (the question is whether there is any)
            return False
        return True

    def apply(self, operation: Operation) -> Any:
        """Do an operation.

        Raises:
            Rejected: The tracker refuses it, or it cannot be done at all.
        """
        from mlflow.exceptions import MlflowException

        arguments = {name: value for name, value in operation.items() if name != "do"}
        try:
            return getattr(self, f"do_{operation['do']}")(**arguments)
        except MlflowException as error:
            if error.error_code in _LATER:
                raise
            raise Rejected(str(error).splitlines()[0][:300]) from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise Rejected(f"{type(error).__name__}: {error}") from error

    def do_open(
        self, *, key: str, name: str, experiment: str, artifacts: str, parent: str, params: Mapping[str, Any],
        tags: Mapping[str, str], note: str, again: bool = True,
    ) -> list[str]:  # fmt: skip
        """Make a run, or continue the one of this key; returns the ids of the experiment and of the run.

        With `again` false, one that is there stays as it is.
        """
        client = self.client
        found = client.get_experiment_by_name(experiment)
        if found is None:
            ident = client.create_experiment(
                experiment, artifact_location=artifacts or None, tags={KIND: MODEL_TRAINING}
            )
        else:
            ident = found.experiment_id
            if KIND not in found.tags:
                client.set_experiment_tag(ident, KIND, MODEL_TRAINING)
        if found is None or VIEW not in found.tags:
            client.set_experiment_tag(ident, VIEW, _view())
        above = {PARENT: self._id(parent, ident)} if parent else {}
        runs = client.search_runs([ident], f"tags.`{KEY}` = '{key}'", max_results=1)
        if runs:
            run = runs[0]
            if not again:
                self._runs[key] = ident, run.info.run_id
                return [ident, run.info.run_id]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(ident, run_name=name, tags={KEY: key, **tags, **above})
        run_id = run.info.run_id
        self._runs[key] = ident, run_id
        wanted = {name: value for name, value in _named(params).items() if name not in run.data.params}
        client.log_batch(run_id, params=_params(wanted))
        if note:
            client.set_tag(run_id, "mlflow.note.content", note)
        return [ident, run_id]

    def do_end(self, *, key: str, status: str) -> None:
        """Say that a run has ended."""
        if (monitor := self._monitors.pop(key, None)) is not None:
            monitor.finish()
        self.client.set_terminated(self._id(key), status=status)

    def do_system(self, *, key: str) -> None:
        """Log the load of this machine until the run ends (MLflow's system metrics)."""
        from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        switch: Any = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
        if switch.is_set() and not switch.get():
            return
        make: Any = SystemMetricsMonitor
        monitor = make(self._id(key), resume_logging=True, tracking_uri=self._uri)
        monitor.start()
        self._monitors[key] = monitor

    def do_metrics(self, *, key: str, rows: Sequence[tuple[int, str, float]], when: int) -> None:
        """Log (step, name, value) rows, of a time in milliseconds; values that are not finite are left out."""
        finite, run_id = _metrics(rows, when), self._id(key)
        for i in range(0, len(finite), BATCH):
            self.client.log_batch(run_id, metrics=finite[i : i + BATCH])

    def do_missing(self, *, key: str, rows: Sequence[tuple[int, str, float]], when: int) -> None:
        """Log the rows whose metric has no value yet at their step."""
        run_id = self._id(key)
        names = dict.fromkeys(_clean(name) for _, name, _ in rows)
        have = {(m.step, name) for name in names for m in self.client.get_metric_history(run_id, name)}
        self.do_metrics(key=key, rows=[row for row in rows if (row[0], _clean(row[1])) not in have], when=when)

    def do_children(self, *, key: str) -> list[str]:
        """Keys of the finished runs under a run."""
        ident, run_id = self._run(key)
        found, token = [], None
        while True:
            page = self.client.search_runs([ident], f"tags.`{PARENT}` = '{run_id}'", max_results=1000, page_token=token)
            found += [run.data.tags.get(KEY, "") for run in page if run.info.status == "FINISHED"]
            token = page.token
            if not token:
                return found

    def do_child(
        self, *, parent: str, key: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, str], when: int
    ) -> None:  # fmt: skip
        """Log a finished piece of work as a run of its own; one that was logged in part is completed."""
        ident, parent_id = self._run(parent)
        found = self.client.search_runs(
            [ident], f"tags.`{PARENT}` = '{parent_id}' and tags.`{KEY}` = '{key}'", max_results=1
        )
        if found and found[0].info.status == "FINISHED":
            return
        made = found[0] if found else self.client.create_run(
            ident, run_name=name, tags={PARENT: parent_id, KEY: key, **tags}
        )  # fmt: skip
        rows = [(0, metric, value) for metric, value in metrics.items()]
        self.client.log_batch(made.info.run_id, params=_params(_named(params)), metrics=_metrics(rows, when))
        self.client.set_terminated(made.info.run_id)

    def do_inputs(self, *, key: str, datasets: Sequence[Mapping[str, Any]]) -> None:
        """Log data sets as inputs of a run; each has name, digest, source_type, source, schema, profile, context."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        run_id = self._id(key)
        there = self.client.get_run(run_id).inputs
        have = {(i.dataset.name, i.dataset.digest) for i in (there.dataset_inputs if there is not None else ())}
        made = [
            DatasetInput(
                Dataset(d["name"], d["digest"], d["source_type"], d["source"], d["schema"], d["profile"]),
                [InputTag(MLFLOW_DATASET_CONTEXT, d["context"])],
            )
            for d in datasets
            if (d["name"], d["digest"]) not in have
        ]
        if made:
            self.client.log_inputs(run_id, made)

    def do_tags(self, *, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        for name, value in tags.items():
            self.client.set_tag(self._id(key), name, value)

    def do_text(self, *, key: str, name: str, text: str) -> None:
        """Store text as an artifact; an earlier one of this name is replaced."""
        self.client.log_text(self._id(key), text, name)

    def do_table(self, *, key: str, name: str, text: str) -> None:
        """Store a table, as the JSON that MLflow's pages show as one."""
        self.do_text(key=key, name=name, text=text)
        run_id, tag = self._id(key), "mlflow.loggedArtifacts"
        listed = json.loads(self.client.get_run(run_id).data.tags.get(tag, "[]"))
        if (mine := {"path": name, "type": "table"}) not in listed:
            self.client.set_tag(run_id, tag, json.dumps([*listed, mine]))

    def do_files(self, *, key: str, uris: Sequence[str], folder: str) -> None:
        """Store files of the output, given by their URIs, as artifacts."""
        for uri in uris:
            if not files.exists(uri):
                continue  # removed since
            with files.local_copy(uri) as path, tempfile.TemporaryDirectory(prefix="mixgf-artifact-") as scratch:
                named = Path(scratch) / uri.rsplit("/", 1)[-1]
                named.symlink_to(path.absolute())
                self.client.log_artifact(self._id(key), str(named), folder or None)

    def do_model(self, *, key: str, above: str, name: str, model: Mapping[str, Any], register: str) -> str:
        """Log a model (`packaged_model`) as an output of a run and of the one above, and register it.

        Returns:
            The version, "" if it is not registered.
        """
        ident, run_id = self._run(key)
        made = packaged_model.log(self.client, ident, [run_id, *([self._id(above)] if above else [])], name, model)
        if not register:
            return ""
        server = self._uri.startswith(("http://", "https://"))
        return packaged_model.register(
            self.client, register, made, run_id=run_id, card=str(model["card"]), server=server
        )

    def do_sent(self, *, uri: str) -> None:
        """Remove a file of operations that were kept: they are all done."""
        files.remove(uri)

    def _id(self, key: str, experiment: str = "") -> str:
        return self._run(key, experiment)[1]

    def _run(self, key: str, experiment: str = "") -> tuple[str, str]:
        """Ids of experiment and run of a key."""
        if key not in self._runs:
            where = [experiment] if experiment else [e.experiment_id for e in self.client.search_experiments()]
            found = self.client.search_runs(where, f"tags.`{KEY}` = '{key}'", max_results=1)
            if not found:
                raise Rejected(f"no run with the tag {KEY} = {key}")
            self._runs[key] = found[0].info.experiment_id, found[0].info.run_id
        return self._runs[key]


def _view() -> str:
    """The state of MLflow's page of runs that `VIEW` shares."""
    return json.dumps({"selectedColumns": [f"{kind}.`{name}`" for kind, name in COLUMNS]})


def _clean(name: str) -> str:
    return _NOT_ALLOWED.sub("_", name)[:250]


def _named(params: Mapping[str, Any]) -> dict[str, str]:
    """Values as text; characters that MLflow does not allow in names become `_`."""
    return {_clean(name): redact(str(value))[:6000] for name, value in params.items()}


def _params(named: Mapping[str, str]) -> list[Param]:
    from mlflow.entities import Param

    return [Param(name, value) for name, value in named.items()]


def _metrics(rows: Sequence[tuple[int, str, float]], when: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(_clean(name), float(value), when, step) for step, name, value in rows if abs(value) < float("inf")]
