"""No secret of a run is in what it writes: artifacts in a bucket, the report, MLflow's database and files, Ray's logs, what is printed."""

import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import boto3
import pytest
from processes import mlflow_server

from mixgf.config import recipes
from mixgf.config.parse import override, to_dict
from tests.faults.chain import write_cells

SECRET = "pl4nted-s3cret"
"""Part of every password and key of the run."""


def base64_of(text, before):
    """What base64 makes of a text after so many bytes, without the characters that depend on what is around it."""
    whole = base64.b64encode(bytes(before) + text.encode()).decode()
    return whole[-(-before * 8 // 6) : (before + len(text)) * 8 // 6]


FORMS = [form.encode() for form in (SECRET, *(base64_of(SECRET, before) for before in range(3)))]
SMALL = [
    "tokens.max_len=32", "model.num_layers=1", "model.dim=16", "model.num_heads=2", "model.ffn_dim=16", "train.epochs=1",
    "train.warmup_steps=2", "classify.epochs=1", "classify.warmup_steps=2", "classify.models=finetune,knn,majority", "classify.splits=random",
    "perturb.alternatives=[]", "perturb.max_cells=6", "perturb.max_genes=8", "perturb.num_permutations=100", "tracking.register=planted",
]  # fmt: skip


def has_secret(data):
    return any(form in data for form in FORMS)


def test_every_form_of_the_secret_is_found():
    for before in ("", "x", "me", "me:", "me:x", "other:"):
        assert has_secret(f"{before}{SECRET}".encode())
        assert has_secret(base64.b64encode(f"{before}{SECRET}/more".encode()))
    assert not has_secret(b"planted secret, " + base64.b64encode(b"something else of some length"))


@pytest.fixture
def tracker(tmp_path):
    """A server of MLflow on loopback; its address without a password."""
    with mlflow_server(tmp_path / "mlflow") as url:
        yield url.removeprefix("http://")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_whole_run_on_s3_leaves_no_secret_anywhere(s3_bucket, tracker, tmp_path):
    """Keys in the environment; passwords in the URIs of the tracker, of a source that is refused and of one that is not there."""
    (tmp_path / "user").mkdir()
    good = write_cells(tmp_path / "user")
    s3 = boto3.client(
        "s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], aws_access_key_id="k", aws_secret_access_key="s"
    )
    for source in good:
        s3.upload_file(source.uri, "runs", f"cells/{source.name}.h5ad")
    s3.put_object(Bucket="runs", Key=f"cells/token={SECRET}/bad.h5ad", Body=b"no cells")
    uris = {one.name: f"s3://runs/cells/{one.name}.h5ad" for one in good} | {
        "bad": f"s3://runs/cells/token={SECRET}/bad.h5ad"
    }
    sources = [
        {"species": "mouse" if name == "mouse" else "human", "uri": uri, "name": name} for name, uri in uris.items()
    ]
    settings = [
        *SMALL,
        "output=s3://runs/planted",
        f"tracking.uri=http://me:{SECRET}@{tracker}",
        f"sources={json.dumps(sources)}",
    ]
    config = tmp_path / "user" / "config.json"
    config.write_text(json.dumps(to_dict(override(recipes.get("demo"), settings))))
    with tempfile.TemporaryDirectory(prefix="ps", dir="/tmp") as ray:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_TRACKING"))} | {
            "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00", "AWS_SECRET_ACCESS_KEY": f"key-{SECRET}", "AWS_SESSION_TOKEN": f"session-{SECRET}",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": f"ray-{SECRET}-00000000000000000000", "RAY_TMPDIR": ray, "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        said = {}
        for debug in ([], ["--debug"]):
            command = [sys.executable, "-m", "mixgf", "run", "--config", str(config), *debug]
            done = subprocess.run(command, env=environment, cwd=tmp_path / "user", capture_output=True, check=False)
            assert done.returncode == 3, done.stderr[-3000:]  # a source is refused
            assert b"s3://runs/cells/token=***" in done.stderr
            said |= {f"stdout {debug}": done.stdout, f"stderr {debug}": done.stderr}
        elsewhere = f"https://me:{SECRET}@127.0.0.1:9/cells.h5ad"
        for words in (["prepare", f"human={elsewhere}"], ["inspect", elsewhere]):
            command = [sys.executable, "-m", "mixgf", *words, "--debug"]
            done = subprocess.run(command, env=environment, cwd=tmp_path / "user", capture_output=True, check=False)
            assert done.returncode == 2, done.stderr[-3000:]
            said |= {f"stdout {words[0]}": done.stdout, f"stderr {words[0]}": done.stderr}
        logs = [path for path in Path(ray).rglob("*") if path.is_file() and not path.is_symlink()]
        said |= {str(path): path.read_bytes() for path in logs}
    assert len(logs) > 10
    there = [path for path in (tmp_path / "mlflow").rglob("*") if path.is_file()]
    said |= {str(path): path.read_bytes() for path in there}
    assert any("mlflow.db" in name for name in said)
    keys = [
        item["Key"]
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket="runs", Prefix="planted/")
        for item in page["Contents"]
    ]
    assert {"planted/report.html", "planted/perturb/record.json", "planted/corpus/record.json"} <= set(keys)
    said |= {key: s3.get_object(Bucket="runs", Key=key)["Body"].read() for key in keys}
    found = {
        name: [data[max(0, data.find(form) - 200) :][:400] for form in FORMS if form in data]
        for name, data in said.items()
        if has_secret(data)
    }
    assert not found
