"""Runs in MLflow, one per stage.

The driver opens the run of a stage. Training workers log to it by its id, at checkpoints only: steps that are repeated after a
failure are then logged once. Metrics that a lost worker had not logged are added from history.parquet. Without
MLFLOW_TRACKING_URI the store is SQLite under the run's output.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixgf.config.parse import flat
from mixgf.config.run import Config
from mixgf.console import say
from mixgf.errors import UserError
from mixgf.storage import files

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `stage` prints the one line that is useful
_FINGERPRINT = "mixgf.fingerprint"
OFF = "off"
"""Value of `tracking.uri` without tracking: MLflow is not imported, and nothing is logged."""
_KEY, _PARENT = "mixgf.key", "mlflow.parentRunId"
_NOT_ALLOWED = re.compile(r"[^\w\-. /]")  # in names of parameters


def _client(where: str) -> MlflowClient:
    """MLflow's client. MLflow is imported here, because the import takes seconds and most workers never log."""
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # after the import, which sets their levels
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(where)


def uri(config: Config) -> str:
    """Where the run is tracked: `tracking.uri`, MLFLOW_TRACKING_URI, or SQLite beside the artifacts; `OFF` = nowhere."""
    chosen = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if chosen:
        return chosen
    folder = (
        files.local_path(config.output).absolute()
        if files.is_local(config.output)
        else files.local_path("mlflow").absolute()
    )
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def ui_command(config: Config) -> str:
    """The command that starts MLflow's web pages for this run."""
    return f"mlflow ui --backend-store-uri {uri(config)} --port 5000"


def page(config: Config, server: str = "http://127.0.0.1:5000") -> str:
    """URL of the experiment's runs on MLflow's server, in the view for model training."""
    experiment = _client(uri(config)).get_experiment_by_name(config.tracking.experiment)
    where = f"/experiments/{experiment.experiment_id}/runs" if experiment is not None else "/experiments"
    return f"{server}/#{where}?workflowType=machine_learning"


@dataclass(frozen=True, slots=True)
class Run:
    """A tracked run, safe to send to other processes; where `uri` is `OFF`, nothing is logged."""

    uri: str
    id: str

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log metrics at one step."""
        self.log_many([(step, name, value) for name, value in metrics.items()])

    def log_many(self, rows: list[tuple[int, str, float]]) -> None:
        """Log (step, name, value) rows in batches; values that are not finite are left out."""
        if self.uri == OFF:
            return
        finite = _metrics(rows)
        client = _client(self.uri)
        for i in range(0, len(finite), 1000):
            client.log_batch(self.id, metrics=finite[i : i + 1000])

    def log_missing(self, rows: list[tuple[int, str, float]]) -> None:
        """Log the (step, name, value) rows whose metric has no value yet at their step."""
        if self.uri == OFF:
            return
        client = _client(self.uri)
        names = dict.fromkeys(name for _, name, _ in rows)
        have = {(m.step, name) for name in names for m in client.get_metric_history(self.id, name)}
        self.log_many([row for row in rows if row[:2] not in have])

    def children(self) -> set[str]:
        """Keys of the runs under this one (`child`)."""
        if self.uri == OFF:
            return set()
        client, found, token = _client(self.uri), set(), None
        ident = client.get_run(self.id).info.experiment_id
        while True:
            page_ = client.search_runs([ident], f"tags.`{_PARENT}` = '{self.id}'", max_results=1000, page_token=token)
            found |= {run.data.tags[_KEY] for run in page_ if run.info.status == "FINISHED"}
            token = page_.token
            if not token:
                return found

    def child(self, name: str, key: str, params: dict[str, Any], metrics: dict[str, float]) -> None:
        """Log a finished piece of work as a run of its own under this one.

        Args:
            name: Shown as the run's name.
            key: Identifies it for the caller. A run that was only partly logged is completed under the same key.
            params: Flat or nested; nested ones get dotted names.
            metrics: Values that are not finite are left out.
        """
        if self.uri == OFF:
            return
        client = _client(self.uri)
        ident = client.get_run(self.id).info.experiment_id
        halves = client.search_runs(
            [ident], f"tags.`{_PARENT}` = '{self.id}' and tags.`{_KEY}` = '{key}'", max_results=1
        )
        tags = {_PARENT: self.id, _KEY: key, "mlflow.source.name": "mixgf"}
        run_id = (halves[0] if halves else client.create_run(ident, run_name=name, tags=tags)).info.run_id
        client.log_batch(
            run_id, params=_params(params),
            metrics=_metrics([(0, name, value) for name, value in metrics.items()]),
        )  # fmt: skip
        client.set_terminated(run_id)

    def artifact(self, path: str) -> None:
        """Store a local file with the run."""
        if self.uri == OFF:
            return
        _client(self.uri).log_artifact(self.id, path)

    def register(self, name: str, contents: Mapping[str, bytes], text: str) -> str:
        """Store files with the run and register them as a version of a model, once.

        Args:
            name: Of the model in MLflow's registry; created if it does not exist.
            contents: File name to content: weights, config, card.
            text: The version's description.

        Returns:
            The version; that of the first call if the run is registered already.

        Raises:
            UserError: Tracking is off.
        """
        if self.uri == OFF:
            msg = (
                "tune.register: needs MLflow, but tracking.uri = 'off'; set tracking.uri, or leave tune.register empty"
            )
            raise UserError(msg)
        from mlflow.exceptions import MlflowException

        client = _client(self.uri)
        with contextlib.suppress(MlflowException):  # it exists; an unreachable registry fails below
            client.create_registered_model(name)
        for version in client.search_model_versions(f"run_id='{self.id}'"):
            if version.name == name:
                return str(version.version)
        with tempfile.TemporaryDirectory(prefix="mixgf-model-") as folder:
            for file, content in contents.items():
                (Path(folder) / file).write_bytes(content)
            client.log_artifacts(self.id, folder, "model")
        source = f"{client.get_run(self.id).info.artifact_uri}/model"
        return str(client.create_model_version(name, source, run_id=self.id, description=text).version)


@contextlib.contextmanager
def stage(config: Config, name: str, params: dict[str, Any], fingerprint: str, parent: str = "") -> Iterator[Run]:
    """Open the run of one stage, or continue the unfinished run of the same fingerprint.

    Args:
        config: The whole config, for the tracking server and the experiment.
        name: Of the stage, shown as the run's name.
        params: Flat or nested parameters; nested ones get dotted names.
        fingerprint: Of the artifact that the stage makes; a restart with the same one continues the run.
        parent: Id of the run above this one.
    """
    where = uri(config)
    if where == OFF:
        yield Run(OFF, "")
        return
    client = _client(where)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is not None:
        ident = experiment.experiment_id
    else:
        ident = client.create_experiment(config.tracking.experiment, artifact_location=_artifacts(where))
    found = client.search_runs([ident], f"tags.`{_FINGERPRINT}` = '{fingerprint}'", max_results=1)
    tags = {_FINGERPRINT: fingerprint, "mixgf.output": config.output, "mlflow.source.name": "mixgf"}
    if parent:
        tags[_PARENT] = parent
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(ident, run_name=name, tags=tags).info.run_id
        client.log_batch(run_id, params=_params(params))
    if not parent and (shown := _page(where, ident, run_id)):
        say(f"{name}: {shown}")
    try:
        yield Run(where, run_id)
    except BaseException:
        client.set_terminated(run_id, status="FAILED")
        raise
    client.set_terminated(run_id)


def _page(where: str, experiment: str, run: str) -> str:
    """URL of a run's page on a tracking server, without user name and password; "" for a local store."""
    scheme, _, address = where.partition("://")
    return (
        f"{scheme}://{address.rpartition('@')[2].rstrip('/')}/#/experiments/{experiment}/runs/{run}"
        if scheme in ("http", "https")
        else ""
    )


def _params(params: dict[str, Any]) -> list[Param]:
    """MLflow's parameters. Nested ones get dotted names; characters that MLflow does not allow in names become `_`."""
    from mlflow.entities import Param

    named = {_NOT_ALLOWED.sub("_", name): str(value)[:6000] for name, value in flat(params).items()}
    return [Param(name, value) for name, value in named.items()]


def _metrics(rows: Iterable[tuple[int, str, float]]) -> list[Metric]:
    """MLflow's metrics with the present time, from (step, name, value) rows; values that are not finite are left out."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for step, name, value in rows if abs(value) < float("inf")]


def _artifacts(where: str) -> str | None:
    """Folder for files beside a SQLite store; None for a server, which has its own."""
    return (
        f"{where.removeprefix('sqlite:///').removesuffix('.db')}-artifacts" if where.startswith("sqlite:///") else None
    )
