"""A tracker that is down or slow neither ends nor slows the work; what it misses arrives later, once."""

import http.client
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow.tracking import MlflowClient
from processes import free_port

from mixgf.config import recipes
from mixgf.config.parse import override
from mixgf.storage import files
from mixgf.tracking import delivery, mlflow_runs, store


@pytest.fixture(autouse=True)
def _own_queues(monkeypatch):
    """Queues of this test alone: those of others keep what they know of their trackers."""
    monkeypatch.setattr(mlflow_runs, "_deliveries", {})


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="mixgf")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def configured(output, uri):
    return override(recipes.get("demo"), [f"output={output}", f"tracking.uri={uri}"])


def work(config, number=200):
    """A stage that logs `number` steps; returns the seconds that its own work took."""
    with mlflow_runs.stage(config, "pretrain", {"train": {"lr": 0.1}}, "down") as run:
        began = time.monotonic()
        for step in range(number):
            run.log({"loss/total": float(step)}, step)
        run.child("a", "key", {"x": 1}, {"f1": 0.5})
        took = time.monotonic() - began
        run.summary({"cells": 3.0})
    return took


def unsent(output):
    return [n for n in files.list_dir(f"{output}/tracking") if n.startswith("unsent-")]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """A database that takes what was kept for a server puts files into `mlruns` of the working directory."""
    monkeypatch.chdir(tmp_path)


def test_a_server_that_is_down_is_told_once_and_gets_everything_once_from_the_next_stage(
    tmp_path, tracking_uri, lines, monkeypatch
):
    """The server comes back under the same output: here the database behind it, reached directly."""
    dead = f"http://me:planted-word@127.0.0.1:{free_port()}"
    began = time.monotonic()
    assert work(configured(tmp_path, dead)) < 1
    assert time.monotonic() - began < store_limit()
    told = lines()
    assert len(told) == 1, told
    assert told[0].startswith("MLflow at http://***@127.0.0.1:")
    assert "the work goes on" in told[0]
    assert len(unsent(tmp_path)) == 1
    assert work(configured(tmp_path, dead)) < 1
    assert len(lines()) == 1

    monkeypatch.setattr(mlflow_runs, "_deliveries", {})
    for _ in range(2):
        with mlflow_runs.stage(configured(tmp_path, tracking_uri), "embed", {}, "later"):
            pass
        assert not unsent(tmp_path)
    client = MlflowClient(tracking_uri)
    runs = client.search_runs(["1"], f"tags.`mixgf.output` = '{tmp_path}'")
    by_name = {run.info.run_name: run for run in runs}
    assert sorted(run.info.run_name for run in runs) == sorted(["pretrain", "embed", tmp_path.name])
    pretrain = by_name["pretrain"]
    assert pretrain.info.status == "FINISHED"
    assert pretrain.data.params["train.lr"] == "0.1"
    assert sorted(m.step for m in client.get_metric_history(pretrain.info.run_id, "loss/total")) == list(range(200))
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{pretrain.info.run_id}'")
    assert [child.data.metrics for child in children] == [{"f1": 0.5}]
    assert by_name[tmp_path.name].data.metrics["pretrain/cells"] == 3


def test_figures_that_are_not_finite_neither_end_the_stage_nor_keep_the_others_from_arriving(
    tmp_path, tracking_uri, monkeypatch
):
    figures = {"good": 1.0, "nan": float("nan"), "inf": float("inf")}
    with mlflow_runs.stage(configured(tmp_path, f"http://127.0.0.1:{free_port()}"), "classify", {}, "down") as run:
        run.log(figures, 1)
        run.log_missing([(2, name, value) for name, value in figures.items()])
        run.summary(figures)
        run.child("a", "key", {"x": float("nan"), "y": 1}, figures)
    assert len(unsent(tmp_path)) == 1
    monkeypatch.setattr(mlflow_runs, "_deliveries", {})
    with mlflow_runs.stage(configured(tmp_path, tracking_uri), "embed", {}, "later"):
        pass
    assert not unsent(tmp_path)
    client = MlflowClient(tracking_uri)
    runs = client.search_runs(["1"], f"tags.`mixgf.output` = '{tmp_path}'")
    of = {run.info.run_name: run for run in runs}
    named = {
        name: {key for key in run.data.metrics if key.endswith(("good", "nan", "inf"))} for name, run in of.items()
    }
    assert named == {"classify": {"good"}, tmp_path.name: {"classify/good"}, "embed": set()}
    assert sorted(row.step for row in client.get_metric_history(of["classify"].info.run_id, "good")) == [0, 1, 2]
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{of['classify'].info.run_id}'")
    assert [run.data.metrics for run in children] == [{"good": 1.0}]


def store_limit():
    """Seconds that a whole stage may lose to a server that refuses connections, on a busy machine."""
    return 60


class Slow(BaseHTTPRequestHandler):
    """Accepts every request and answers none."""

    def do_GET(self):
        self.server.asked += 1
        self.server.released.wait(120)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def slow_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.asked, server.released, server.daemon_threads = 0, threading.Event(), True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()


def test_a_server_that_never_answers_costs_a_bounded_wait_and_the_work_none(slow_server, tmp_path, lines, monkeypatch):
    monkeypatch.setattr(mlflow_runs, "OPEN_SECONDS", 1.0)
    monkeypatch.setattr(mlflow_runs, "QUIET_SECONDS", 2.0)
    began = time.monotonic()
    assert work(configured(tmp_path, f"http://127.0.0.1:{slow_server.server_port}")) < 1
    assert time.monotonic() - began < 30
    assert slow_server.asked > 0
    assert len(lines()) == 1
    assert len(unsent(tmp_path)) == 1


def test_a_server_that_never_answers_is_waited_for_once_however_many_stages_there_are(
    slow_server, tmp_path, lines, monkeypatch
):
    """As the trainings of a sweep, each of which is a run of its own."""
    monkeypatch.setattr(mlflow_runs, "OPEN_SECONDS", 1.0)
    monkeypatch.setattr(mlflow_runs, "QUIET_SECONDS", 2.0)
    config, waited = configured(tmp_path, f"http://127.0.0.1:{slow_server.server_port}"), []
    for number in range(8):
        began = time.monotonic()
        with mlflow_runs.stage(config, "pretrain", {}, f"silent {number}") as run:
            run.log({"loss/total": 1.0})
        waited.append(time.monotonic() - began)
    assert waited[0] >= 3
    assert max(waited[1:]) < 0.5, waited
    assert len(lines()) == 1
    (kept,) = unsent(tmp_path)
    operations = files.read_json(f"{tmp_path}/tracking/{kept}")
    assert sum(one["do"] == "missing" for one in operations) == 8, "each record is kept once"


def test_a_tracker_that_answers_slowly_does_not_hold_the_end_of_a_stage():
    """Each record takes less time than the wait for an answer, but there are many."""
    sent = []

    def apply(operation):
        time.sleep(0.05)
        sent.append(operation)

    queue = delivery.Delivery("http://slow", apply, lambda: True)
    queue.put(*({"do": "metrics", "number": number} for number in range(400)))
    began = time.monotonic()
    assert not queue.settle(0.3)
    assert time.monotonic() - began < 10
    assert "slow: " in queue.why_down
    left = queue.take()
    assert sent
    assert left
    assert {one["number"] for one in (*sent, *left)} == set(range(400))


@pytest.mark.parametrize("back", ["after all", "after the first training"])
def test_the_runs_of_a_sweep_arrive_whole_whenever_the_tracker_comes_back(back, tmp_path, tracking_uri, monkeypatch):
    """Trainings are runs inside the run of their sweep; each keeps what it cannot send, and the sweep goes on."""
    down = threading.Event()
    down.set()
    real = store.Store.apply

    def apply(self, operation):
        if down.is_set():
            raise http.client.RemoteDisconnected("planted")
        return real(self, operation)

    monkeypatch.setattr(store.Store, "apply", apply)
    monkeypatch.setattr(store.Store, "answers", lambda _: not down.is_set())
    config, folder = configured(tmp_path, tracking_uri), str(tmp_path / "tune" / "trials")
    with mlflow_runs.stage(config, "tune", {}, back) as sweep:
        sweep.log({"before": 1.0})
        for number in range(2):
            inside = configured(f"{folder}/{number}", tracking_uri)
            with mlflow_runs.stage(inside, "pretrain", {}, f"{back} {number}", parent=sweep.key) as run:
                run.log({"loss/total": float(number)}, 1)
            if back == "after the first training":
                down.clear()
        sweep.log({"after": 2.0})
    down.clear()
    for _ in range(2):
        with mlflow_runs.stage(config, "embed", {}, f"{back} later"):
            pass
        assert not unsent(tmp_path)
    assert not list((tmp_path / "tune").rglob("unsent-*"))
    client = MlflowClient(tracking_uri)
    mine = client.search_runs(["1"], f"tags.`mixgf.output` LIKE '{tmp_path}%'")
    assert {run.info.status for run in mine} == {"FINISHED"}
    (found,) = [run for run in mine if run.info.run_name == "tune"]
    assert {"before", "after"} <= found.data.metrics.keys()
    trained = [run for run in mine if run.data.tags.get("mlflow.parentRunId") == found.info.run_id]
    assert sorted(run.data.metrics["loss/total"] for run in trained) == [0.0, 1.0]


def test_a_server_that_goes_away_amid_a_stage_ends_nothing_and_comes_back(tmp_path, tracking_uri, lines, monkeypatch):
    """The store fails between two figures, as a lost connection does, and works again before the end of the stage."""
    down = threading.Event()
    real = store.Store.do_metrics

    def fails(self, **arguments):
        if down.is_set():
            raise http.client.RemoteDisconnected("planted")
        real(self, **arguments)

    monkeypatch.setattr(store.Store, "do_metrics", fails)
    monkeypatch.setattr(store.Store, "answers", lambda _: not down.is_set())
    with mlflow_runs.stage(configured(tmp_path, tracking_uri), "pretrain", {}, "amid") as run:
        run.log({"loss/total": 1.0}, 1)
        down.set()
        run.log({"loss/total": 2.0}, 2)
        queue = mlflow_runs._delivery(tracking_uri)
        limit = time.monotonic() + 20
        while not queue.why_down and time.monotonic() < limit:
            time.sleep(0.05)
        assert "planted" in queue.why_down
        down.clear()
        run.log({"loss/total": 3.0}, 3)
    history = MlflowClient(tracking_uri).get_metric_history(run.id, "loss/total")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert not lines()
    assert not unsent(tmp_path)


def test_all_runs_are_finished_after_the_next_stage_whatever_arrived_before_the_tracker_went_away(
    tmp_path, tracking_uri, monkeypatch
):
    arrived, most = [], float("inf")
    real = store.Store.apply

    def apply(self, operation):
        if len(arrived) >= most:
            raise ConnectionError("planted")
        arrived.append(operation["do"])
        return real(self, operation)

    monkeypatch.setattr(store.Store, "apply", apply)
    monkeypatch.setattr(store.Store, "answers", lambda _: len(arrived) < most)
    client = MlflowClient(tracking_uri)
    work(configured(tmp_path / "whole", tracking_uri), 1)
    assert arrived[-3:] == ["end", "tags", "end"]
    for number in range(len(arrived)):
        output = tmp_path / str(number)
        arrived, most = [], number
        monkeypatch.setattr(mlflow_runs, "_deliveries", {})
        work(configured(output, tracking_uri), 1)
        assert len(unsent(output)) == 1
        most = float("inf")
        monkeypatch.setattr(mlflow_runs, "_deliveries", {})
        with mlflow_runs.stage(configured(output, tracking_uri), "embed", {}, "later"):
            pass
        runs = client.search_runs(["1"], f"tags.`mixgf.output` = '{output}'")
        found = {run.info.run_name: run.info.status for run in runs}
        assert found == dict.fromkeys(["pretrain", "embed", output.name], "FINISHED"), number


def test_an_operation_that_the_tracker_refuses_is_left_out_and_told_once(tmp_path, tracking_uri, lines):
    with mlflow_runs.stage(configured(tmp_path, tracking_uri), "pretrain", {}, "refused") as run:
        for _ in range(3):
            mlflow_runs._delivery(tracking_uri).put({"do": "tags", "key": "of nothing", "tags": {"a": "b"}})
        run.log({"loss/total": 1.0}, 1)
    assert MlflowClient(tracking_uri).get_run(run.id).data.metrics == {"loss/total": 1.0}
    assert lines() == ["MLflow: tags is left out: no run with the tag mixgf.key = of nothing"]
