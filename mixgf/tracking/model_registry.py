"""Published models in MLflow's registry: each is a version of a registered model, which MLflow can also serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixgf.errors import UserError
from mixgf.redact import redact
from mixgf.storage import model_store
from mixgf.tracking import packaged_model
from mixgf.tracking.store import SQLITE, client_of, require_store, sqlite_artifacts

EXPERIMENT = "mixgf-models"
"""Experiment of the runs that pushed models."""


def push(where: str, name: str, folder: str, *, kind: str, card: str) -> str:
    """Make a model's folder a new version of a registered model; returns its URI.

    Args:
        where: The tracker.
        name: Of the registered model.
        folder: Of the model (`model_store`), on this machine.
        kind: `encoder` or `classifier`: what MLflow serves of it.
        card: Model card, as Markdown.

    Raises:
        UserError: the tracker is none, or does not answer.
    """
    from mlflow.exceptions import MlflowException

    require_store(where, "place")
    client = client_of(where)
    try:
        found = client.get_experiment_by_name(EXPERIMENT)
        # a database of one file has its artifacts beside it; a server has a place of its own
        beside = sqlite_artifacts(where) if where.startswith(SQLITE) else None
        experiment = (
            found.experiment_id if found is not None else client.create_experiment(EXPERIMENT, artifact_location=beside)
        )
        run = client.create_run(experiment, run_name=f"push {name}", tags={"mixgf.stage": "push"})
        described = packaged_model.published(folder, kind, card)
        number = packaged_model.log(client, experiment, [run.info.run_id], name, described)
        server = where.startswith(("http://", "https://"))
        version = packaged_model.register(client, name, number, run_id=run.info.run_id, card=card, server=server)
        client.set_terminated(run.info.run_id)
    except MlflowException as error:
        raise UserError(_told(where, error)) from None
    return f"models:/{name}/{version}"


def pull(where: str, name: str, version: str, to: str) -> str:
    """Download a version of a registered model into a folder of this machine; returns the model's folder.

    Args:
        where: The tracker.
        name: Of the registered model.
        version: Its number; empty = the newest.
        to: An empty folder.

    Raises:
        UserError: there is no such model, or it was not pushed by mixgf.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    require_store(where, "place")
    client = client_of(where)
    try:
        versions = [one for one in client.search_model_versions(f"name='{name}'") if version in ("", str(one.version))]
        if not versions:
            msg = f"{name}{'@' + version if version else ''}: no such model in the registry of this tracker; `mixgf push {name}` makes one"
            raise UserError(msg)
        newest = max(versions, key=lambda one: int(one.version))
        source = _source(client, newest)
        path = download_artifacts(artifact_uri=source, dst_path=to, tracking_uri=where)
    except MlflowException as error:
        raise UserError(_told(where, error)) from None
    folder = Path(path) / "artifacts" / "run"  # where MLflow puts what `packaged_model.save` names `run`
    if not (folder / model_store.MANIFEST).exists():
        msg = f"{name}: version {newest.version} of the registry was not made by `mixgf push`"
        raise UserError(msg)
    return str(folder)


def _source(client: Any, version: Any) -> str:
    """Where the files of a version are: those of the logged model that it came from, if there is one."""
    number = (version.source or "").removeprefix("models:/") if (version.source or "").startswith("models:/m-") else ""
    return str(client.get_logged_model(number).artifact_location) if number else str(version.source)


def _told(where: str, error: Exception) -> str:
    return f"MLflow at {redact(where)}: {str(error).splitlines()[0][:300]}"
