"""No secret leaves a run: not in messages, records, reports, or MLflow."""

import base64
import json
import re
import urllib.parse
from pathlib import Path

import pytest

from mixgf import cli, console, datasets
from mixgf.redact import is_redacted, redact
from mixgf.storage import files

SECRET = "pl4nted-s3cret"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pl4nted-s3cret@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("see https://pl4nted-s3cret@host/x and s3://bucket/a@b", "see https://***@host/x and s3://bucket/a@b"),
        ("mysql+pymysql://me:p@w#pl4nted-s3cret?@db/x", "mysql+pymysql://***@db/x"),
        ('{"uri": "http://me:pl4nted-s3cret@h", "to": "a@b.org"}', '{"uri": "http://***@h", "to": "a@b.org"}'),
        ("s3://b/k?X-Amz-Signature=pl4nted-s3cret&x=1", "s3://b/k?X-Amz-Signature=***&x=1"),
        ("https://h/x?token=pl4nted-s3cret", "https://h/x?token=***"),
        ("Authorization: Bearer pl4nted-s3cret", "Authorization: Bearer ***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("https://h/a?b=c#d, tokens.cls=true, x@y: 3 tokens", "https://h/a?b=c#d, tokens.cls=true, x@y: 3 tokens"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_text_keeps_all_but_its_secrets_and_once_is_enough(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown
    assert SECRET not in redact(text)


def test_a_source_is_a_data_set_of_mlflow_without_the_secrets_of_its_uri():
    from mixgf.tracking.datasets import sources

    (found,) = sources([{"uri": f"s3://bucket/token={SECRET}/a.h5ad", "species": "human", "name": "a", "layer": "X"}])
    assert SECRET not in json.dumps(found)
    assert json.loads(found["profile"])["layer"] == "X"


def test_json_stays_json_and_secrets_of_the_environment_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "abc")  # too short: it stands in ordinary words
    value = {"a": f"x{SECRET}y", "b": [f"http://u:{SECRET}@h", 'quote" and \\'], "abc": 1}
    files.write_json(f"{tmp_path}/x.json", value)
    assert files.read_json(f"{tmp_path}/x.json") == {"a": "x***y", "b": ["http://***@h", 'quote" and \\'], "abc": 1}


def test_messages_have_no_secrets(caplog):
    caplog.set_level("INFO", logger="mixgf")
    console.say(f"at http://me:{SECRET}@h")
    console.warn(f"at http://me:{SECRET}@h")
    assert [r.getMessage() for r in caplog.records] == ["at http://***@h"] * 2


def test_a_uri_without_its_password_is_known():
    assert is_redacted(redact(f"https://me:{SECRET}@host"))
    assert not is_redacted(f"https://me:{SECRET}@host")


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_errors_have_no_secrets(debug, capsys):
    assert cli.main(["inspect", f"file://me:{SECRET}@host/corpus", *debug]) == 2
    said = capsys.readouterr()
    assert "file://***@host/corpus" in said.err
    assert SECRET not in said.err + said.out


def test_a_small_run_writes_prints_and_logs_no_password(tmp_path, tracking_uri, capsys, monkeypatch):
    """The tracker's URI holds the secret. Every file of the output and of MLflow's store is searched, in plain and as base64."""
    from mlflow.tracking import MlflowClient

    from mixgf.config import recipes
    from mixgf.config.parse import override
    from mixgf.execution import LocalExecutor
    from mixgf.report import build
    from mixgf.stages import embed, prepare, pretrain
    from mixgf.tracking import mlflow_runs, store

    console.setup()
    output, planted = tmp_path / "run", f"postgresql://me:{SECRET}@127.0.0.1:1/mlflow"
    cells = datasets.pancreas("human")[:60].copy()
    cells.write_h5ad(tmp_path / "few.h5ad")
    sources = json.dumps([{"species": "human", "uri": f"{tmp_path}/few.h5ad", "name": "few"}])
    settings = [
        f"output={output}", f"tracking.uri={planted}", f"sources={sources}", "tokens.max_len=32", "model.max_positions=32",
        "model.num_layers=1", "model.dim=16", "model.num_heads=2", "model.ffn_dim=16", "train.max_steps=2", "compute.num_workers=1",
    ]  # fmt: skip
    config = override(recipes.get("demo"), settings)
    monkeypatch.setattr(mlflow_runs, "_deliveries", {})
    monkeypatch.setattr(store, "client_of", lambda uri: MlflowClient(tracking_uri if uri == planted else uri))
    for stage in (prepare, pretrain, embed):
        stage.run(config, executor=LocalExecutor())
    build.build_report(config, f"{output}/report.html")
    looked_at = "\n".join(mlflow_runs.how_to_look(config))
    assert "$MLFLOW_TRACKING_URI" in looked_at
    said = capsys.readouterr()
    assert cli.main(["pretrain", "--print-config", *[x for s in settings for x in ("--set", s)]]) == 0
    printed = capsys.readouterr()
    assert "***@127.0.0.1" in printed.out

    wanted = [SECRET, urllib.parse.quote(SECRET), base64.b64encode(SECRET.encode()).decode()[:-2]]
    assert not any(
        word in text for word in wanted for text in (said.out, said.err, printed.out, printed.err, looked_at)
    )
    store_folder = re.sub(r"^sqlite:///", "", tracking_uri).rpartition("/")[0]
    looked = 0
    for root in (tmp_path, Path(store_folder)):
        for path in (p for p in root.rglob("*") if p.is_file()):
            looked += 1
            assert not any(word.encode() in path.read_bytes() for word in wanted), path
    assert looked > 30
    runs = MlflowClient(tracking_uri).search_runs(["1"], f"tags.`mixgf.output` = '{output}'")
    assert {run.info.run_name for run in runs} == {"run", "prepare", "pretrain", "embed"}
