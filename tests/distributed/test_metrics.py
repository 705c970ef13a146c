"""Metrics cost nothing without Ray, reach Ray's exporter with it, and the ledger survives a killed session."""

import time
from collections import Counter

import pytest

from mixgf.config.run import Config, Tracking
from mixgf.distributed import metrics
from mixgf.distributed.metrics import METRICS, Meter, node_type, watch
from mixgf.tracking import cost


class Tracked:
    """Stands where an MLflow run does; keeps what is logged."""

    id = "run0"

    def __init__(self):
        self.logged = {}

    def log(self, figures, step=0):
        self.logged |= figures


def test_names_are_stable_and_fit_prometheus():
    assert all(name == metric.name and name.isidentifier() and name == name.lower() for name, metric in METRICS.items())
    assert METRICS["cells_read"].exported == "ray_mixgf_cells_read_total"
    assert METRICS["units"].exported == "ray_mixgf_units"
    assert Counter(m.kind for m in METRICS.values()).keys() == {"counter", "gauge"}


def test_without_ray_a_call_does_nothing_and_costs_less_than_50_microseconds(monkeypatch):
    monkeypatch.delitem(metrics.sys.modules, "ray", raising=False)
    meter = Meter("prepare", "run0")
    start = time.perf_counter()
    for _ in range(1000):
        meter.add("cells_read", 7)
    assert time.perf_counter() - start < 0.05
    meter.units(waiting=1, done=2)
    meter.figures(3, {"loss": 1.0, "lr": 1e-4})


def test_unknown_names_and_wrong_kinds_are_our_own_mistakes():
    meter = Meter("prepare", "run0")
    with pytest.raises(AssertionError, match="not in METRICS"):
        meter.add("cells_red")
    with pytest.raises(AssertionError, match="a counter is added to"):
        meter.set("cells_read", 1)
    with pytest.raises(AssertionError, match="a gauge is set"):
        meter.add("units", 1, state="done")


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"Labels": {"ray.io/node-group": "spot"}, "Resources": {"accelerator_type:A100": 1}}, "spot"),
        ({"Labels": {"ray.io/node-group": "x", "mixgf.io/node-type": "head"}, "Resources": {}}, "head"),
        ({"Labels": {}, "Resources": {"CPU": 2.0, "accelerator_type:A100": 1}}, "A100"),
        ({"Labels": None, "Resources": {"CPU": 2.0}}, "cpu"),
    ],
    ids=["group", "label", "accelerator", "plain"],
)
def test_a_node_is_of_its_group_else_of_its_accelerator(node, expected):
    assert node_type(node) == expected


def test_a_ledger_adds_the_sessions_of_a_killed_run(tmp_path, monkeypatch):
    """Two nodes for the time of this session, and an hour that a killed session left behind, at 7 an hour."""
    monkeypatch.setattr(metrics, "_nodes", lambda: {"spot": 2})
    prices = tmp_path / "prices.json"
    prices.write_text('{"spot": 7.0}')
    config, uri, tracked = Config(tracking=Tracking(prices=str(prices))), str(tmp_path / "perturb"), Tracked()
    cost.save(uri, "000000000000001", {"spot": 3600.0})
    start = time.monotonic()
    with watch(config, "perturb", tracked, uri, every=0.02) as watched:
        time.sleep(0.2)
        watched.made(genes=4)
    spent = time.monotonic() - start
    hours = tracked.logged["cost/node_hours/spot"]
    assert 1 + 2 * 0.2 / 3600 <= hours <= 1 + 2 * spent / 3600
    assert tracked.logged["cost/total"] == pytest.approx(7 * hours)
    assert tracked.logged["cost/per_gene"] == pytest.approx(7 * hours / 4)
    assert cost.load(uri)["spot"] == pytest.approx(3600 * hours)


def test_a_failed_stage_is_billed_too_and_its_error_comes_through(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_nodes", lambda: {"cpu": 1})
    tracked = Tracked()
    with pytest.raises(RuntimeError, match="boom"), watch(Config(), "prepare", tracked, str(tmp_path)):
        raise RuntimeError("boom")
    assert tracked.logged.keys() == {"cost/node_hours/cpu"}


def test_a_cluster_that_cannot_be_asked_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    def lost():
        raise ConnectionError("head is gone")

    monkeypatch.setattr(metrics, "_nodes", lost)
    with watch(Config(), "prepare", Tracked(), str(tmp_path), every=0.01) as watched:
        time.sleep(0.05)
    assert watched.seconds == {}
    assert "head is gone" in caplog.text


def test_a_used_node_type_without_a_price_is_said_at_the_start(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "_nodes", lambda: {"a100": 1})
    prices = tmp_path / "prices.json"
    prices.write_text('{"spot": 7.0}')
    with watch(Config(tracking=Tracking(prices=str(prices))), "prepare", Tracked(), str(tmp_path / "x")):
        pass
    assert "no price for node type a100" in caplog.text


@pytest.mark.ray
def test_driver_and_workers_record_every_metric_through_ray(ray_local, tmp_path):
    meter = Meter("classify", "run0")

    @ray_local.remote
    def work(worker_meter):
        for name, metric in METRICS.items():
            tags = dict.fromkeys(metric.tags, "x")
            (worker_meter.add if metric.kind == "counter" else worker_meter.set)(name, 2.0, **tags)
        worker_meter.units(waiting=3)
        worker_meter.figures(5, {"loss": 2.0, "mlm": 1.5, "lr": 1e-4, "mfu": 0.3})
        return True

    assert ray_local.get([work.remote(meter), work.remote(meter)]) == [True, True]
    meter.add("cells_read", 0)  # nothing to add is not an error
    meter.add("cells_read", 2)
    tracked = Tracked()
    with watch(Config(), "classify", tracked, str(tmp_path), every=0.05):
        time.sleep(0.2)
    assert tracked.logged["cost/node_hours/cpu"] > 0
