"""A whole campaign as a user submits it, over processes of their own on loopback: S3 (moto), MLflow, Ray's head and two nodes.

    python tests/cluster/test_campaign.py FOLDER        what it says is its transcript; with `prometheus` there, the boards as pictures, too
    python tests/cluster/test_campaign.py FOLDER pretrain finetune       the corpus and these stages only; no head is lost

Every stage is one `ray job submit` on bundled cells that lie in a bucket. In each of them a node is lost (SIGKILL to its raylet
and all that it started) and another one comes; in prepare and pretrain then the head, and the same line is given again to a new
cluster. At the end every file is compared with that of `mixgf run` in one place, on local disk, never disturbed (of a prediction's
part without the seconds that it took).
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import boto3
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))  # for a start as a program, without pytest
from processes import die_with_us, free_port

PATIENCE = 1200
"""Seconds that a busy machine may take for what is waited for."""
BUCKET = "campaign"
SOURCES = [f"{name}=s3://{BUCKET}/cells/{name}.h5ad" for name in ("human", "mouse")]
SETTINGS = {
    "prepare": ["prepare.shard_cells=20", "prepare.block_cells=20"],
    "pretrain": ["train.epochs=3", "train.batch_cells=16", "train.checkpoint_steps=5", "train.log_steps=1"],
    "embed": [],
    "classify": ["classify.epochs=2", "classify.seeds=2"],
    "finetune": ["classify.epochs=2", "train.checkpoint_steps=5", "train.log_steps=1"],
    "perturb": ["perturb.max_cells=16", "perturb.max_genes=40", "perturb.block_cells=4", "perturb.block_genes=10"],
    "report": [],
}
FOLDERS = {"prepare": "corpus", "report": "report.html"}
"""Of a stage's artifact, where it is not called like the stage."""
LOSE_NODE = {"prepare": 60, "pretrain": 30, "embed": 8, "classify": 12, "finetune": 10, "perturb": 8}
"""Files of the stage (steps of a training) that are there when a node is killed."""
LOSE_HEAD = {"prepare": 130, "pretrain": 70}
SLOW = {
    "RAY_agent_register_timeout_ms": "300000", "RAY_worker_register_timeout_seconds": "600",
    "RAY_gcs_server_port_wait_time_s": "300", "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "300", "RAY_health_check_failure_threshold": "10",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
}  # fmt: skip
"""Ray's patience with processes that are slow, not gone: a machine with other work on it is no lost node."""
LOSSES = ("loss", "mlm", "contrast", "grad_norm", "lr", "alignment", "uniformity", "val_loss", "val_accuracy")
TRAININGS = ("pretrain", "finetune")


def settings(stage):
    return [part for text in SETTINGS[stage] for part in ("--set", text)]


class Site:
    """The servers, the cluster, and what is said of them."""

    def __init__(self, folder):
        self.folder, self.began, self.running = folder, time.monotonic(), []
        self.temp = tempfile.mkdtemp(prefix="rc", dir="/tmp")  # Ray's sockets want a short path
        self.head, self.nodes, self.num_jobs, self.num_nodes, self.renewed = None, [], 0, 0, 0
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_"))} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
            "MIXGF_PRICES": f"s3://{BUCKET}/prices.json", **SLOW,
        }  # fmt: skip

    def say(self, text):
        sys.stdout.write(f"[{time.monotonic() - self.began:5.0f} s] {text}\n")
        sys.stdout.flush()

    def start(self, name, *command, **environment):
        """A process with its output in a file; killed when this one ends."""
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                die_with_us([str(part) for part in command]), stdout=log, stderr=log, cwd=ROOT, env=self.environment | environment
            )  # fmt: skip
        self.running.append(process)
        return process

    def wait(self, what, ready, *processes):
        """Until something holds; returns what it was."""
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            assert all(p.poll() is None for p in processes), f"{what}: a process ended"
            with contextlib.suppress(OSError):
                if found := ready():
                    return found
            time.sleep(0.1)
        msg = f"{what} did not come"
        raise AssertionError(msg)

    def get(self, url):
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.read()

    def servers(self):
        """S3 with the cells in it, and MLflow."""
        s3, mlflow = free_port(), free_port()
        url, tracking = f"http://127.0.0.1:{s3}", f"http://127.0.0.1:{mlflow}"
        self.environment["AWS_ENDPOINT_URL"] = url
        server = self.start("s3", sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", s3)
        self.wait("S3", lambda: self.get(url), server)
        self.s3 = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"
        )
        self.s3.create_bucket(Bucket=BUCKET)
        self.s3.put_object(Bucket=BUCKET, Key="prices.json", Body=json.dumps({"head": 0.1, "worker": 0.4}))
        self.say(f"S3 server: moto, s3://{BUCKET} with {', '.join(self.cells())}")
        command = [
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
            "--workers",
            "1",
        ]
        where = ["--artifacts-destination", f"s3://{BUCKET}/mlflow", "--host", "127.0.0.1", "--port", mlflow]
        server = self.start("mlflow", sys.executable, *command, *where)
        self.wait("MLflow", lambda: self.get(f"{tracking}/health"), server)
        self.environment["MLFLOW_TRACKING_URI"] = tracking
        self.say("MLflow server: SQLite, artifacts in the bucket")

    def cells(self):
        """Every fifth human and every fourth mouse cell of the bundled pancreas, put into the bucket."""
        import anndata

        for name, step in (("human", 5), ("mouse", 4)):
            path = self.folder / f"{name}.h5ad"
            every = anndata.read_h5ad(ROOT / f"mixgf/resources/pancreas_{name}_baron.h5ad")
            every.X = every.X.astype("float32")  # SciPy takes no rows of small whole numbers
            some = every[::step].copy()
            some.write_h5ad(path, compression="gzip")
            self.s3.upload_file(str(path), BUCKET, f"cells/{path.name}")
            yield f"{some.n_obs} {name} cells"

    def prometheus(self):
        """Prometheus over whatever nodes there are, if it is installed; returns its URL."""
        program, port = shutil.which("prometheus"), free_port()
        if program is None:
            self.say("no prometheus here (Debian package prometheus): no pictures of the boards")
            return ""
        found = {
            "file_sd_configs": [
                {"files": [f"{self.temp}/head/prom_metrics_service_discovery.json"], "refresh_interval": "2s"}
            ]
        }
        (self.folder / "prometheus.yaml").write_text(json.dumps(
            {"global": {"scrape_interval": "2s"}, "scrape_configs": [{"job_name": "ray", **found}]}
        ))  # fmt: skip
        self.start("prometheus", program, f"--config.file={self.folder}/prometheus.yaml",
                   f"--storage.tsdb.path={self.folder}/series", f"--web.listen-address=127.0.0.1:{port}")  # fmt: skip
        self.say("Prometheus: reads all nodes every 2 s")
        return f"http://127.0.0.1:{port}"

    def ray_start(self, name, kind, *options):
        """`ray start` for a node with ports and a folder of its own: what a node leaves behind is no other's."""
        ports = [f"--{what}={free_port()}" for what in ("dashboard-agent-listen-port", "metrics-export-port")]
        common = [
            "--block",
            "--disable-usage-stats",
            f"--temp-dir={self.temp}/{name}",
            f"--object-store-memory={100 << 20}",
            *ports,
        ]
        return self.start(name, "ray", "start", *options, *common, RAY_NODE_TYPE_NAME=kind)

    def cluster(self):
        """A head without CPUs and two nodes of one."""
        self.wait("a head and two nodes", self.up)
        self.say("Ray: a head without CPUs and two nodes of one CPU each")

    def up(self):
        """Whether the cluster is; a head that is gone, or that Ray gave up to start (after 30 s), is started anew."""
        if self.head is None or self.head.poll() is not None:
            for node in self.nodes:
                self.kill(node)
            self.nodes, self.port, dashboard = [], free_port(), free_port()
            self.environment["RAY_API_SERVER_ADDRESS"] = self.dashboard = f"http://127.0.0.1:{dashboard}"
            self.head = self.ray_start(
                "head", "head", "--head", "--num-cpus=0", f"--port={self.port}", f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={free_port()}", "--node-ip-address=127.0.1.1", "--dashboard-host=127.0.0.1",
            )  # fmt: skip
        self.get(f"{self.dashboard}/api/version")
        self.nodes = self.nodes or [self.node(), self.node()]
        return self.complete()

    def node(self):
        self.num_nodes += 1
        return self.ray_start(f"node{self.num_nodes}", "worker", "--num-cpus=1", f"--address=127.0.1.1:{self.port}",
                              f"--node-ip-address=127.0.1.{self.num_nodes + 1}")  # fmt: skip

    def complete(self):
        """Whether all nodes are up; one that Ray gave up to start (after 30 s) is started anew."""
        self.nodes = [node if node.poll() is None else self.node() for node in self.nodes]
        nodes = json.loads(self.get(f"{self.dashboard}/nodes?view=summary"))["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes) == 1 + len(self.nodes)

    def kill(self, process):
        """SIGKILL to a process and all that it started, as when the machine is gone."""
        if process.poll() is not None:
            return 0
        gone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for act in (psutil.Process.suspend, psutil.Process.kill):  # all at once: none has time for last words
            for one in gone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    act(one)
        process.wait()
        return len(gone)

    def close(self):
        mine = psutil.Process().children(recursive=True)
        for one in mine:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(mine, timeout=30)
        shutil.rmtree(self.temp, ignore_errors=True)

    # jobs

    def keys(self, prefix):
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def done(self, stage):
        """Files of the stage's artifact so far; of a training, the step of its latest checkpoint."""
        keys = self.keys(f"run/{FOLDERS.get(stage, stage)}/")
        if stage not in TRAININGS:
            return sum("/cost/" not in key for key in keys)
        return max((int(key.split("/")[3]) for key in keys if "/steps/" in key), default=0)

    def finished(self, stage):
        return bool(self.keys(f"run/{FOLDERS.get(stage, stage)}{'' if stage == 'report' else '/record.json'}"))

    def submit(self, stage):
        """`ray job submit`, whose output is said as it comes."""
        self.num_jobs += 1
        sources = SOURCES if stage == "prepare" else []
        line = ["ray", "job", "submit", "--working-dir", ".", "--submission-id", f"{stage}-{self.num_jobs}", "--", "python", f"jobs/{stage}.py",
                *sources, "--recipe", "demo", "--output", f"s3://{BUCKET}/run", *settings(stage)]  # fmt: skip
        self.say(f"$ {shlex.join(line)}")
        job = subprocess.Popen(
            die_with_us(line), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=self.environment
        )  # fmt: skip
        reader = threading.Thread(target=self.read, args=(job.stdout,), daemon=True)
        reader.start()
        self.running.append(job)
        return job, reader

    def read(self, output):
        """Say what a job says; what Ray says goes into a file."""
        with (self.folder / "jobs.log").open("a") as log:
            for text in output:
                log.write(text)
                if not re.match(r"\s|Traceback|\d{4}-\d\d-\d\d .* \w+\.py:\d+ -- ", text):
                    self.say(f"    {text.rstrip()[:200]}")

    def reached(self, stage, number, job):
        return self.wait(f"{number} of {stage}", lambda: (n := self.done(stage)) >= number and n, job)

    def stage(self, stage, *, lose_node, lose_head):
        """Submit a stage, lose a node in its middle, and perhaps the head; submit it again as long as it ends badly."""
        job, reader = self.submit(stage)
        unit = "steps" if stage in TRAININGS else "files"
        if lose_node:
            there = self.reached(stage, LOSE_NODE[stage], job)
            number = self.kill(self.nodes.pop(0))
            assert not self.finished(stage), f"{stage}: too late to lose a node"
            self.nodes.append(self.node())
            self.say(f"!! {stage} has {there} {unit}: kill -9 to a node, {number} processes; another one starts")
        if lose_head:
            there = self.reached(stage, LOSE_HEAD[stage], job)
            number = self.kill(self.head)
            assert not self.finished(stage), f"{stage}: too late to lose the head"
            self.say(f"!! {stage} has {there} {unit}: kill -9 to the head, {number} processes")
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(60)
        while (code := self.ended(job, reader)) and self.renewed < len(LOSE_HEAD) + 3:
            self.say(f"!! {stage} ended with exit code {code}; a new cluster, and the same line again")
            self.renew()
            job, reader = self.submit(stage)
        assert code == 0, f"{stage}: exit code {code}"
        assert self.finished(stage)
        self.wait("two nodes", self.complete, self.head)

    def ended(self, job, reader):
        """Exit code of a job's client; one that still waits for a cluster that is gone is ended."""
        give_up = time.monotonic() + PATIENCE
        while job.poll() is None and self.head.poll() is None and time.monotonic() < give_up:
            time.sleep(0.2)
        if job.poll() is None:
            self.kill(job)
        reader.join()
        return job.returncode

    def renew(self):
        """Another cluster in the place of this one."""
        self.kill(self.head)
        self.renewed += 1
        self.cluster()

    # what came of it

    def whole(self, stages):
        """The same in one place, from the same cells, the stages of `mixgf run` by it; returns its folder."""
        output = self.folder / "whole"
        commands = ["run", "finetune"] if set(stages) == set(SETTINGS) else stages
        for command in commands:
            mine = SETTINGS if command == "run" else [command]
            sources = SOURCES if command in ("run", "prepare") else []
            given = (part for stage in mine for part in settings(stage))
            self.local(["mixgf", command, *sources, "--recipe", "demo", "--output", str(output), *given])
        return output

    def local(self, line):
        """Run a command without the cluster."""
        self.say(f"$ {shlex.join(line)}".replace(str(self.folder / "whole"), "whole"))
        without = ("RAY_", "MLFLOW_TRACKING_URI", "MIXGF_PRICES")
        environment = {k: v for k, v in self.environment.items() if not k.startswith(without)} | {
            "PYTHONPATH": str(ROOT)
        }
        with (self.folder / "whole.log").open("a") as log:
            done = subprocess.run(
                [sys.executable, "-m", *line], stdout=log, stderr=log, env=environment, cwd=ROOT, check=False
            )  # fmt: skip
        assert done.returncode == 0, (self.folder / "whole.log").read_text()[-3000:]

    def contents(self, read, names):
        """By file of the artifacts: what it holds, without times and places."""
        found = {}
        for name in names:
            data = read(name)
            if name.endswith("record.json"):
                record = json.loads(data)
                found[name] = (record["fingerprint"], record["counts"])
            elif name.endswith("history.parquet"):
                rows = pq.read_table(pa.BufferReader(data)).to_pylist()
                found[name] = [(r["step"], r["name"], r["value"]) for r in rows if r["name"] in LOSSES]
            elif "/parts/predictions/" in name:
                table = pq.read_table(pa.BufferReader(data))
                facts = json.loads(table.schema.metadata[b"mixgf"])
                assert facts.pop("seconds") > 0
                found[name] = (facts, table.to_pylist())
            elif name.endswith((".parquet", ".safetensors", ".h5ad")):
                found[name] = hashlib.sha256(data).hexdigest()
        return found

    def compare(self, stages):
        """Every file of the campaign with that of the run never disturbed; returns the number of files."""
        whole = self.whole(stages)
        own = {"cost", "mlflow-artifacts"}  # beside the output, where no MLflow server is named
        here = [str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file() and not own & set(p.parts)]
        there = [key.removeprefix("run/") for key in self.keys("run/") if "/cost/" not in key]
        expected = self.contents(lambda name: (whole / name).read_bytes(), here)
        for name in there:
            path = self.folder / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.s3.download_file(BUCKET, f"run/{name}", str(path))
        found = self.contents(lambda name: (self.folder / "run" / name).read_bytes(), there)
        assert sorted(found) == sorted(expected)
        unequal = [name for name in expected if found[name] != expected[name]]
        assert unequal == [], unequal
        return len(found)

    def tracked(self):
        """Name, status and cost of the stages' runs on MLflow's server."""
        os.environ["MLFLOW_TRACKING_URI"] = self.environment["MLFLOW_TRACKING_URI"]
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        runs = client.search_runs([client.get_experiment_by_name("mixgf").experiment_id])
        return [
            (run.info.run_name, run.info.status, run.data.metrics)
            for run in runs[::-1]
            if run.data.tags.get("mixgf.stage") in SETTINGS
        ]


def main(folder, *chosen):
    """The campaign, or the corpus and some stages of it; raises where something is not as it must be."""
    stages = ["prepare", *chosen] if chosen else list(SETTINGS)
    folder = Path(folder).absolute()
    folder.mkdir(parents=True)
    site = Site(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        site.servers()
        boards = site.prometheus()
        site.cluster()
        for stage in stages:
            lose_node = stage in (chosen or LOSE_NODE)
            site.stage(stage, lose_node=lose_node, lose_head=not chosen and stage in LOSE_HEAD)
        assert " is left out: " not in (folder / "jobs.log").read_text(), "MLflow has all that was logged"
        for name, status, metrics in site.tracked():
            assert status == "FINISHED", f"{name}: {status}"
            hours = sum(v for k, v in metrics.items() if k.startswith("cost/node_hours/"))
            site.say(f"MLflow: {name} {status}, {hours:.3f} node-hours, cost {metrics['cost/total']:.4f}")
        if boards:
            pictures = [
                sys.executable,
                ROOT / "dashboards/draw.py",
                boards,
                folder,
                "--minutes",
                (time.monotonic() - site.began) / 60,
            ]
            subprocess.run([str(part) for part in pictures], check=True)
            site.say("the boards are drawn")
        site.say(f"{site.compare(stages)} files hold what those of the run never disturbed hold, byte for byte")
    finally:
        site.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_trainings_by_job_submit_that_lose_a_node_end_with_the_losses_of_those_never_disturbed(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "trainings"), *TRAININGS],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("kill -9 to a node") == len(TRAININGS)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_a_campaign_that_loses_nodes_and_heads_ends_with_the_bytes_of_one_never_disturbed(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "campaign")], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("kill -9 to a node") == len(LOSE_NODE)
    assert done.stdout.count("kill -9 to the head") == len(LOSE_HEAD)


if __name__ == "__main__":
    main(*sys.argv[1:])
