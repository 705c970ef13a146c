"""No secret stands in a cluster file, rights are the least that work, and the book names what is there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def walk(value, path=()):
    """Every (path, scalar) of nested data."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from walk(item, (*path, i))
    else:
        yield path, value


# secrets and rights


def test_no_secret_stands_in_any_file():
    sensitive = re.compile(r"(?i)password|passwd|secret_?(access_)?key|auth_token$|token$|api_?key")
    plain = re.compile(r"(AKIA|ASIA)[A-Z0-9]{16}|-----BEGIN|://[^/\s:]+:(?!\$)[^@/\s]+@|ghp_\w{20}|hf_\w{20}")
    for path in sorted(p for p in CLUSTER.rglob("*") if p.is_file() and "secrets" not in p.relative_to(CLUSTER).parts):
        text = path.read_text()
        assert not plain.search(text), path
        if path.suffix == ".yaml":
            for document in yaml.safe_load_all(text):
                for where, value in walk(document):
                    named = isinstance(where[-1], str) and sensitive.search(where[-1])
                    is_path = isinstance(value, str) and ("/" in value or value.startswith("$"))
                    assert not named or is_path or not isinstance(value, str), f"{path.name}: {where}"


def test_the_bucket_policy_grants_no_more_than_runs_need():
    policy = json.loads((CLUSTER / "policies/s3-policy.json").read_text())
    allowed = [s for s in policy["Statement"] if s["Effect"] == "Allow"]
    actions = {
        (a, r)
        for s in allowed
        for a in s["Action"]
        for r in ([s["Resource"]] if isinstance(s["Resource"], str) else s["Resource"])
    }
    assert not any("*" in action for action, _ in actions)
    assert not any(resource in {"*", "arn:aws:s3:::*"} for _, resource in actions)
    written = {r for a, r in actions if a in {"s3:PutObject", "s3:DeleteObject"}}
    assert written == {"arn:aws:s3:::my-bucket/runs/*"}, "sources are read only"
    assert any(
        s["Effect"] == "Deny" and s["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
        for s in policy["Statement"]
    )


def test_the_heads_policy_stops_only_its_own_nodes():
    policy = json.loads((CLUSTER / "policies/ec2-policy.json").read_text())
    name = yaml.safe_load((CLUSTER / "aws.yaml").read_text())["cluster_name"]
    for statement in policy["Statement"]:
        assert not any(action.endswith("*") for action in statement["Action"])
        if "ec2:TerminateInstances" in statement["Action"]:
            assert statement["Condition"]["StringEquals"] == {"aws:ResourceTag/ray-cluster-name": name}
        if "iam:PassRole" in statement["Action"]:
            assert statement["Resource"].endswith(":role/mixgf-worker")


# the book


def test_the_readme_names_files_that_are_there():
    text = (CLUSTER / "README.md").read_text()
    for path in set(
        re.findall(
            r"(?<![\w./-])((?:cluster|dashboards|jobs|tests)/[\w./-]*\w\.(?:yaml|py|sh|json|md|example|txt))\b", text
        )
    ):
        made = {"cluster/mixgf.env", "cluster/my-aws.yaml", "cluster/my-gcp.yaml"}
        assert path in made or (ROOT / path).exists(), path


def test_sizes_are_computed_from_the_rates_given_to_them(tmp_path):
    """10 M cells at 1,000 cells/s and node on 2 nodes: 2.78 node-hours, 1.39 hours; at 2 an hour 5.56."""
    prices = tmp_path / "prices.json"
    prices.write_text('{"cpu": 2.0}')
    command = [
        sys.executable,
        str(CLUSTER / "sizes.py"),
        "prepare=cpu:2:1000",
        "--prices",
        str(prices),
        "--bytes-per-cell",
        "500",
        "--cells",
        "10",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| 10 M | prepare | 2 x cpu | 1.4 | 2.8 | 5.56 | 5.0 |" in done.stdout
    command[2] = "prepare=cpu:2"
    bad = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert bad.returncode == 2
    assert "STAGE=TYPE:NODES:RATE" in bad.stderr
