"""Models in MLflow: loaded without unpickling, they answer as the Python API does."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from fault_proxy import Proxy, Rule
from invented import untrained_checkpoint
from mlflow.tracking import MlflowClient
from processes import mlflow_server

import mixgf as mg
from mixgf.config.classification import Classify
from mixgf.config.data import QC, Source, Tokens
from mixgf.config.run import Config, Inputs, Tracking
from mixgf.config.training import Model, Train
from mixgf.execution import LocalExecutor
from mixgf.stages import classify, prepare
from mixgf.storage import files
from mixgf.tracking import mlflow_runs, packaged_model

SMALL = Model(num_layers=1, dim=16, num_heads=2, ffn_dim=16, max_positions=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tracking_uri):
    """A run on cells of the bundled file whose encoder is not trained; its classifier is kept and registered."""
    folder = tmp_path_factory.mktemp("served")
    cells = mg.datasets.pancreas()
    names = ("alpha cell", "beta cell", "ductal cell")
    rows = np.concatenate([np.flatnonzero(cells.obs["cell_type"] == name)[:30] for name in names])
    cells[rows].copy().write_h5ad(folder / "cells.h5ad")
    made = Config(
        output=str(folder / "run"), model=SMALL, tokens=Tokens(max_len=32), train=Train(micro_tokens=2048),
        qc=QC(method="none", drop_duplicates=False), tracking=Tracking(uri=tracking_uri, experiment="served", register="islet"),
        sources=(Source(uri=str(folder / "cells.h5ad"), species="human", name="islet"),),
        classify=Classify(group="source", splits=("random",), models=("probe",)),
    )  # fmt: skip
    prepare.run(made, executor=LocalExecutor())
    untrained_checkpoint(made, SMALL)
    classify.run(made, executor=LocalExecutor())
    return made


@pytest.fixture
def _tracker(tracking_uri, monkeypatch):
    mlflow.set_tracking_uri(tracking_uri)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    yield
    mlflow.set_tracking_uri(None)


@pytest.mark.usefixtures("_tracker")
def test_a_registered_classifier_answers_on_a_file_as_annotate_does_and_nothing_is_unpickled(run, tracking_uri):
    file = str(Path(run.output).parent / "cells.h5ad")
    model = mlflow.pyfunc.load_model("models:/islet-islet/1")
    answer = model.predict(pd.DataFrame({"path": [file, file]}))
    mine = mg.load_classifier(run.output).annotate(file)
    assert len(answer) == 2 * len(mine) == 180
    assert answer["cell"][:90].tolist() == mine.index.tolist()
    assert answer["label"][90:].tolist() == mine["mixgf_label"].tolist()
    np.testing.assert_array_equal(answer["probability"][:90], mine["mixgf_probability"])
    assert {c.name for c in model.metadata.signature.outputs} == set(answer.columns)
    version = MlflowClient(tracking_uri).get_model_version("islet-islet", "1")
    assert version.description.startswith("# Cell types of islet")
    for part in ("## Data", "## Scores", "## Limits", "alpha cell"):
        assert part in version.description
    client = MlflowClient(tracking_uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    output = client.get_run(version.run_id).data.tags["mlflow.parentRunId"]
    logged = client.search_logged_models(experiments, f"source_run_id = '{output}'")
    assert [one.name for one in logged] == ["classifier-islet"], (
        "MLflow's table of runs shows a model in the row of its source"
    )
    assert json.loads(logged[0].tags["mlflow.modelVersions"]) == [{"name": "islet-islet", "version": "1"}]
    for made_by in (version.run_id, output):
        assert [one.model_id for one in client.get_run(made_by).outputs.model_outputs] == [logged[0].model_id]
    assert {m.key for m in logged[0].metrics} == {"test/accuracy", "test/macro_f1"}


@pytest.mark.usefixtures("_tracker")
def test_an_encoder_gives_the_vectors_of_embed_and_one_logging_is_enough(run, tracking_uri):
    file = str(Path(run.output).parent / "cells.h5ad")
    described = packaged_model.encoder(f"{run.output}/pretrain", f"{run.output}/corpus", "# Card", {"loss/total": 3.0})
    with mlflow_runs.stage(run, "pretrain", {}, "an encoder") as tracked:
        versions = [tracked.register("islet", described) for _ in range(2)]
    assert versions == ["1", "1"]
    answer = mlflow.pyfunc.load_model("models:/islet/1").predict(pd.DataFrame({"path": [file]}), params={"layer": "X"})
    np.testing.assert_array_equal(np.array(answer["vector"].tolist(), np.float32), mg.load(run.output).embed(file))
    outputs = MlflowClient(tracking_uri).get_run(tracked.id).outputs.model_outputs
    assert len(outputs) == 1


class StopsAt:
    """A client of MLflow that stops when a number of requests that change something are done; `after`: the last one counts."""

    def __init__(self, client, number, *, after):
        self.client, self.left, self.after = client, number, after

    def __getattr__(self, name):
        call = getattr(self.client, name)
        if not name.startswith(("create", "log_", "finalize")):
            return call

        def counted(*args, **kwargs):
            self.left -= 1
            if self.left < 0 and not self.after:
                raise KeyboardInterrupt
            made = call(*args, **kwargs)
            if self.left < 0:
                raise KeyboardInterrupt
            return made

        return counted


def test_a_model_whose_logging_stopped_at_any_request_is_completed_by_the_next_and_is_one(
    tracking_uri, tmp_path, monkeypatch
):
    client = MlflowClient(tracking_uri)
    experiment = client.create_experiment("stopped logging", artifact_location=str(tmp_path))
    scores = {"test/accuracy": 0.5, "test/macro_f1": 0.25}
    described = packaged_model.classifier(str(tmp_path / "none"), "# Card", scores)
    monkeypatch.setattr(
        packaged_model, "save", lambda folder, *_: (folder.mkdir(), (folder / "MLmodel").write_text(""))
    )
    stops = 0
    for after in (False, True):
        for number in range(20):
            runs = [client.create_run(experiment).info.run_id for _ in range(2)]
            try:
                packaged_model.log(StopsAt(client, number, after=after), experiment, runs, "one", described)
                break
            except KeyboardInterrupt:
                stops += 1
            for _ in range(2):
                ident = packaged_model.log(client, experiment, runs, "one", described)
            (made,) = client.search_logged_models([experiment], f"source_run_id = '{runs[1]}'")
            assert (made.model_id, str(made.status)) == (ident, "READY"), number
            assert {metric.key: metric.value for metric in made.metrics} == scores, number
            assert {key: len(client.get_metric_history(runs[0], key)) for key in scores} == dict.fromkeys(scores, 1)
            for run_id in runs:
                assert [one.model_id for one in client.get_run(run_id).outputs.model_outputs] == [ident], number
            assert len(client.list_logged_model_artifacts(ident)) == 1
    assert stops == 2 * 7, "create, files, two scores, two runs, ready"


@pytest.fixture
def server(tmp_path):
    with mlflow_server(tmp_path / "mlflow") as url:
        yield url


def test_a_slow_server_gets_several_files_of_a_model_at_a_time_and_all_of_them(server, tmp_path, monkeypatch):
    def save(folder, *_):
        for name in ("MLmodel", *(f"code/mixgf/{k}/{n}.py" for k in range(4) for n in range(10))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)

    monkeypatch.setattr(packaged_model, "save", save)
    late = 0.5
    with Proxy(server.removeprefix("http://"), [Rule("delay", "^PUT ", seconds=late)]) as proxy:
        client = MlflowClient(proxy.url)
        experiment = client.create_experiment("slow server")
        runs = [client.create_run(experiment).info.run_id]
        began = time.monotonic()
        described = packaged_model.classifier(str(tmp_path / "none"), "# Card", {})
        ident = packaged_model.log(client, experiment, runs, "one", described)
        took = time.monotonic() - began
        sent = [one.what for one in proxy.passed if one.what.startswith("PUT ")]
        assert len(sent) == 41
        assert took < 41 * late / 2, "one at a time"
    made = MlflowClient(server).get_logged_model(ident).artifact_location
    found = Path(mlflow.artifacts.download_artifacts(made, tracking_uri=server))
    assert (found / "code/mixgf/3/9.py").read_text() == "code/mixgf/3/9.py"
    assert len(list(found.rglob("*.py"))) == 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_live_server_has_runs_data_sets_and_a_registered_model_that_answers(run, server, tmp_path, monkeypatch):
    corpus, checkpoint = f"{run.output}/corpus", f"{run.output}/pretrain"
    there = replace(
        run, output=str(tmp_path / "there"), inputs=Inputs(corpus=corpus, checkpoint=checkpoint),
        tracking=Tracking(uri=server, experiment="live", register="live"),
    )  # fmt: skip
    classify.run(there, executor=LocalExecutor())
    client = MlflowClient(server)
    ident = client.get_experiment_by_name("live").experiment_id
    runs = {one.info.run_name: one for one in client.search_runs([ident])}
    assert {one.info.status for one in runs.values()} == {"FINISHED"}
    stage, output = runs["classify"], runs["there"]
    assert stage.data.tags["mlflow.parentRunId"] == output.info.run_id
    assert [one.tags[0].value for one in output.inputs.dataset_inputs] == ["corpus"]
    below = [one for one in runs.values() if one.data.tags.get("mlflow.parentRunId") == stage.info.run_id]
    assert below
    assert all(0 <= one.data.metrics["macro_f1"] <= 1 for one in below)
    (logged,) = client.search_logged_models([ident], f"source_run_id = '{output.info.run_id}'")
    assert str(logged.status) in ("READY", "LoggedModelStatus.READY")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(server)
    try:
        file = str(Path(run.output).parent / "cells.h5ad")
        answer = mlflow.pyfunc.load_model("models:/live-islet/1").predict(pd.DataFrame({"path": [file]}))
    finally:
        mlflow.set_tracking_uri(None)
    assert answer["label"].tolist() == mg.load_classifier(there.output).annotate(file)["mixgf_label"].tolist()


def test_a_model_folder_has_code_card_and_versions_and_no_pickle(run, tmp_path):
    packaged_model.save(
        tmp_path / "m", packaged_model.classifier(f"{run.output}/classify/classifiers/islet", "# Card", {})
    )
    names = {p.relative_to(tmp_path / "m").as_posix() for p in (tmp_path / "m").rglob("*") if p.is_file()}
    assert {"MLmodel", "README.md", "requirements.txt", "served_model.py", "code/mixgf/api.py"} <= names
    assert not any(name.endswith((".pkl", ".pickle", ".h5ad")) for name in names)
    lines = (tmp_path / "m" / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch==") and "+" not in line for line in lines)
    assert any(line.startswith("anndata==") for line in lines)


def test_a_classifier_in_object_storage_is_packed_like_one_on_disk_whatever_lies_beside_it(run, s3_bucket, tmp_path):
    """Its folder holds folders, too, while a stage goes on: a lease, costs, checkpoints."""
    local, there = f"{run.output}/classify/classifiers/islet", f"{s3_bucket}/islet"
    for name in files.names_in(local):
        files.copy(f"{local}/{name}", f"{there}/{name}")
    files.write_bytes(f"{there}/steps/00000005/state.json", b"{}")
    found = []
    for name, uri in (("local", local), ("there", there)):
        packaged_model.save(tmp_path / name, packaged_model.classifier(uri, "# Card", {}))
        kept = tmp_path / name / "artifacts" / "run"
        found.append({p.relative_to(kept).as_posix(): p.read_bytes() for p in kept.rglob("*") if p.is_file()})
    assert found[0] == found[1]
    assert {"record.json", "model.safetensors", "classifier.json", "vocabulary.parquet"} <= set(found[0])


def test_a_folder_of_code_and_weights_answers_without_the_installed_package(run, tmp_path):
    """As `mlflow models serve` has it: another process, elsewhere, with the model's own code."""
    packaged_model.save(
        tmp_path / "m", packaged_model.encoder(f"{run.output}/pretrain", f"{run.output}/corpus", "", {})
    )
    file = str(Path(run.output).parent / "cells.h5ad")
    code = (
        "import sys, mlflow.pyfunc, pandas as pd; m = mlflow.pyfunc.load_model(sys.argv[1]); "
        "import mixgf; print(mixgf.__file__); print(len(m.predict(pd.DataFrame({'path': [sys.argv[2]]}))))"
    )
    import os

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m"), file], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    where, number = done.stdout.split()
    assert where == str(tmp_path / "m" / "code" / "mixgf" / "__init__.py")
    assert number == "90"
