"""Models in MLflow: loaded without unpickling, they answer as the Python API does."""

import sys
from pathlib import Path

import mlflow
import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from invented import untrained_checkpoint
from mlflow.tracking import MlflowClient

import mixgf as mg
from mixgf.config.classification import Classify
from mixgf.config.data import QC, Source, Tokens
from mixgf.config.run import Config, Tracking
from mixgf.config.training import Model, Train
from mixgf.execution import LocalExecutor
from mixgf.stages import classify, prepare
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
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking_uri)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    yield
    mlflow.set_tracking_uri(before)


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
    logged = client.search_logged_models(experiments, f"source_run_id = '{version.run_id}'")
    assert [one.name for one in logged] == ["classifier-islet"]
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


def test_a_folder_of_code_and_weights_answers_without_the_installed_package(run, tmp_path):
    """As `mlflow models serve` has it: another process, elsewhere, with the model's own code."""
    import subprocess

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
