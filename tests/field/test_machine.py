"""Laws of machines as people have them: long paths, other users, proxies, folders that cannot be written, kills at a bad moment."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from mixgf.config.data import HUMAN
from mixgf.errors import UserError
from mixgf.genes.vocabulary import Vocabulary, build_vocabulary
from mixgf.tracking import store
from mixgf.tracking.delivery import Delivery
from tests.field import make_cases as make
from tests.field.prepared import run_prepare


def test_a_long_temporary_folder_gives_ray_a_shorter_one(monkeypatch, tmp_path):
    from mixgf.distributed import session

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setattr(session, "_can_hold_ray", lambda _: True)
    assert session.own_folder() is None
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 100)
    folder = session.own_folder()
    try:
        socket = f"{folder}/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
        assert len(socket) <= 107
    finally:
        Path(folder).rmdir()
    monkeypatch.setattr(session.os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"TMPDIR = '/tmp/x+': 105 bytes; .* set RAY_TMPDIR to a short one"):
        session.own_folder()


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_ray_folder_that_cannot_be_used_gives_ray_another_one(kind, monkeypatch, tmp_path):
    from mixgf.distributed import session

    short = Path(tempfile.mkdtemp(dir="/tmp", prefix="r"))
    try:
        monkeypatch.setenv("RAY_TMPDIR", str(short))
        assert session.own_folder() is None
        (short / "ray").mkdir()
        assert session.own_folder() is None
        (short / "ray").rmdir()
        (short / "ray").write_text("") if kind == "file" else (short / "ray").symlink_to(tmp_path / "gone")
        folder = session.own_folder()
        assert folder is not None
        Path(folder).rmdir()
        monkeypatch.setattr(session.os, "access", lambda *_: False)
        with pytest.raises(
            UserError, match=rf"{short}/ray: cannot be written \(of another user\?\), .* set RAY_TMPDIR to a short one"
        ):
            session.own_folder()
    finally:
        shutil.rmtree(short)


USERS = """
import os, sys
from mixgf.config.run import Config
from mixgf.distributed import session
import ray
with session.session(Config()):
    print(os.geteuid(), ray.get(ray.remote(lambda: 6 * 7).remote()), ray._private.worker._global_node.get_session_dir_path())
"""


NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def python_of_nobody(environment):
    """A Python with the packages of this one that the user `nobody` can start, or a skip."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user")
    starts = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import ray'], check=True)"
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        command = [*NOBODY, python, "-B", "-c", starts]
        if (
            Path(python).exists()
            and not subprocess.run(command, check=False, env=environment, capture_output=True, cwd="/").returncode
        ):
            return python
    return pytest.skip("another user cannot start this Python")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_a_second_user_of_a_machine_starts_ray_beside_the_first_one(mode, tmp_path):
    """The folder of Ray is the first user's: as Ray makes it (0777), or with the rights of a strict machine (0755)."""
    shared = Path(tempfile.mkdtemp(dir="/tmp", prefix="u"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    packages = os.pathsep.join([str(Path.cwd()), *(p for p in sys.path if p.endswith("-packages"))])
    environment = kept | {"HOME": "/proc/none", "RAY_TMPDIR": str(shared), "PYTHONPATH": packages}
    try:
        python = python_of_nobody(environment)
        shared.chmod(0o777)
        (shared / "ray").mkdir()
        (shared / "ray").chmod(mode)
        (shared / "ray/session_latest").symlink_to("session_of_the_first_user")
        done = subprocess.run(
            [*NOBODY, python, "-B", "-c", USERS], check=False, env=environment, cwd="/", capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2_000:]
        uid, answer, session = done.stdout.split()
        assert (uid, answer) == ("65534", "42")
        assert session.startswith(str(shared)) == (mode == 0o777)
    finally:
        shutil.rmtree(shared)


class _Answers(BaseHTTPRequestHandler):
    """A server that answers every request, and keeps what was asked."""

    asked: ClassVar[list[str]] = []

    def do_POST(self):
        self.asked.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"experiments": []}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def answering():
    _Answers.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.mark.parametrize("before", ["", "example.org"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_tracker_on_this_machine_is_reached_past_a_proxy(before, host, answering, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")  # nothing listens there
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", before)
    monkeypatch.setenv("no_proxy", "")
    assert store.Store(f"http://{host}:{answering}").answers()
    assert _Answers.asked
    for name in ("NO_PROXY", "no_proxy"):
        assert os.environ[name].split(",") == [*filter(None, [before]), host]


def test_a_tracker_elsewhere_takes_the_proxy_and_the_warning_names_it(monkeypatch, caplog):
    from mixgf import proxies

    for name in ("http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@proxy:3128")
    proxies.go_past("http://tracker:5000")
    assert "NO_PROXY" not in os.environ
    assert proxies.proxy_of("http://tracker:5000") == "http://***@proxy:3128"
    assert not proxies.proxy_of("sqlite:///mlflow.db")
    down = Delivery("http://tracker:5000", lambda _: None, lambda: False)
    down.tell("the work goes on")
    assert "requests take the proxy http://***@proxy:3128: set NO_PROXY to the tracker's host" in caplog.text
    monkeypatch.setenv("NO_PROXY", "tracker")
    assert not proxies.proxy_of("http://tracker:5000")


def test_a_submitted_job_carries_the_code_without_cells_and_models(tmp_path):
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    root = Path(__file__).parents[2]
    left_out = [
        "cells.h5ad",
        "data/sample.zarr/X/0",
        "data/matrix.mtx.gz",
        "runs/mine/corpus/index.parquet",
        ".git/objects/pack",
        "model.safetensors",
    ]
    carried = [
        "mixgf/cli.py",
        "mixgf/resources/genes_human.parquet",
        "mixgf/resources/pancreas_human_baron.h5ad",
        "mixgf/resources/models/pancreas/pretrain/model.safetensors",
        "jobs/prepare.py",
    ]
    for name in [*left_out, *carried]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(root / name, tmp_path / name)
    packaging.create_package(str(tmp_path), tmp_path.parent / "out.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path.parent / "out.zip") as package:
        names = {name for name in package.namelist() if not name.endswith("/")}
    assert names - {".gitignore", ".rayignore"} == set(carried)


@pytest.mark.parametrize("name", ["a%20b", "a b", "100%", "a?b", "%41", "plain"])
def test_the_uri_of_a_database_is_its_path_again(name):
    make_url = pytest.importorskip("sqlalchemy.engine").make_url
    path = f"/tmp/{name}/mlflow.db"
    assert make_url(store.sqlite_uri(path)).database == path
    assert store.sqlite_path(store.sqlite_uri(path)) == path


def test_a_database_that_was_never_finished_is_made_again(tmp_path):
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as half:  # what a kill leaves: tables, and no version
        half.execute("create table experiments (experiment_id integer)")
        half.execute("create table alembic_version (version_num varchar(32))")
    store.make_database(store.sqlite_uri(str(path)))
    assert store._is_whole(path)
    assert [p.name for p in tmp_path.iterdir()] == ["mlflow.db"]
    made = path.stat().st_ino
    store.make_database(store.sqlite_uri(str(path)))
    assert path.stat().st_ino == made, "a whole database stays"


def test_a_file_that_is_no_database_is_not_removed(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_text("notes of a user")
    assert store._is_whole(path)


@pytest.mark.slow
def test_a_kill_while_the_database_is_made_leaves_none(tmp_path):
    code = f"from mixgf.tracking import store; store.Store('sqlite:///{tmp_path}/mlflow.db').answers()"
    for seconds in (2.0, 3.0, 4.0, 6.0):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "mlflow.db").exists() or store._is_whole(tmp_path / "mlflow.db")
    assert subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL).returncode == 0


def test_compiled_functions_work_where_no_cache_can_be_written(tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "some.py").write_text("from mixgf.jit import jit\n\n@jit\ndef add(a, b):\n    return a + b\n")
    (folder / "__pycache__").write_text("a file, where the folder would be")
    code = "import some; assert some.add(1, 2) == 3"
    env = {**os.environ, "PYTHONPATH": f"{folder}:{Path.cwd()}", "HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
    env.pop("NUMBA_CACHE_DIR", None)
    subprocess.run([sys.executable, "-B", "-c", code], check=True, env=env)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "in.h5ad")
    found = run_prepare(tmp_path / "run", f"human={tmp_path / 'in.h5ad'}")
    assert found.code == 2
    assert "a pipe or a device, not a file" in found.error


def test_values_of_any_length_give_a_short_line():
    from mixgf import cli

    long = "x" * 60_000
    for error in (UserError(f"human={long}: no"), OSError(36, "File name too long", long)):
        code, line = cli._explain(error)
        assert code == 2
        assert len(line) < 500
        assert "60,0" in line


def vocabulary():
    from mixgf.genes.species import gene_table

    ids, _ = make.genes()
    return build_vocabulary(
        {"human": dict.fromkeys(ids, 1.0)}, {"human": gene_table(HUMAN)}, sharing="separate", orthologs={}
    )


@pytest.mark.parametrize("name", ["CD4", "ENSG00000010610", "ENSG00000010610.12", "T4", "GRCh38_CD4", " CD4"])
def test_a_gene_is_named_as_in_a_file(name):
    found: Vocabulary = vocabulary()
    assert found.symbols()[found.find(name, "human", HUMAN)] == "CD4"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MALAT1", r"MALAT1 \(ENSG\d+, lncRNA\) is a gene, and has no token: .*vocab\.biotypes = protein_coding"),
        ("PDX1", r"PDX1 \(ENSG\d+\) is a gene, and no kept cell detects it"),
        ("NKX6.1", "several genes have that name; give an Ensembl id"),
        ("cd4", r"did you mean CD4\?"),
        ("NOGENE", "give an Ensembl id or a current symbol"),
    ],
)
def test_why_a_gene_has_no_token_is_said(name, said):
    with pytest.raises(UserError, match=said):
        vocabulary().find(name, "human", HUMAN)
