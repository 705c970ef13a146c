"""Laws of the cost ledger, on cases worked by hand."""

import json

import pytest

from mixgf.config.run import Config, Tracking
from mixgf.errors import UserError
from mixgf.tracking import cost


def test_a_bill_worked_by_hand():
    """3 nodes for 20 minutes at 0.6 an hour, and 1 node for 2 hours at 12: 0.6 + 24."""
    bill = cost.Bill(
        seconds={"prepare": 3 * 1200, "a100": 7200},
        prices={"prepare": 0.6, "a100": 12.0, "spot": 9.0},
        cells=500_000,
        epochs=10,
        genes=300,
    )
    assert bill.total == pytest.approx(24.6)
    assert bill.figures() == pytest.approx(
        {
            "cost/node_hours/prepare": 1.0,
            "cost/node_hours/a100": 2.0,
            "cost/total": 24.6,
            "cost/per_million_cells": 49.2,
            "cost/per_epoch": 2.46,
            "cost/per_gene": 0.082,
        }
    )


def test_a_missing_price_gives_no_total_rather_than_a_part_of_it():
    bill = cost.Bill(seconds={"a100": 3600.0, "spot": 3600.0, "idle": 0.0}, prices={"a100": 12.0}, cells=1e6)
    assert bill.unpriced == ["spot"]
    assert bill.total is None
    assert bill.figures() == {"cost/node_hours/a100": 1.0, "cost/node_hours/spot": 1.0, "cost/node_hours/idle": 0.0}


def test_what_was_not_made_has_no_unit_cost_and_a_free_node_costs_nothing():
    figures = cost.Bill(seconds={"own": 7200.0}, prices={"own": 0.0}, genes=2).figures()
    assert figures == {"cost/node_hours/own": 2.0, "cost/total": 0.0, "cost/per_gene": 0.0}


def test_merging_sessions_does_not_depend_on_order():
    parts = [{"a": 1.0, "b": 2.0}, {}, {"b": 4.0}, {"c": 8.0, "a": 16.0}]
    assert cost.merge(parts) == cost.merge(parts[::-1]) == {"a": 17.0, "b": 6.0, "c": 8.0}
    assert list(cost.merge(parts[::-1])) == ["a", "b", "c"]
    assert cost.merge([cost.merge(parts[:2]), cost.merge(parts[2:])]) == cost.merge(parts)


def test_the_ledger_adds_sessions_and_replaces_a_session_by_its_newer_self(tmp_path):
    uri = str(tmp_path / "corpus")
    assert cost.load(uri) == {}
    cost.save(uri, "1", {"cpu": 60.0})
    cost.save(uri, "1", {"cpu": 90.0})
    cost.save(uri, "2", {"cpu": 5.0, "a100": 7.0})
    assert cost.load(uri) == {"a100": 7.0, "cpu": 95.0}
    assert cost.load(uri, without="1") == {"a100": 7.0, "cpu": 5.0}


def test_prices_come_from_the_config_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MIXGF_PRICES", raising=False)
    assert cost.prices(Config()) == {}
    for name, price in (("here", 1), ("there", 2.5)):
        (tmp_path / name).write_text(json.dumps({"a100": price}))
    monkeypatch.setenv("MIXGF_PRICES", str(tmp_path / "there"))
    assert cost.prices(Config()) == {"a100": 2.5}
    assert cost.prices(Config(tracking=Tracking(prices=str(tmp_path / "here")))) == {"a100": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "not JSON"),
        ('{"a100": "12"}', "a100 = '12': must be a number"),
        ('{"a100": -1}', "at least 0"),
        ('{"a100": true}', "must be a number"),
        ('{"a100": Infinity}', "at least 0"),
        ('{"a100": NaN}', "at least 0"),
    ],
)
def test_a_bad_price_table_is_refused_by_field_and_value(tmp_path, text, message):
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        cost.load_prices(str(path))


def test_a_missing_price_table_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        cost.load_prices(str(tmp_path / "none.json"))


def test_a_projection_worked_by_hand():
    """7.2 M cells at 500 cells/s and node are 4 node-hours: on 8 nodes half an hour, at 1.5 an hour 6."""
    assert cost.project(7.2e6, rate=500, num_nodes=8, price=1.5) == cost.Projection(hours=0.5, node_hours=4.0, cost=6.0)
    assert cost.project(7.2e6, rate=500, num_nodes=1).cost is None


def test_worker_time_adds_up_over_workers_and_sessions_and_ends_within_the_budget():
    now, workers = [0.0], [1]
    spend = cost.Spend(100, before=30, num_workers=lambda: workers[0], clock=lambda: now[0])
    assert not spend.enough(1)
    for _ in range(4):  # four units of 10 worker-seconds
        now[0] += 5
        workers[0] = 2
        spend.update(finished=1)
    assert spend.total == 70
    assert not spend.enough(2)  # 70 + 3 x 10
    assert spend.enough(3)
    now[0] += 15
    assert spend.enough(0)
    assert spend.total == 100
    assert not cost.Spend(0, before=1e9).enough(5)
