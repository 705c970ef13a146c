"""Laws of tracking: one run per output with its stages below; a restarted stage continues its run; curves hold each step once."""

import json
from pathlib import Path

import mlflow.data
import pyarrow as pa
import pytest
from mlflow.tracking import MlflowClient

from mixgf import cli
from mixgf.config import recipes
from mixgf.config.parse import override
from mixgf.errors import UserError
from mixgf.redact import HIDDEN
from mixgf.storage import artifacts, files
from mixgf.tracking import mlflow_runs


@pytest.fixture
def config(tmp_path, tracking_uri):
    return override(recipes.get("demo"), [f"output={tmp_path}", f"tracking.uri={tracking_uri}", "train.lr=0.5"])


@pytest.fixture
def client(tracking_uri):
    return MlflowClient(tracking_uri)


def test_a_run_is_continued_by_fingerprint_and_its_state_is_told(config, client):
    def killed():
        params = {"train": {"lr": 1e-3}, "classify": {"merge": {"CD14+ monocyte": ["a", "b"]}}}
        with mlflow_runs.stage(config, "pretrain", params, "abc") as run:
            run.log({"loss/mlm": 9.5}, step=1)
            seen.append(run.id)
            raise RuntimeError("killed")

    seen = []
    with pytest.raises(RuntimeError, match="killed"):
        killed()
    assert client.get_run(seen[0]).info.status == "FAILED"
    with mlflow_runs.stage(config, "pretrain", {"train": {"lr": 1e-3}}, "abc") as again:
        again.log_many([(2, "loss/mlm", 9.0), (2, "bad", float("nan")), (3, "loss/mlm", 8.5)])
        again.files([str(Path(__file__))], "code")
    assert again.id == seen[0]
    done = client.get_run(seen[0])
    assert done.info.status == "FINISHED"
    assert done.data.params["train.lr"] == "0.001"
    assert done.data.params["classify.merge.CD14_ monocyte"] == '["a", "b"]'  # MLflow takes no + in a name
    assert [(m.step, m.value) for m in client.get_metric_history(seen[0], "loss/mlm")] == [(1, 9.5), (2, 9.0), (3, 8.5)]
    assert "bad" not in done.data.metrics
    assert [f.path for f in client.list_artifacts(seen[0], "code")] == [f"code/{Path(__file__).name}"]
    with mlflow_runs.stage(config, "pretrain", {}, "def") as other:
        assert other.id != seen[0]


def test_an_output_has_one_run_with_its_stages_below_and_another_output_has_another(config, client, tmp_path):
    made = []
    for output in (tmp_path, tmp_path, tmp_path / "sets" / "part", tmp_path.parent / f"{tmp_path.name}-other"):
        with mlflow_runs.stage(override(config, [f"output={output}"]), "pretrain", {}, f"print{len(made)}") as run:
            run.summary({"loss/total": 7.0 + len(made)})
            run.summary({"curve": 1.0}, own=False)
            made.append(client.get_run(run.id))
    above = [run.data.tags["mlflow.parentRunId"] for run in made]
    assert above[0] == above[1] == above[2] != above[3]
    parent = client.get_run(above[0])
    assert parent.info.run_name == tmp_path.name
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"pretrain/loss/total": 9.0, "pretrain/curve": 1.0}
    assert client.get_run(made[0].info.run_id).data.metrics == {"loss/total": 7.0}
    assert "mlflow.parentRunId" not in parent.data.tags


def test_the_same_plan_in_another_output_or_in_one_made_anew_is_another_run(config, client, tmp_path):
    seen = set()
    for output in ("a", "b"):
        for _ in range(2):
            with mlflow_runs.stage(override(config, [f"output={tmp_path}/{output}"]), "embed", {}, "same") as run:
                seen.add(run.id)
    assert len(seen) == 2
    files.remove(f"{tmp_path}/a")
    with mlflow_runs.stage(override(config, [f"output={tmp_path}/a"]), "embed", {}, "same") as run:
        assert run.id not in seen


def test_an_experiment_is_one_of_model_training_with_columns_that_are_shown_at_first(config, client):
    with mlflow_runs.stage(config, "pretrain", {}, "kind") as run:
        ident = client.get_run(run.id).info.experiment_id
    tags = client.get_experiment(ident).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert "metrics.`pretrain/loss/total`" in json.loads(tags["mlflow.sharedViewState.mixgf"])["selectedColumns"]
    assert mlflow_runs.page(config) == (
        f"http://127.0.0.1:5000/#/experiments/{ident}/runs?viewStateShareKey=mixgf&workflowType=machine_learning"
    )


def test_settings_that_differ_from_the_recipe_come_first_and_the_rest_is_an_artifact(config, client):
    with mlflow_runs.stage(
        override(config, ["classify.seeds=3"]), "pretrain", {"train": {"lr": 0.5}}, "changed"
    ) as run:
        pass
    tags = client.get_run(run.id).data.tags
    note = tags["mlflow.note.content"]
    assert "| `train.lr` | `0.5` | `0.003` |" in note
    assert "classify.seeds" not in note  # of another stage
    local = client.download_artifacts(run.id, "config.json")
    assert json.loads(Path(local).read_text())["classify"]["seeds"] == 3


def test_a_corpus_is_a_data_set_of_the_run_and_of_the_output_with_its_digest(config, client, tmp_path):
    uri = f"{tmp_path}/corpus"
    record = artifacts.plan("corpus", 1, {"sources": [{"name": "a", "uri": "s3://bucket/a.h5ad", "size": 7}]}, {})
    artifacts.begin(uri, record)
    artifacts.finish(uri, record, counts={"kept": 12, "read": 20}, files={}, details={"max_len": 48})
    with mlflow_runs.stage(config, "pretrain", {}, "data") as run:
        for _ in range(2):
            run.corpus(uri, "training")
            run.sources(record.config["sources"])
    mine = client.get_run(run.id)
    found = {i.dataset.name: i for i in mine.inputs.dataset_inputs}
    assert len(found) == len(mine.inputs.dataset_inputs) == 2
    corpus = found[f"{tmp_path.name}/corpus"]
    assert corpus.dataset.digest == record.fingerprint[:16]
    assert corpus.tags[0].value == "training"
    assert json.loads(corpus.dataset.profile)["num_rows"] == 12
    assert mlflow.data.get_source(corpus.dataset).uri == uri
    assert mlflow.data.get_source(found["a"].dataset).uri == "s3://bucket/a.h5ad"
    above = client.get_run(mine.data.tags["mlflow.parentRunId"])
    assert [i.dataset.digest for i in above.inputs.dataset_inputs] == [record.fingerprint[:16]]


def test_a_table_is_one_that_mlflow_shows_and_logged_again_it_is_replaced(config, client):
    table = pa.table({"gene": ["INS", "GCG"], "shift": [0.1234567, float("inf")]})
    with mlflow_runs.stage(config, "perturb", {}, "table") as run:
        for _ in range(2):
            run.table("genes", table)
    shown = json.loads(Path(client.download_artifacts(run.id, "genes.json")).read_text())
    assert shown == {"columns": ["gene", "shift"], "data": [["INS", 0.123457], ["GCG", None]]}
    assert json.loads(client.get_run(run.id).data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "genes.json", "type": "table"}
    ]


def test_the_pages_of_runs_are_told_without_a_password():
    ids = ("3", "abc")
    end = "#/experiments/3/runs/abc?workflowType=machine_learning"
    assert mlflow_runs._page("https://me:word@mlflow.example.org/", *ids) == f"https://mlflow.example.org/{end}"
    assert mlflow_runs._page("http://127.0.0.1:5000", *ids) == f"http://127.0.0.1:5000/{end}"
    assert mlflow_runs._page("sqlite:////tmp/mlflow.db", *ids) == ""


def test_only_what_is_missing_is_logged_however_often(config, client):
    rows = [(1, "loss", 9.0), (1, "mlm", 8.0), (2, "loss", 7.0), (2, "mlm", 6.0), (2, "bad", float("inf"))]
    with mlflow_runs.stage(config, "pretrain", {}, "missing") as run:
        run.log_many([rows[0], rows[3]])
        for _ in range(2):
            run.log_missing(rows)
    found = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.id, name)] for name in ("loss", "mlm", "bad")
    }
    assert {name: sorted(points) for name, points in found.items()} == {
        "loss": [(1, 9.0), (2, 7.0)], "mlm": [(1, 8.0), (2, 6.0)], "bad": [],
    }  # fmt: skip


def test_figures_of_a_training_have_groups():
    rows = [(4, 1, "loss", 9.0), (4, 1, "mlm", 8.0), (4, 1, "lr", 0.1), (4, 1, "heldout_mlm", 7.0)]
    assert mlflow_runs.training_rows(rows) == [
        (4, "loss/total", 9.0), (4, "loss/mlm", 8.0), (4, "optimizer/lr", 0.1), (4, "heldout/mlm", 7.0),
    ]  # fmt: skip


def test_the_store_is_beside_the_artifacts_unless_the_environment_names_one(tmp_path, monkeypatch):
    config = override(recipes.get("demo"), [f"output={tmp_path}"])
    assert mlflow_runs.uri(config) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert mlflow_runs.uri(config) == "http://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("file:///data/mlruns", r"plain folders no longer; give a server .* or a database \(sqlite:////data/mlruns/ml"),
        ("./mlruns", r"'./mlruns': MLflow keeps runs in plain folders no longer"),
        ("ftp://host/x", r"MLflow has no store of this scheme; give a server"),
        (f"https://{HIDDEN}@host", r"its password was removed when the config was written; set MLFLOW_TRACKING_URI"),
    ],
)
def test_what_is_no_tracker_ends_in_one_line_before_anything_is_made(uri, told, tmp_path, capsys, monkeypatch):
    import re

    assert (
        cli.main(["prepare", "--recipe", "demo", "--output", str(tmp_path / "o"), "--set", f"tracking.uri={uri}"]) == 2
    )
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert line.startswith("mixgf: tracking.uri = ")
    assert re.search(told, line), line
    assert not (tmp_path / "o").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI = "):
        mlflow_runs.uri(recipes.get("demo"))


def test_runs_under_a_run_are_known_by_their_keys_and_one_that_died_half_logged_is_logged_over(config, client):
    with mlflow_runs.stage(config, "classify", {}, "parent") as run:
        run.child("first", "k1", {"model": {"knn": 5}}, {"f1": 0.5, "bad": float("nan")})
        assert run.children() == {"k1"}
        ident = client.get_run(run.id).info.experiment_id
        half = client.create_run(ident, tags={"mlflow.parentRunId": run.id, "mixgf.key": "k2"}).info.run_id
        assert run.children() == {"k1"}
        run.child("second", "k2", {}, {"f1": 0.75})
        run.child("second", "k2", {}, {"f1": 0.25})  # it is there
        assert run.children() == {"k1", "k2"}
    found = {
        r.data.tags["mixgf.key"]: r for r in client.search_runs([ident], f"tags.`mlflow.parentRunId` = '{run.id}'")
    }
    assert len(found) == 2
    assert found["k2"].info.run_id == half
    assert found["k2"].data.metrics == {"f1": 0.75}
    assert found["k1"].data.metrics == {"f1": 0.5}
    assert found["k1"].data.params == {"model.knn": "5"}
    with mlflow_runs.stage(config, "classify", {}, "another") as other:
        assert other.children() == set()


def test_progress_of_parts_is_logged_now_and_then_and_at_the_end(config, client):
    times = iter([0.0, 0.0, 1.0, 20.0, 21.0])
    with mlflow_runs.stage(config, "embed", {}, "pace") as run:
        pace = mlflow_runs.Pace(run, "shards", 4, "cells", clock=lambda: next(times))
        for done in range(1, 5):
            pace.update(done, 100.0 * done, 0, lambda: {"actors_up": 2.0})
    points = {m.step: m.value for m in client.get_metric_history(run.id, "progress/shards/cells_per_s")}
    assert points == {3: 10.0, 4: pytest.approx(300 / 21)}
    assert client.get_run(run.id).data.metrics["progress/shards/parts_left"] == 0
    assert client.get_run(run.id).data.metrics["progress/shards/actors_up"] == 2


def test_without_tracking_nothing_is_logged_and_nothing_is_written(tmp_path):
    off = override(recipes.get("demo"), [f"output={tmp_path}", "tracking.uri=off"])
    with mlflow_runs.stage(off, "pretrain", {"train": {"lr": 1e-3}}, "abc") as run:
        run.log({"loss": 9.0})
        run.summary({"loss": 9.0})
        run.log_missing([(1, "loss", 8.0)])
        run.child("a", "key", {}, {"loss": 1.0})
        run.files([__file__])
        run.corpus("nowhere", "training")
        run.model("encoder", {})
        assert run.children() == set()
        with pytest.raises(UserError, match=r"tune.register: .* tracking.uri = 'off'; set tracking.uri"):
            run.register("model", {})
    mlflow_runs.publish_report(off, __file__, {}, {})
    assert mlflow_runs.uri(off) == "off"
    assert mlflow_runs.how_to_look(off) == []
    assert not list(tmp_path.iterdir())
