"""Laws of machines as people have them: long paths, percent signs, folders that cannot be written, kills at a bad moment."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixgf.config.data import HUMAN
from mixgf.errors import UserError
from mixgf.genes.vocabulary import Vocabulary, build_vocabulary
from mixgf.tracking import store
from tests.field import make_cases as make
from tests.field.prepared import run_prepare


def test_a_long_temporary_folder_gives_ray_a_shorter_one(monkeypatch, tmp_path):
    from mixgf.distributed import session

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert session.short_folder() is None
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 100)
    folder = session.short_folder()
    try:
        socket = f"{folder}/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
        assert len(socket) <= 107
    finally:
        Path(folder).rmdir()
    monkeypatch.setattr(session.os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"TMPDIR = '/tmp/x+': 105 bytes; .* set RAY_TMPDIR to a short one"):
        session.short_folder()


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
