"""Kinds of faults while a stage runs: it is killed, its store or tracker fails, its disk is full. The same command must then go on."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from fake_cluster import STORE, cluster
from fault_proxy import Proxy, Rule
from s3_world import client

from mixgf.config.run import Tracking
from mixgf.storage import files, tables
from mixgf.tracking import mlflow_runs, store
from tests.faults.campaign import LOST, REFUSED, SURVIVED, Kind
from tests.faults.chain import STAGES, Chain, Ended, stage_of

STOPPED = "mixgf: stopped by SIGTERM; the same command continues where it stopped"
COMMANDS = 4
"""Most times that a command is given until it ends well."""
GIVEN = 8
"""Most times that a command is given in a new output until it is killed before it ends."""
BUCKET = "faults"

Ending = tuple[str, str]


def _wrong(ended: Ended) -> str:
    """What is wrong with a command that ended with an error of its own; "" = it is one clear line."""
    lines = [line for line in ended.said.splitlines() if line.startswith("mixgf: ")]
    if ended.traceback:
        return f"exit {ended.code} and a traceback: {ended.traceback}"
    if len(lines) != 1 or "did not end" in ended.line:
        return f"exit {ended.code} with {len(lines)} lines: {ended.said[-300:]}".replace("\n", " | ")
    return "" if len(ended.line) <= 1_000 and "failed: " not in ended.line else f"not clear: {ended.line[:300]}"


def _finished(chain: Chain, name: str, output: str, again: Callable[[int], Ended], *, ray: bool = False) -> Ending:
    """Give the command until it ends well, then compare what is there with what the stage makes undisturbed."""
    told = ""
    for time_given in range(COMMANDS):
        ended = again(time_given)
        if ended.code == 0:
            if ended.traceback:
                return LOST, f"{name}: exit 0 and a traceback: {ended.traceback}"
            unequal = chain.unequal(name, output, ray=ray)
            return (
                (LOST, f"{name}: other files: {unequal[:5]}")
                if unequal
                else (REFUSED if told else SURVIVED, told[:300])
            )
        if wrong := _wrong(ended):
            return LOST, f"{name}: {wrong}"
        told = ended.line
    return LOST, f"{name}: does not go on after {COMMANDS} commands: {told}"


def _stopped(ended: Ended, number: int) -> str:
    """What is wrong with a command that a signal ended; "" = nothing."""
    if number == signal.SIGKILL:
        return "" if ended.code == -signal.SIGKILL else f"exit {ended.code} after SIGKILL"
    if ended.code == -signal.SIGTERM and not ended.said.strip():
        return ""  # before the command began
    if ended.code != 143 or ended.line != STOPPED or ended.traceback:
        return f"exit {ended.code} after SIGTERM: {ended.said[:1_000]}".replace("\n", " | ")
    return ""


def _signal(pid: int, which: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(pid, which)


def kills(chain: Chain, wanted: int) -> Kind:
    """SIGKILL or SIGTERM to a command that does all work itself, once to three times, then the command again.

    The moment is a part of the time that the stage takes, or the file after which the signal is sent. A command that ended before
    the first signal is given once more in a new output.
    """

    def struck(name: str, output: Path, draw: random.Random, told: list[str]) -> str:
        """Give a command and kill it, and so on; returns what is wrong with its end. `told` gets a line for each signal."""
        words, log = chain.words(name, str(output)), Path(f"{output}.log")
        placed = chain.placed(chain.undisturbed(name).with_suffix(".log"))
        for _ in range(draw.randrange(1, 4)):
            which = draw.choice([signal.SIGKILL, signal.SIGTERM])
            part, files_first = draw.random(), draw.randrange(1, placed) if draw.random() < 0.5 < placed - 1 else 0
            log.unlink(missing_ok=True)
            Path(f"{log}.written").unlink(missing_ok=True)
            chain.server.start(words, log)
            if files_first:
                moment, ended = f"after file {files_first} of {placed}", chain.server.ended_before(files_first)
            else:
                moment, ended = f"at {part:.0%} of its time", chain.server.ended(chain.seconds[name, False] * part)
            if ended is not None:
                if not told:  # the time of a whole run
                    chain.seconds[name, False] = min(ended.seconds, chain.seconds[name, False])
                return f"went not on: {ended.said[-300:]}" if ended.code else ""
            _signal(chain.server.pid, which)
            sent = time.monotonic()
            ended = chain.server.end()
            if ended.code == 0:
                return ""  # it ended meanwhile
            told.append(f"{which.name} {moment}")
            if wrong := _stopped(ended, which):
                return wrong
            if time.monotonic() - sent > 30:
                return f"{time.monotonic() - sent:.0f} s until its end"
        return ""

    def attempt(number: int) -> Ending:
        draw, name = random.Random(number), stage_of(number)
        chain.undisturbed(name)
        told: list[str] = []
        for given in range(GIVEN):
            with chain.output(name, number) as output:
                wrong = struck(name, output, draw, told)
                if not told and not wrong and given < GIVEN - 1:
                    continue
                how = f"{name}, {len(told)} kills, {', '.join(told)}"
                if wrong:
                    return LOST, f"{how}: {wrong}"
                ending, line = _finished(chain, name, str(output), again(name, output))
                return (LOST if ending == REFUSED else ending), f"{how}: {line}"
        raise AssertionError

    def again(name: str, output: Path) -> Callable[[int], Ended]:
        words, log = chain.words(name, str(output)), Path(f"{output}.log")
        log.unlink(missing_ok=True)
        return lambda _: chain.server.run(words, log)

    return Kind("kills of a command", wanted, attempt)


NO_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of Ray's processes that do no work of a stage. A raylet ends with its agents, and a driver with the raylet of its node."""


class Nodes:
    """A Ray cluster of a head without CPUs and two nodes of one, of which one can be lost."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.stack = chain, contextlib.ExitStack()
        self.made: Any = None

    def up(self) -> None:
        """Start the cluster, or the nodes that are missing."""
        if self.made is None:
            self.made = self.stack.enter_context(cluster())
            self.nodes = []
            self.chain.env = {"RAY_ADDRESS": self.made.address, "RAY_AUTH_MODE": "disabled"}
        while len(self.nodes) < 2:
            self.nodes.append(self.made.add_node(num_cpus=1, **STORE))

    def workers(self) -> list[psutil.Process]:
        """Processes that work on tasks, actors or a training."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and not title.startswith(NO_WORK):
                    found.append(process)
        return found

    def strike(self, victim: str, draw: random.Random) -> bool:
        """Kill a worker or a node; returns whether there was one. A driver is not killed here."""
        if victim == "worker":
            if not (found := self.workers()):
                return False
            with contextlib.suppress(psutil.NoSuchProcess):
                draw.choice(found).kill()
                return True
            return False
        if victim == "raylet":
            self.made.remove_node(self.nodes.pop(draw.randrange(2)), allow_graceful=False)
        return True

    def close(self) -> None:
        self.stack.close()


def kills_on_ray(chain: Chain, nodes: Nodes, wanted: int) -> Kind:
    """On two nodes, once to three times: SIGKILL to a worker or to a raylet with all that it started, or a signal to the driver.

    A command that ended so is given again, and disturbed again. One that ended before the first kill is given once more in a new
    output.
    """
    stages = [name for name in STAGES if name not in ("report", "export")]  # these do not use Ray
    victims = ("worker", "raylet", "driver", "driver, SIGTERM")

    def attempt(number: int) -> Ending:
        draw, name = random.Random(number), stages[number % len(stages)]
        victim = victims[(number // len(stages) + number % len(stages)) % len(victims)]
        nodes.up()
        chain.undisturbed(name, ray=True)
        for _ in range(GIVEN):
            with chain.output(name, number) as output:
                hits, (ending, line) = tried(name, victim, output, draw)
            if hits or ending == LOST:
                break
        return ending, f"{name}, {victim}, {hits} kills: {line}"

    def tried(name: str, victim: str, output: Path, draw: random.Random) -> tuple[int, Ending]:
        """Give the command, disturbed, until it ends; returns the number of kills, too."""
        which = signal.SIGTERM if "SIGTERM" in victim else signal.SIGKILL
        words, log = chain.words(name, str(output)), Path(f"{output}.log")
        hits, by_signal = 0, False
        ended: Ended | None = None
        chain.server.start(words, log, env=chain.env, ray=True)
        for _ in range(draw.randrange(1, 4)):
            if by_signal:
                log.unlink()
                chain.server.start(words, log, env=chain.env, ray=True)
                by_signal = False
            ended = chain.server.ended(chain.seconds[name, True] * draw.uniform(0.1, 0.95))
            while ended is None and not nodes.strike(victim, draw):
                ended = chain.server.ended(0.02)
            if ended is not None:
                break
            if "driver" in victim:
                _signal(chain.server.pid, which)
                ended = chain.server.end()
                if ended.code == 0:
                    break  # it ended meanwhile
                if wrong := _stopped(ended, which):
                    return hits, (LOST, wrong)
                by_signal = True
            hits += 1
            nodes.up()
        last = ended or chain.server.end()
        if not hits and last.code == 0:  # the time of a whole run
            chain.seconds[name, True] = min(last.seconds, chain.seconds[name, True])

        def again(time_given: int) -> Ended:
            if time_given == 0 and not by_signal:
                return last
            log.unlink(missing_ok=True)
            return chain.server.run(words, log, env=chain.env, ray=True)

        return hits, _finished(chain, name, str(output), again, ray=True)

    return Kind("kills on Ray", wanted, attempt)


def s3_faults(chain: Chain, url: str, percent: int, wanted: int) -> Kind:
    """So many of a hundred requests to object storage are slow, answered by 500 or 503, dropped, or cut off."""
    keys = ("faultkey", "faultsecret-planted")
    s3 = client(url, *keys)
    stages = [name for name in STAGES if name != "annotate"]  # its file lies on disk
    there: set[str] = set()

    def put(artifact: str) -> None:
        """Upload an artifact, once."""
        if artifact in there:
            return
        made = chain.made(artifact, ray=False)
        for path in [made] if made.is_file() else [one for one in made.rglob("*") if one.is_file()]:
            s3.upload_file(str(path), BUCKET, f"whole/{artifact}/{path.relative_to(made)}")
        there.add(artifact)

    def attempt(number: int) -> Ending:
        draw, name = random.Random(number), stages[number % len(stages)]
        chain.undisturbed(name)
        with contextlib.suppress(s3.exceptions.BucketAlreadyOwnedByYou, s3.exceptions.BucketAlreadyExists):
            s3.create_bucket(Bucket=BUCKET)
        output, log = f"s3://{BUCKET}/{percent}-{number}", chain.folder / f"s3-{percent}-{number}.log"
        s3.put_object(Bucket=BUCKET, Key=f"{percent}-{number}/notes.txt", Body=b"of a user")
        for artifact in STAGES[name].needs:
            put(artifact)
            for item in s3.list_objects_v2(Bucket=BUCKET, Prefix=f"whole/{artifact}/")["Contents"]:
                s3.copy_object(
                    Bucket=BUCKET, CopySource={"Bucket": BUCKET, "Key": item["Key"]},
                    Key=item["Key"].replace("whole", f"{percent}-{number}", 1),
                )  # fmt: skip
        kinds = ("delay", "error", "busy", "drop", "lose", "break", "cut", "short")
        share = percent / 100 / len(kinds)
        rules = [Rule(kind, "", when=lambda _: draw.random() < share, seconds=1.0) for kind in kinds]
        with Proxy(url.removeprefix("http://"), rules) as proxy:
            env = {
                "AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1],
                "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            }  # fmt: skip

            def again(time_given: int) -> Ended:
                if time_given == COMMANDS - 1:
                    proxy.fresh()  # the network is well again
                log.unlink(missing_ok=True)
                return chain.server.run(chain.words(name, output), log, env=env)

            with _s3_in_this_process(url, keys):
                ending, line = _finished(chain, name, output, again)
            return ending, f"{name}, {sum(rule.hits for rule in rules)} faults: {line}"

    return Kind(f"{percent} % of S3 requests fail", wanted, attempt)


@contextlib.contextmanager
def _s3_in_this_process(url: str, keys: tuple[str, str]) -> Iterator[None]:
    """Read the bucket here, past the proxy."""
    from mixgf.storage import s3

    new = {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1], "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    s3.forget_connections()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        s3.forget_connections()


def can_mount() -> bool:
    """Whether this process may mount a file system in memory."""
    if os.geteuid() or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", place], check=True)
    return done.returncode == 0


def full_disk(chain: Chain, wanted: int) -> Kind:
    """The output is a small file system that is full when a part of the stage's files is written; then it has room again."""

    def attempt(number: int) -> Ending:
        draw, name = random.Random(number), stage_of(number)
        chain.undisturbed(name)
        with chain.output(name, number) as linked:
            place = chain.folder / f"disk-{number}"
            place.mkdir(exist_ok=True)
            needed = sum(path.stat().st_size for path in linked.rglob("*") if path.is_file())
            whole = sum(files.find(str(chain.undisturbed(name))).values())
            # a file takes whole blocks of 4 KiB
            blocks = 4096 * (sum(1 for _ in linked.rglob("*")) + 4)
            size = (needed + blocks + int((whole - needed) * draw.random())) // 4096 * 4096
            _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
            try:
                shutil.copytree(linked, place, dirs_exist_ok=True)
                words, log = chain.words(name, str(place)), Path(f"{linked}.log")

                def again(time_given: int) -> Ended:
                    if time_given:
                        _mount("-o", f"remount,size={64 << 20}", str(place))
                    log.unlink(missing_ok=True)
                    return chain.server.run(words, log)

                ending, line = _finished(chain, name, str(place), again)
                if ending == REFUSED and not re.search(rf"{place}/\S+: no space left", line):
                    return LOST, f"{name}: {line}"
                return ending, f"{name}: {line}"
            finally:
                subprocess.run(["umount", "--lazy", str(place)], check=True)
                place.rmdir()

    return Kind("full disk", wanted, attempt)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


TRACKED = [name for name in STAGES if name not in ("annotate", "report", "export")]
"""Stages that have a run in MLflow."""


def dead_tracker(chain: Chain, wanted: int) -> Kind:
    """Nobody listens where MLflow should be, or a server is there that never answers."""

    def attempt(number: int) -> Ending:
        name = TRACKED[number // 2 % len(TRACKED)]
        if number % 2 == 0:
            return _tracked(chain, name, number, "dead", "http://127.0.0.1:9", most=60)
        with Proxy("127.0.0.1:9", [Rule("hold", "")]) as silent:
            ending = _tracked(chain, name, number, "silent", silent.url, most=90)
            silent.rules[0].go.set()
            return ending

    return Kind("dead MLflow", wanted, attempt)


def _tracked(chain: Chain, name: str, number: int, how: str, uri: str, *, most: float) -> Ending:
    """A stage with a tracker that takes nothing; it may take `most` seconds more than without."""
    with chain.output(name, number) as output:
        ending, line, told = _with_tracker(chain, name, output, Tracking(uri=uri), most=most)
        if ending == SURVIVED and told != 1:
            return LOST, f"{name}: said {told} times that MLflow is away"
        return ending, f"{name}, {how}: {line}" if ending == SURVIVED else line


def _with_tracker(chain: Chain, name: str, output: Path, tracking: Tracking, *, most: float) -> tuple[str, str, int]:
    """Run a stage with a tracker, and compare what it makes; returns how often it said that MLflow is away, too."""
    chain.undisturbed(name)
    ended = chain.server.run(chain.words(name, str(output), tracking=tracking), Path(f"{output}.log"))
    told = ended.said.count("MLflow at ")
    if ended.code or ended.traceback:
        return LOST, f"{name}: exit {ended.code}: {ended.said[-300:]}", told
    if re.search(r"MLflow: \w+ is left out", ended.said):
        return LOST, f"{name}: {ended.said[-300:]}", told
    if told > 1:
        return LOST, f"{name}: said {told} times that MLflow is away: {ended.said[-500:]}", told
    without = chain.seconds[name, False]
    if ended.seconds > 3 * without + most:
        return LOST, f"{name}: {ended.seconds:.0f} s, {without:.0f} s without a tracker", told
    if unequal := chain.unequal(name, str(output)):
        return LOST, f"{name}: other files: {unequal[:5]}", told
    return SURVIVED, f"{ended.seconds:.0f} s, {without:.0f} s without", told


def slow_tracker(chain: Chain, server: str, wanted: int) -> Kind:
    """MLflow answers each request seconds late, or stops to answer amid the stage; nothing is lost, no step of a training waits for it."""
    undelayed: dict[str, tuple[dict[tuple[str, str], Any], int]] = {}
    """By stage: what MLflow has of it when nothing is late, and the number of requests."""

    def attempt(number: int) -> Ending:
        draw, name = random.Random(number), TRACKED[number // 2 % len(TRACKED)]
        address = server.removeprefix("http://")
        if name not in undelayed:
            with Proxy(address) as proxy:
                ending, line, logged = _recorded(
                    chain, name, number, server, url=proxy.url, experiment=f"whole {name} {number}", late=0.0
                )
            if ending == LOST:
                return LOST, f"{name}, nothing late: {line}"
            undelayed[name] = logged, len(proxy.passed)
        whole, requests = undelayed[name]
        late, begin = draw.uniform(0.2, 5.0), draw.randrange(requests)
        hangs = number % 2 == 1
        rule = Rule("hold", "", when=lambda i: i > begin) if hangs else Rule("delay", "", seconds=late)
        how = f"no answer after {begin} of {requests} requests" if hangs else f"{late:.1f} s per request"
        with Proxy(address, [rule]) as proxy:
            try:
                ending, line, logged = _recorded(
                    chain, name, number, server, url=proxy.url, experiment=f"slow {number}", late=rule.seconds + 1.0
                )
            finally:
                rule.go.set()
        if ending == SURVIVED and (names := sorted(_unequal(logged, whole))):
            ending, line = LOST, f"other records: {names[:5]}"
        return ending, f"{name}, {how}, {rule.hits} met: {line}"

    return Kind("slow MLflow", wanted, attempt)


def _unequal(one: dict[Any, Any], other: dict[Any, Any]) -> list[Any]:
    return [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]


def _recorded(
    chain: Chain, name: str, number: int, server: str, *, url: str, experiment: str, late: float
) -> tuple[str, str, dict[tuple[str, str], Any]]:
    """A stage with a tracker behind a URL; returns its ending, a line, and what MLflow has after the next stage of this output.

    What is on its way to the server arrives after `late` seconds.
    """
    with chain.output(name, number) as output:
        ending, line, told = _with_tracker(chain, name, output, Tracking(uri=url, experiment=experiment), most=240)
        kept = [one for one in files.list_dir(f"{output}/tracking") if one.startswith("unsent-")]
        before, took = _step_seconds(chain.undisturbed(name)), _step_seconds(output)
        if ending == SURVIVED and kept and told != 1:
            ending, line = LOST, f"{kept} kept, but nothing said"
        if ending == SURVIVED and took > 2 * before + 5:
            ending, line = LOST, f"the steps of a training took {took:.1f} s, {before:.1f} s without a tracker"
        if ending == LOST:
            return ending, line, {}
        time.sleep(late)
        config = replace(chain.config, output=str(output), tracking=Tracking(uri=server, experiment=experiment))
        with mlflow_runs.stage(config, LATER, {}, "later"):
            pass
        if any(one.startswith("unsent-") for one in files.list_dir(f"{output}/tracking")):
            return LOST, "the next stage did not send what was kept", {}
        line = f"{line}; steps {took:.1f} s, {before:.1f} s without; {len(kept)} kept"
        return ending, line, _logged(server, experiment, output)


LATER = "a later stage"
TIMED = ("system/", "speed/", "progress/")
"""Metrics that depend on the time that the work takes."""


def _logged(server: str, experiment: str, output: Path) -> dict[tuple[str, str], Any]:
    """What MLflow has of the runs of an experiment, by run and name: status, parameters, figures, artifacts."""
    client = store.client_of(server)
    found: dict[tuple[str, str], Any] = {}
    ident = client.get_experiment_by_name(experiment).experiment_id
    for run in client.search_runs([ident], max_results=1000, order_by=["attributes.start_time ASC"]):
        if (name := run.info.run_name) == LATER:
            continue
        name = "output" if name == output.name else name
        while (name, "status") in found:
            name += " again"
        found[name, "status"] = run.info.status
        found[name, "models"] = len(run.outputs.model_outputs) if run.outputs else 0
        found[name, "inputs"] = sorted(one.dataset.digest for one in run.inputs.dataset_inputs) if run.inputs else []
        found |= {
            (name, f"param {key}"): value.replace(str(output), "OUTPUT") for key, value in run.data.params.items()
        }
        found |= {(name, f"artifact {one.path}"): one.is_dir for one in client.list_artifacts(run.info.run_id)}
        for metric in run.data.metrics:
            if not metric.startswith(TIMED):
                rows = client.get_metric_history(run.info.run_id, metric)
                exact = metric.startswith(("loss/", "heldout/", "vectors/", "optimizer/"))
                found[name, metric] = sorted((row.step, row.value) for row in rows) if exact else len(rows)
    return found


def _step_seconds(output: Path) -> float:
    """Seconds that the steps of all trainings of an output took, which have 16 cells each."""
    histories = [tables.read_table(str(path)).to_pylist() for path in output.rglob("history.parquet")]
    return sum(16 / row["value"] for rows in histories for row in rows if row["name"] == "cells_per_s")
