"""An encoder or a kept classifier as an MLflow model: weights as safetensors, and code instead of a pickle ("models from code").

`mlflow.pyfunc.load_model(URI).predict(frame)` takes a frame with one column `path`, the files of raw counts, and returns one row
per cell (`mixgf.served_model`). The model folder holds the code of mixgf, without the bundled cells, and lists its dependencies
in the versions that are installed here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mixgf
from mixgf.storage import artifacts, files

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

ENCODER, CLASSIFIER = "encoder", "classifier"
"""Kinds of models."""
SENDERS = 8
"""Files of a model that are sent to a server at a time: most of the time of a small request is waiting."""
_CODE = Path(mixgf.__file__).parent
_SERVED = _CODE / "served_model.py"
_DATA = shutil.ignore_patterns("__pycache__", "*.h5ad")


def encoder(uri: str, corpus: str, card: str, metrics: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The plain description of a checkpoint as a model.

    Args:
        uri: Of the checkpoint.
        corpus: Of a corpus with its vocabulary.
        card: Model card, as Markdown.
        metrics: Scores of the model, by name.
    """
    return {"kind": ENCODER, "uri": uri, "corpus": corpus, "card": card, "metrics": dict(metrics or {})}


def classifier(uri: str, card: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The plain description of a kept classifier as a model; arguments as of `encoder`."""
    return {"kind": CLASSIFIER, "uri": uri, "card": card, "metrics": dict(metrics)}


def published(folder: str, kind: str, card: str) -> dict[str, Any]:
    """The plain description of a published model (`model_store`): its whole folder. `kind`: what MLflow serves of it."""
    return {"kind": kind, "uri": folder, "card": card, "metrics": {}, "whole": True}


def log(client: MlflowClient, experiment: str, runs: Sequence[str], name: str, model: Mapping[str, Any]) -> str:
    """Log a model as an output of runs, once; returns its id. One that was logged in part is completed.

    Its scores are metrics of the first run. The last one is its source: MLflow's page of runs shows a model in the row of its
    source only.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    run_id, source = runs[0], runs[-1]
    record = artifacts.find(model["uri"])
    tags = {"mixgf.kind": model["kind"], "mixgf.fingerprint": record.fingerprint if record is not None else ""}
    found = client.search_logged_models([experiment], f"name = '{name}' AND source_run_id = '{source}'")
    mine = [one for one in found if one.tags.get("mixgf.fingerprint") == tags["mixgf.fingerprint"]]
    mine.sort(key=_is_ready, reverse=True)
    made = mine[0] if mine else client.create_logged_model(
        experiment, name=name, source_run_id=source, model_type=f"mixgf {model['kind']}",
        tags=tags | {"mlflow.note.content": model["card"]},
    )  # fmt: skip
    ident, ready = str(made.model_id), _is_ready(made)
    if not ready:
        with tempfile.TemporaryDirectory(prefix="mixgf-model-") as scratch:
            folder = Path(scratch) / "model"
            save(folder, model, Model(run_id=run_id, model_uuid=ident, model_id=ident))
            _send(client, made, folder)
    have = {metric.key for metric in made.metrics or () if metric.run_id == run_id}
    for name_ in sorted(model["metrics"].keys() - have):
        client.log_metric(run_id, name_, float(model["metrics"][name_]), step=0, model_id=ident)
    for one in runs:
        outputs = client.get_run(one).outputs
        if ident not in [output.model_id for output in (outputs.model_outputs if outputs is not None else ())]:
            client.log_outputs(one, [LoggedModelOutput(ident, step=0)])
    if not ready:
        client.finalize_logged_model(ident, "READY")  # last: a model that is ready is whole
    return ident


def _send(client: MlflowClient, model: LoggedModel, folder: Path) -> None:
    """Send the files of a model's folder. To a server each is a request, of which MLflow would send one at a time."""
    if not model.artifact_location.startswith("mlflow-artifacts:"):
        client.log_model_artifacts(model.model_id, str(folder))
        return

    def send(path: Path) -> None:
        inside = path.relative_to(folder).parent.as_posix()
        client.log_model_artifact(model.model_id, str(path), None if inside == "." else inside)

    with ThreadPoolExecutor(SENDERS) as pool:
        sent = [pool.submit(send, path) for path in sorted(folder.rglob("*")) if path.is_file()]
        try:
            for one in sent:
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_ready(model: Any) -> bool:
    return str(model.status) in ("READY", "LoggedModelStatus.READY")


def register(client: MlflowClient, name: str, model_id: str, *, run_id: str, card: str, server: bool) -> str:
    """Make a logged model a version of a registered one, once; returns the version. `server`: the tracker is one."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    with contextlib.suppress(MlflowException):  # it exists; an unreachable registry fails below
        client.create_registered_model(name)
    logged = client.get_logged_model(model_id)
    folder = logged.artifact_location
    there = [
        one for one in client.search_model_versions(f"name='{name}'") if one.source in (folder, f"models:/{model_id}")
    ]
    if there:
        version = str(there[0].version)
    else:
        # a server follows the link to the logged model; a database looks for it at the tracker of the process, not at its own
        source = f"models:/{model_id}" if server else folder
        made = client.create_model_version(name, source, run_id=run_id, description=card, model_id=model_id)
        version = str(made.version)
    if not server:  # which links the two itself
        mine, versions = {"name": name, "version": version}, json.loads(logged.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
        if mine not in versions:
            client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*versions, mine])})
    return version


def save(folder: Path, model: Mapping[str, Any], described: Any = None) -> None:
    """Write a model folder.

    Args:
        folder: That does not exist.
        model: From `encoder` or `classifier`.
        described: `mlflow.models.Model` to fill; None = a new one.
    """
    import mlflow.pyfunc

    with tempfile.TemporaryDirectory(prefix="mixgf-model-") as scratch:
        run, code = Path(scratch) / "run", Path(scratch) / "mixgf"
        _fetch(model, run)
        shutil.copytree(_CODE, code, ignore=_left_out)
        mlflow.pyfunc.save_model(
            str(folder), python_model=str(_SERVED), artifacts={"run": str(run)}, code_paths=[str(code)],
            signature=signature(str(model["kind"])), pip_requirements=requirements(), mlflow_model=described,
            model_config={"kind": model["kind"]}, metadata={"mixgf": mixgf.__version__, "kind": model["kind"]},
        )  # fmt: skip
    (folder / "README.md").write_text(model["card"])


def _left_out(folder: Any, names: list[str]) -> set[str]:
    """Files of the package that a model does not need: bundled cells and models."""
    return set(_DATA(folder, names)) | ({"models"} if Path(folder).name == "resources" else set())


def _fetch(model: Mapping[str, Any], to: Path) -> None:
    """Copy what the model needs into a folder that `mixgf.api.load` or `load_classifier` takes."""
    parts: dict[str, tuple[str, list[str]]]
    if model.get("whole"):
        parts = {"": (model["uri"], files.names_in(model["uri"]))}
    elif model["kind"] == CLASSIFIER:
        record = artifacts.find(model["uri"])
        assert record is not None, "a kept classifier is finished"
        parts = {"": (model["uri"], ["record.json", *record.files])}
    else:
        weights = [n for n in files.list_dir(model["uri"]) if n in ("record.json", "model.safetensors")]
        parts = {
            "pretrain": (model["uri"], weights),
            "corpus": (model["corpus"], ["record.json", "vocabulary.parquet"]),
        }
    for folder, (uri, names) in parts.items():
        for name in names:
            with files.local_copy(files.join(uri, name)) as path:
                (to / folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to / folder / name)


def signature(kind: str) -> ModelSignature:
    """Inputs, outputs and parameters of `predict`."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text, real = DataType.string, DataType.double
    outputs: list[Any] = [ColSpec(text, "path"), ColSpec(text, "cell")]
    if kind == ENCODER:
        outputs.append(ColSpec(Array(real), "vector"))
    else:
        named = {"label": text, "probability": real, "second": text, "second_probability": real, "entropy": real}
        named |= {"distance": real, "genes": DataType.long, "trusted": DataType.boolean, "doubt": text}
        outputs += [ColSpec(of, name) for name, of in named.items()]
    params = [ParamSpec(name, text, default) for name, default in (("layer", "X"), ("genes", ""), ("species", ""))]
    return ModelSignature(Schema([ColSpec(text, "path")]), Schema(outputs), ParamSchema(params))


def requirements() -> list[str]:
    """The dependencies of mixgf in the versions that are installed, as lines of a requirements file."""
    try:
        wanted = importlib.metadata.requires("mixgf") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was not installed
        return []
    lines = []
    for line in wanted:
        found = re.match(r"(?P<name>[\w.\-]+)(?P<extras>\[[\w,\- ]+\])?", line)
        if found is None or "extra ==" in line:
            continue
        version = importlib.metadata.version(found["name"]).partition("+")[0]
        lines.append(f"{found['name']}{found['extras'] or ''}=={version}")
    return lines
