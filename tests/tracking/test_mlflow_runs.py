"""Laws of tracking: a restarted stage continues its run; a failed one is marked; curves hold each step once."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from mixgf.config import recipes
from mixgf.config.parse import override
from mixgf.errors import UserError
from mixgf.tracking import mlflow_runs


@pytest.fixture
def config(tmp_path):
    return override(recipes.get("demo"), [f"output={tmp_path}"])


def test_a_run_is_continued_by_fingerprint_and_its_state_is_told(config):
    def killed():
        params = {"train": {"lr": 1e-3}, "classify": {"merge": {"CD14+ monocyte": ["a", "b"]}}}
        with mlflow_runs.stage(config, "pretrain", params, "abc") as run:
            run.log({"loss/mlm": 9.5}, step=1)
            seen.append(run.id)
            raise RuntimeError("killed")

    seen = []
    with pytest.raises(RuntimeError, match="killed"):
        killed()
    client = MlflowClient(mlflow_runs.uri(config))
    assert client.get_run(seen[0]).info.status == "FAILED"
    with mlflow_runs.stage(config, "pretrain", {"train": {"lr": 1e-3}}, "abc") as again:
        again.log_many([(2, "loss/mlm", 9.0), (2, "bad", float("nan")), (3, "loss/mlm", 8.5)])
        again.artifact(__file__)
    assert again.id == seen[0]
    done = client.get_run(seen[0])
    assert done.info.status == "FINISHED"
    assert done.data.params["train.lr"] == "0.001"
    assert done.data.params["classify.merge.CD14_ monocyte"] == "['a', 'b']"  # MLflow takes no + in a name
    assert [(m.step, m.value) for m in client.get_metric_history(seen[0], "loss/mlm")] == [(1, 9.5), (2, 9.0), (3, 8.5)]
    assert "bad" not in done.data.metrics
    assert mlflow_runs.page(config).endswith(
        f"/#/experiments/{done.info.experiment_id}/runs?workflowType=machine_learning"
    )
    assert [f.path for f in client.list_artifacts(seen[0])] == [Path(__file__).name]
    with mlflow_runs.stage(config, "pretrain", {}, "def") as other:
        assert other.id != seen[0]


def test_the_page_of_a_run_is_told_for_servers_alone_and_without_a_password():
    assert (
        mlflow_runs._page("https://me:word@mlflow.example.org/", "3", "abc")
        == "https://mlflow.example.org/#/experiments/3/runs/abc"
    )
    assert mlflow_runs._page("http://127.0.0.1:5000", "3", "abc") == "http://127.0.0.1:5000/#/experiments/3/runs/abc"
    assert mlflow_runs._page("sqlite:////tmp/mlflow.db", "3", "abc") == ""


def test_only_what_is_missing_is_logged_however_often(config):
    rows = [(1, "loss", 9.0), (1, "mlm", 8.0), (2, "loss", 7.0), (2, "mlm", 6.0), (2, "bad", float("inf"))]
    with mlflow_runs.stage(config, "pretrain", {}, "abc") as run:
        run.log_many([rows[0], rows[3]])
        for _ in range(2):
            run.log_missing(rows)
    client = MlflowClient(run.uri)
    found = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.id, name)] for name in ("loss", "mlm", "bad")
    }
    assert {name: sorted(points) for name, points in found.items()} == {
        "loss": [(1, 9.0), (2, 7.0)], "mlm": [(1, 8.0), (2, 6.0)], "bad": [],
    }  # fmt: skip


def test_the_store_is_beside_the_artifacts_unless_the_environment_names_one(config, tmp_path, monkeypatch):
    assert mlflow_runs.uri(config) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert mlflow_runs.uri(config) == "http://127.0.0.1:5000"


def test_runs_under_a_run_are_known_by_their_keys_and_one_that_died_half_logged_is_logged_over(config):
    with mlflow_runs.stage(config, "classify", {}, "parent") as run:
        run.child("first", "k1", {"model": {"knn": 5}}, {"f1": 0.5, "bad": float("nan")})
        client = MlflowClient(run.uri)
        ident = client.get_run(run.id).info.experiment_id
        half = client.create_run(ident, tags={"mlflow.parentRunId": run.id, "mixgf.key": "k2"}).info.run_id
        assert run.children() == {"k1"}
        run.child("second", "k2", {}, {"f1": 0.75})
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


def test_without_tracking_nothing_is_logged_and_nothing_is_written(config, tmp_path):
    off = override(config, ["tracking.uri=off"])
    with mlflow_runs.stage(off, "pretrain", {"train": {"lr": 1e-3}}, "abc") as run:
        run.log({"loss": 9.0})
        run.log_missing([(1, "loss", 8.0)])
        run.child("a", "key", {}, {"loss": 1.0})
        run.artifact(__file__)
        assert run.children() == set()
        with pytest.raises(UserError, match=r"tune.register: .* tracking.uri = 'off'; set tracking.uri"):
            run.register("model", {}, "")
    assert mlflow_runs.uri(off) == "off"
    assert not list(tmp_path.iterdir())
