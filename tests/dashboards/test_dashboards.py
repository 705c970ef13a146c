"""Dashboards and alerts: made by their generator, over metrics that exist, and alive on a real Prometheus that reads a real Ray."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from mixgf.distributed.metrics import METRICS

ROOT = Path(__file__).parents[2]
DASHBOARDS_DIR = ROOT / "dashboards"
sys.path.insert(0, str(DASHBOARDS_DIR))
import build
from panels import DASHBOARDS
from rules import alerts

EXPORTED = {metric.exported for metric in METRICS.values()}
VARIABLES = {"$__rate_interval": "1m", "$__range": "10m", "$run": ".*"}
STAGES = {"overview", "prepare", "pretrain", "embed", "classify", "finetune", "perturb", "tune"}


def plain(expr):
    """An expression with the dashboard's variables put in."""
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr


QUERIES = [
    pytest.param(name, panel, expr, id=f"{name}: {panel.title} [{legend}]")
    for name, (_, panels) in DASHBOARDS.items()
    for panel in panels
    for expr, legend in panel.queries
]


def test_files_are_what_the_generator_makes():
    made = build.files()
    assert set(made) == {p.name for p in DASHBOARDS_DIR.iterdir() if p.suffix in {".json", ".yaml"}}
    for name, text in made.items():
        assert (DASHBOARDS_DIR / name).read_text() == text, f"{name}: run python dashboards/build.py"


def test_there_is_a_dashboard_for_every_stage():
    from mixgf.cli import STAGES as commands

    assert set(DASHBOARDS) == STAGES == {"overview", "finetune", "tune", *(set(commands) - {"report"})}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_dashboard_has_what_grafana_needs(name):
    dashboard = json.loads((DASHBOARDS_DIR / f"{name}.json").read_text())
    assert dashboard["uid"] == f"mixgf-{name}"
    assert [v["name"] for v in dashboard["templating"]["list"]] == ["source", "run"]
    panels = dashboard["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(places), "no panel lies on another"
    for panel in panels:
        assert panel["description"].endswith((".", "?")), panel["title"]
        assert panel["datasource"]["uid"] == "${source}"
        assert panel["targets"]
        assert all(t["expr"] and t["legendFormat"] for t in panel["targets"])
    titles = [p["title"] for p in panels]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(("name", "panel", "expr"), QUERIES)
def test_a_query_parses_and_its_metrics_exist(name, panel, expr):
    parser = pytest.importorskip("promql_parser", reason="promql-parser (test extra)")
    parser.parse(plain(expr))
    assert set(re.findall(r"\bray_mixgf_\w+", expr)) <= EXPORTED
    tags = {tag for metric in METRICS.values() for tag in metric.tags} | {"stage", "run", "ip", "GpuIndex"}
    for listed in re.findall(r"(?:by|on) \(([^)]*)\)", expr):
        assert set(re.split(r",\s*", listed)) <= tags, listed
    for metric, inner in re.findall(r"(ray_mixgf_\w+)\{([^}]*)\}", expr):
        row = next(m for m in METRICS.values() if m.exported == metric)
        assert set(re.findall(r"(\w+)=", inner)) <= {"stage", "run", *row.tags}, expr


def test_every_metric_is_on_some_dashboard():
    text = " ".join(expr for _, panels in DASHBOARDS.values() for panel in panels for expr, _ in panel.queries)
    assert {name for name in EXPORTED if name not in text} == set()


def test_a_parser_that_accepts_anything_would_be_noticed():
    parser = pytest.importorskip("promql_parser", reason="promql-parser (test extra)")
    for wrong in ("sum by (a (x)", "rate(x)", "x{a=b}"):
        with pytest.raises(ValueError, match=r"."):
            parser.parse(wrong)


def test_rules_parse_are_unique_and_lead_into_the_book():
    parser = pytest.importorskip("promql_parser", reason="promql-parser (test extra)")
    rules = yaml.safe_load((DASHBOARDS_DIR / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert len({r["alert"] for r in rules}) == len(rules)
    headings = re.findall(r"^#+ (.+)$", (ROOT / "cluster" / "README.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    for rule in rules:
        parser.parse(rule["expr"])
        assert set(re.findall(r"\bray_mixgf_\w+", rule["expr"])) <= EXPORTED
        page, anchor = rule["annotations"]["runbook"].split("#")
        assert page == "cluster/README.md"
        assert anchor in anchors, anchor
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}


def test_the_cost_limit_reaches_its_rule():
    (rule,) = (r for r in alerts(250)["groups"][0]["rules"] if r["alert"] == "MixgfCostLimit")
    assert rule["expr"].endswith("> 250")


def needs(*names):
    """Paths of Debian's Prometheus binaries, or a skip that says what to install."""
    found = [shutil.which(name) for name in names]
    if None in found:
        pytest.skip(f"{' and '.join(names)} not installed (Debian package prometheus)")
    return found


RULE_TESTS = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'ray_mixgf_units{{stage="perturb",run="stuck",state="waiting"}}', values: '5x120'}}
      - {{series: 'ray_mixgf_units{{stage="perturb",run="stuck",state="done"}}', values: '7x120'}}
      - {{series: 'ray_mixgf_units{{stage="perturb",run="lively",state="waiting"}}', values: '500-1x120'}}
      - {{series: 'ray_mixgf_units{{stage="perturb",run="lively",state="done"}}', values: '0+1x120'}}
      - {{series: 'ray_mixgf_units{{stage="perturb",run="lively",state="failed"}}', values: '0x60 2x60'}}
      - {{series: 'ray_mixgf_train_step{{stage="pretrain",run="stands"}}', values: '0+10x30 300x90'}}
      - {{series: 'ray_mixgf_train_step{{stage="pretrain",run="moves"}}', values: '0+10x120'}}
      - {{series: 'ray_mixgf_data_wait_share{{stage="pretrain",run="moves"}}', values: '0.05x60 0.5x60'}}
      - {{series: 'ray_mixgf_actors{{stage="perturb",run="lively",state="wanted"}}', values: '8x120'}}
      - {{series: 'ray_mixgf_actors{{stage="perturb",run="lively",state="up"}}', values: '3x120'}}
      - {{series: 'ray_mixgf_cost{{stage="perturb",run="lively",WorkerId="old"}}', values: '600x120'}}
      - {{series: 'ray_mixgf_cost{{stage="perturb",run="lively",WorkerId="new"}}', values: '600+5x120'}}
      - {{series: 'ray_mixgf_node_seconds{{stage="pretrain",run="free",node_type="cpu"}}', values: '0+60x120'}}
      - {{series: 'ray_node_mem_used{{ip="a"}}', values: '95x120'}}
      - {{series: 'ray_node_mem_total{{ip="a"}}', values: '100x120'}}
      - {{series: 'up{{job="ray",instance="b:8090"}}', values: '1x60 0x60'}}
      - {{series: 'autoscaler_pending_nodes', values: '2x120'}}
    alert_rule_test:
      - {{eval_time: 20m, alertname: MixgfNoProgress, exp_alerts: []}}
      - eval_time: 90m
        alertname: MixgfNoProgress
        exp_alerts: [{{exp_labels: {{severity: critical, stage: perturb, run: stuck}}, exp_annotations: {{summary: "perturb has work units left and finished none for 30 minutes", runbook: "cluster/README.md#no-progress"}}}}]
      - {{eval_time: 50m, alertname: MixgfTrainingStalled, exp_alerts: []}}
      - eval_time: 110m
        alertname: MixgfTrainingStalled
        exp_alerts: [{{exp_labels: {{severity: critical, run: stands}}, exp_annotations: {{summary: "training run stands has made no step for 30 minutes", runbook: "cluster/README.md#no-progress"}}}}]
      - {{eval_time: 50m, alertname: MixgfUnitsFailed, exp_alerts: []}}
      - eval_time: 90m
        alertname: MixgfUnitsFailed
        exp_alerts: [{{exp_labels: {{severity: warning, stage: perturb, run: lively}}, exp_annotations: {{summary: "perturb has 2 failed work units", runbook: "cluster/README.md#failed-units"}}}}]
      - {{eval_time: 50m, alertname: MixgfTrainingWaitsForData, exp_alerts: []}}
      - eval_time: 90m
        alertname: MixgfTrainingWaitsForData
        exp_alerts: [{{exp_labels: {{severity: warning, run: moves}}, exp_annotations: {{summary: "training waits for data 50% of the time", runbook: "cluster/README.md#training-waits-for-data"}}}}]
      - eval_time: 90m
        alertname: MixgfActorsMissing
        exp_alerts: [{{exp_labels: {{severity: warning, stage: perturb, run: lively}}, exp_annotations: {{summary: "perturb has waited for 5 actors for 30 minutes", runbook: "cluster/README.md#no-nodes-come-up"}}}}]
      - {{eval_time: 79m, alertname: MixgfCostLimit, exp_alerts: []}}
      - eval_time: 90m
        alertname: MixgfCostLimit
        exp_alerts: [{{exp_labels: {{severity: critical}}, exp_annotations: {{summary: "the cost of running runs is 1050, above the limit of 1000", runbook: "cluster/README.md#cost"}}}}]
      - eval_time: 90m
        alertname: MixgfCostUnknown
        exp_alerts: [{{exp_labels: {{severity: info, run: free}}, exp_annotations: {{summary: "the cost of run free is unknown: no price table is set, or it lacks a node type", runbook: "cluster/README.md#cost"}}}}]
      - eval_time: 90m
        alertname: RayNodeMemory
        exp_alerts: [{{exp_labels: {{severity: warning, ip: a}}, exp_annotations: {{summary: "node a uses 95% of its memory", runbook: "cluster/README.md#out-of-memory"}}}}]
      - {{eval_time: 50m, alertname: RayTargetDown, exp_alerts: []}}
      - eval_time: 90m
        alertname: RayTargetDown
        exp_alerts: [{{exp_labels: {{severity: warning, job: ray, instance: "b:8090"}}, exp_annotations: {{summary: "Prometheus cannot reach b:8090: the node is lost, or its port is closed", runbook: "cluster/README.md#a-node-is-lost"}}}}]
      - eval_time: 90m
        alertname: RayNodesPending
        exp_alerts: [{{exp_labels: {{severity: warning}}, exp_annotations: {{summary: "2 nodes have been pending for 30 minutes", runbook: "cluster/README.md#no-nodes-come-up"}}}}]
"""


def test_alerts_fire_when_they_should_and_stay_quiet_before(tmp_path):
    (promtool,) = needs("promtool")
    checked = subprocess.run(
        [promtool, "check", "rules", DASHBOARDS_DIR / "alerts.yaml"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    path = tmp_path / "tests.yaml"
    path.write_text(RULE_TESTS.format(rules=DASHBOARDS_DIR / "alerts.yaml"))
    done = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_hosts_prometheus_config_is_valid(tmp_path):
    (promtool,) = needs("promtool")
    config = ROOT / "cluster" / "compose" / "prometheus.yaml"
    done = subprocess.run(
        [promtool, "check", "config", "--syntax-only", config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


JOB = """
import json, os, sys, time
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
os.environ.pop("RAY_ADDRESS", None)
import ray
from mixgf.config.run import Config, Tracking
from mixgf.distributed.metrics import watch
folder, stop = sys.argv[1:]
ray.init(address="local", num_cpus=2, include_dashboard=True, object_store_memory=80 << 20, log_to_driver=False,
         logging_level="ERROR", _temp_dir=folder)
class Tracked:
    id = "run0"
    def log(self, figures, step=0): pass
@ray.remote(num_cpus=0.5)
def work(meter, i):
    for name in ("cells_read", "cells_kept", "cells_encoded", "sentences_scored"):
        meter.add(name, 100 + i)
    meter.add("cells_dropped", 3, reason="depth")
    meter.add("shards_written")
    time.sleep(0.2)
config = Config(tracking=Tracking(prices=folder + "-prices.json"))
stages = ("prepare", "pretrain", "embed", "classify", "perturb", "finetune", "tune")
watches = [watch(config, stage, Tracked(), f"{folder}-out/{stage}", every=1.0) for stage in stages]
watched = [w.__enter__() for w in watches]
step = 0
while not os.path.exists(stop):
    step += 1
    ray.get([work.remote(w.meter, step) for w in watched])
    for w in watched:
        w.meter.units(waiting=max(0, 1000 - step), running=2, done=step, failed=0)
        w.meter.set("actors", 2, state="up")
        w.meter.set("actors", 2, state="wanted")
    for rung, arm in enumerate(("base", "lr=0.01, view=mask")):
        watched[6].meter.set("arm_score", 0.3 + rung / 10, arm=arm)
        watched[6].meter.set("arm_rungs", 1 + rung, arm=arm)
    for one in (1, 5):
        watched[one].meter.figures(step, {"loss": 9 / step, "mlm": 8 / step, "contrast": 1 / step, "lr": 1e-4, "grad_norm": 1.0,
            "cells_per_s": 50.0 + step, "tokens_per_s": 2e4, "mfu": 0.3, "wait_share": 0.02, "memory_gb": 1.5})
for w in watches:
    w.__exit__(None, None, None)
ray.shutdown()
"""


class Prometheus:
    """A real server on loopback, and the questions a dashboard asks it."""

    def __init__(self, address):
        self.address = address

    def ask(self, path, **query):
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def empty(self):
        """Queries without proper data now, GPU panels left out: none at all, a legend's label missing, or a speed of 0."""
        out = []
        for case in QUERIES:
            name, panel, expr = case.values
            if panel.needs:
                continue
            rows = self.ask("query", query=plain(expr))["result"]
            labels = set(re.findall(r"{{(\w+)}}", next(legend for e, legend in panel.queries if e == expr)))
            labelled = all(labels <= set(row["metric"]) for row in rows)
            moves = not re.search(r"rate\(|deriv\(", expr) or any(float(row["value"][1]) > 0 for row in rows)
            if not (rows and labelled and moves):
                out.append(f"{name}: {panel.title}: {plain(expr)}: {rows[:2]}")
        return out


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_panel_has_data_on_a_real_prometheus_reading_a_real_ray(tmp_path):
    (prometheus,) = needs("prometheus")
    folder, stop = Path(f"/tmp/rp{os.getpid()}"), tmp_path / "stop"  # Ray's sockets want a short path
    Path(f"{folder}-prices.json").write_text('{"cpu": 3600.0}')
    job = tmp_path / "job.py"
    job.write_text(JOB)
    found = folder / "prom_metrics_service_discovery.json"
    port = 20000 + os.getpid() % 20000
    config = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
        "rule_files": [str(DASHBOARDS_DIR / "alerts.yaml")],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(found)], "refresh_interval": "2s"}]}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, job, folder, stop], env=environment)]
    try:
        server = Prometheus(f"127.0.0.1:{port}")
        log = (tmp_path / "prometheus.log").open("w")
        command = [
            prometheus,
            f"--config.file={tmp_path / 'prometheus.yaml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
        ]
        processes.append(subprocess.Popen([*command, f"--web.listen-address={server.address}"], stderr=log))
        empty, deadline = ["not asked yet"], time.monotonic() + 400
        while empty and time.monotonic() < deadline:
            time.sleep(5)
            assert all(p.poll() is None for p in processes), (tmp_path / "prometheus.log").read_text()[-2000:]
            try:
                empty = server.empty()
            except OSError:
                continue  # still starting
        assert empty == []
        (group,) = server.ask("rules")["groups"]
        assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
        assert len(group["rules"]) == len(alerts()["groups"][0]["rules"])
        assert not [rule["lastError"] for rule in group["rules"] if rule.get("lastError")]
        kept = os.environ.get("MIXGF_KEEP_SERIES")
        if kept:
            now = time.time()
            series = {
                case.id: server.ask("query_range", query=plain(case.values[2]), start=now - 120, end=now, step=2)[
                    "result"
                ]
                for case in QUERIES
            }
            Path(kept).write_text(json.dumps(series))
    finally:
        stop.touch()
        for process in processes[::-1]:
            try:
                process.wait(timeout=60 if process is processes[0] else 0.1)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"{folder}-out", ignore_errors=True)
        Path(f"{folder}-prices.json").unlink()
