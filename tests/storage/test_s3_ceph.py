"""The laws of prepare on a real S3 store: Ceph's object gateway on loopback, which checks keys and conditions.

Runs where Debian's ceph-mon, ceph-osd, ceph-common and radosgw are installed (`.ci/run` sees to that), else is skipped.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
import s3_world
from fault_proxy import Proxy, Rule, every, first
from processes import die_with_us, free_port

from mixgf import cli
from mixgf.config.data import Source
from mixgf.config.parse import to_dict
from mixgf.errors import AccessError, UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import artifacts, files

NEEDED = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph", "setpriv")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.ceph,
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install radosgw ceph-mon ceph-osd ceph-common"
    ),
]
KEY, GUEST, SECRET = "cephkey", "guestkey", "cephsecret"
ROOT = f"s3://{s3_world.BUCKET}/data"

CONF = """[global]
fsid = {fsid}
public network = 127.0.0.0/8
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd crush chooseleaf type = 0
osd objectstore = memstore
osd class update on start = false
osd crush update on start = false
memstore device bytes = 2147483648
mon allow pool size one = true
mon max pg per osd = 2000
mon data avail crit = 0
mon data avail warn = 0
mon initial members = a
mon host = v1:127.0.0.1:{mon_port}
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
pid file =
[mon.a]
mon data = {folder}/mon
mon cluster log file = {folder}/cluster.log
[osd.0]
osd data = {folder}/osd
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw dns name = 127.0.0.1
rgw run sync thread = false
rgw thread pool size = 16
"""


@contextlib.contextmanager
def ceph(folder: Path):
    """One monitor, one store in memory, one gateway; yields its URL. Every process dies with this one.

    A client of Ceph 16 can send its first command before it knows the cluster's id, and is refused (EPERM). So the store sends none
    (`update on start`), and other commands are given again.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CEPH", "AWS"))}
    fsid, mon_port, port = str(uuid.uuid4()), free_port(), free_port()
    conf = folder / "ceph.conf"
    conf.write_text(CONF.format(fsid=fsid, mon_port=mon_port, port=port, folder=folder))
    for name in ("mon", "osd"):
        (folder / name).mkdir()
    daemons: dict[str, subprocess.Popen] = {}

    def once(program, *args):
        command = die_with_us([program, "--conf", str(conf), *args])
        for _ in range(10):
            found = subprocess.run(
                command, env=env, cwd=folder, capture_output=True, text=True, timeout=240, check=False
            )
            if "EPERM" not in found.stderr:
                break
        assert found.returncode == 0, f"{program} {args}: {found.stderr[-2000:]}"
        return found.stdout

    def daemon(*command):
        with (folder / f"{command[0]}.out").open("w") as out:
            run = die_with_us([*command[:1], "--conf", str(conf), "-f", *command[1:]])
            daemons[command[0]] = subprocess.Popen(run, env=env, cwd=folder, stdout=out, stderr=out)

    monmap = str(folder / "monmap")
    try:
        once("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", monmap)
        once("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        daemon("ceph-mon", "-i", "a")
        once("ceph", "osd", "create")
        once("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", str(uuid.uuid4()))
        once("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
        daemon("ceph-osd", "-i", "0")
        daemon("radosgw", "-n", "client.rgw")
        for _ in range(2000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            for name, one in daemons.items():
                assert one.poll() is None, f"{name} ended: {(folder / f'{name}.out').read_text()[-2000:]}"
            time.sleep(0.1)
        for user, key in (("cells", KEY), ("guest", GUEST)):
            keys = (f"--access-key={key}", f"--secret-key={SECRET}")
            once(
                "radosgw-admin", "-n", "client.rgw", "user", "create", f"--uid={user}", f"--display-name={user}", *keys
            )
        yield f"http://127.0.0.1:{port}"
    finally:
        for one in reversed(daemons.values()):
            one.kill()
        for one in daemons.values():
            one.wait()


@pytest.fixture(scope="module")
def gateway():
    """A gateway that answers. A start can lose its port to another test's server, so it is tried on three sets of ports."""
    with contextlib.ExitStack() as stack:
        for attempt in range(3):
            folder = Path(tempfile.mkdtemp(prefix="ceph-", dir="/tmp"))  # paths of sockets are short
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            try:
                url = stack.enter_context(ceph(folder))
                break
            except AssertionError as error:
                if attempt == 2:
                    raise
                warnings.warn(f"Ceph did not start, attempt {attempt + 1}: {error}", stacklevel=1)
        yield url


@pytest.fixture(scope="module")
def world(small_world):
    return small_world


@pytest.fixture(scope="module")
def shared_proxy(gateway, world):
    s3_world.put_sources(s3_world.client(gateway, KEY, SECRET), world)
    with Proxy(gateway.removeprefix("http://")) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy, s3_settings):
    s3_settings(shared_proxy.url, KEY, SECRET)
    shared_proxy.fresh()
    return shared_proxy


@pytest.mark.ray
def test_the_command_prepares_from_and_to_ceph_through_faults(world, proxy, tmp_path):
    config = world.on(ROOT, f"s3://{s3_world.BUCKET}/run")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    rules = proxy.fresh(
        Rule("lose", "PUT .*/plan.json", when=first(1)),
        Rule("break", "^GET .*/(ant|work)", when=lambda i: i in (2, 30)),
        Rule("cut", "^GET .*/(bee|cow)", when=lambda i: i in (2, 9)),
        Rule("busy", "^(PUT|HEAD) ", when=lambda i: i in (5, 40)),
        Rule("drop", "^GET ", when=lambda i: i in (7, 60)),
        Rule("delay", "^GET ", when=every(10), seconds=0.05),
    )
    command = [sys.executable, "-m", "mixgf", "prepare", "--config", str(tmp_path / "config.json")]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert found.returncode == 0, found.stderr
    assert all(rule.hits for rule in rules), [(r.kind, r.match, r.seen) for r in rules if not r.hits]
    proxy.fresh()
    assert s3_world.contents(f"{config.output}/corpus") == world.local
    assert prepare.run(config, executor=LocalExecutor()) == f"{config.output}/corpus"
    assert not any(p.what.startswith(("PUT", "POST")) for p in proxy.passed)


@pytest.mark.parametrize(
    ("key", "secret"), [(KEY, "wrong"), ("nobody", SECRET), (GUEST, SECRET)], ids=["secret", "key", "rights"]
)
def test_who_may_not_read_is_told_so_in_one_line(key, secret, world, proxy, s3_settings, tmp_path, ray_local, capsys):  # noqa: PLR0917
    s3_settings(proxy.url, key, secret)
    sources = (Source(uri=f"{ROOT}/bee.h5", species="bee"),)
    config = dataclasses.replace(world.config, sources=sources, output=str(tmp_path / "out"))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert cli.main(["prepare", "--config", str(tmp_path / "config.json")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"mixgf: s3://cells/data/bee.h5: access denied [^\n]*check AWS_ACCESS_KEY_ID[^\n]*", line)
    assert len(proxy.passed) == 1, "nothing that is refused is asked for twice"


def test_who_loses_the_right_to_write_blames_no_source(world, proxy, s3_settings):
    config = world.on(str(world.folder / "data"), f"s3://{s3_world.BUCKET}/guest")
    s3_settings(proxy.url, GUEST, SECRET)
    with pytest.raises(AccessError, match=r"^s3://cells/guest/corpus/\S+: access denied"):
        prepare.run(config, executor=LocalExecutor())


def test_of_runs_that_claim_one_folder_at_once_one_gets_it(proxy):
    plans = [artifacts.plan("corpus", 1, {"seed": seed}, {}) for seed in range(6)]

    def claim(uri, plan):
        try:
            return artifacts.begin(uri, plan)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(plans)) as threads:
        for attempt in range(3):
            uri = f"s3://{s3_world.BUCKET}/claims/{attempt}"
            answers = list(threads.map(lambda plan, uri=uri: claim(uri, plan), plans))
            assert answers.count(True) == 1
            winner = plans[answers.index(True)]
            assert files.read_json(f"{uri}/plan.json")["fingerprint"] == winner.fingerprint
            others = [answer for answer in answers if answer is not True]
            assert all(
                re.search(r"holds another corpus: config.seed: \d -> \d\. Choose another output", a) for a in others
            )


def test_big_objects_go_up_in_parts(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 5 << 20)  # the least that S3 takes
    data = np.random.default_rng(0).bytes(11 << 20)
    (tmp_path / "big").write_bytes(data)
    rules = proxy.fresh(
        Rule("drop", "PUT .*partNumber=2", when=first(1)), Rule("lose", "POST .*uploadId", when=first(1))
    )
    files.upload(tmp_path / "big", f"s3://{s3_world.BUCKET}/parts/big")
    assert all(rule.hits for rule in rules)
    assert files.sha256(f"s3://{s3_world.BUCKET}/parts/big") == files.sha256(str(tmp_path / "big"))
