"""What starts clusters is valid by the schemas of those who read it, pinned to our versions, and closed by default."""

import copy
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SHARED = ROOT.parent / "shared"
KUBERAY = {"raycluster": "RayCluster", "rayjob": "RayJob"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = {"prepare", "a100", "spot"}
LOOPBACK = re.compile(r"127\.0\.0\.1:\d+:\d+")


def pins(lines):
    """Exact versions in requirement lines."""
    found = (re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s;]+)", line) for line in lines)
    return {m[1].lower(): m[2] for m in found if m}


ASKED = [
    Requirement(line)
    for line in (*PROJECT["dependencies"], *itertools.chain.from_iterable(PROJECT["optional-dependencies"].values()))
    if not line.startswith("mixgf[")
]
CONSTRAINTS = pins((CLUSTER / "constraints.txt").read_text().splitlines())


def load(name):
    return yaml.safe_load((CLUSTER / name).read_text())


# versions


def test_constraints_pin_every_dependency_within_the_range_that_the_project_asks_for():
    missing = {one.name: str(one.specifier) for one in ASKED if one.name not in CONSTRAINTS}
    assert missing == {}
    outside = {one.name: CONSTRAINTS[one.name] for one in ASKED if CONSTRAINTS[one.name] not in one.specifier}
    assert outside == {}


def test_the_library_asks_for_ranges_so_that_it_installs_beside_others():
    exact = [str(one) for one in ASKED if any(part.operator in ("==", "===", "~=") for part in one.specifier)]
    assert exact == []


def test_every_pin_in_images_and_launchers_is_the_projects():
    text = "\n".join(p.read_text() for p in (CLUSTER / "Dockerfile", CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"))
    outside = {"psycopg2-binary", "google-api-python-client"}  # needed by the servers alone
    for name, version in re.findall(r"\b([a-z0-9-]+)==([0-9][0-9a-z.]*)", text):
        if name not in outside:
            assert version == CONSTRAINTS[name], name


def test_our_images_carry_the_projects_version():
    tag = PROJECT["version"]
    for path in sorted(p for p in CLUSTER.rglob("*") if p.suffix in {".yaml", ".md"} or p.name == "Dockerfile"):
        for image, version in re.findall(r"\b(mixgf(?:-mlflow)?):([0-9][0-9.]*)", path.read_text()):
            assert version == tag, f"{path.name}: {image}"


def test_kubernetes_names_the_projects_ray():
    versions = {
        load("kubernetes/raycluster.yaml")["spec"]["rayVersion"],
        load("kubernetes/rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"],
    }
    assert versions == {CONSTRAINTS["ray"]}


def test_the_images_python_is_one_the_project_allows():
    minor = tuple(
        map(int, re.search(r"FROM python:(\d+)\.(\d+)\.\d+-slim", (CLUSTER / "Dockerfile").read_text()).groups())
    )
    low, high = (
        tuple(map(int, re.search(sign + r"(\d+)\.(\d+)", PROJECT["requires-python"]).groups())) for sign in (">=", "<")
    )
    assert low <= minor < high


# Dockerfile


def instructions(text):
    """(instruction, arguments) of a Dockerfile, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def stages(text):
    """Name to (base, instructions) of every stage."""
    found = {}
    for name, rest in instructions(text):
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = (base, steps := [])
        else:
            steps.append((name, rest))
    return found


STAGES = stages((CLUSTER / "Dockerfile").read_text())


@pytest.mark.parametrize("target", ["cpu", "cuda", "mlflow"])
def test_an_image_runs_as_a_numbered_user_from_a_pinned_base(target):
    base, chain = target, []
    while base in STAGES:
        base, steps = STAGES[base]
        chain = [*steps, *chain]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", base)
    users = [rest for name, rest in chain if name == "USER"]
    assert users == ["1000:1000"], "a number, so that Kubernetes can see that it is not root; and nothing after it"
    last = [name for name, _ in chain].index("USER")
    assert {name for name, _ in chain[last:]} <= {"USER", "EXPOSE", "CMD"}


def test_the_dockerfile_keeps_the_rules_a_linter_would_check():
    known = {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD", "ARG"}
    for stage, (_, steps) in STAGES.items():
        assert stage, "every stage has a name"
        for name, rest in steps:
            assert name in known, f"{stage}: {name} (ADD, MAINTAINER and the like are not used)"
            if name == "CMD":
                assert isinstance(json.loads(rest), list), "CMD in its JSON form, so that signals reach the process"
            if name == "WORKDIR":
                assert rest.startswith("/")
            if name == "COPY":
                *sources, _ = shlex.split(rest)
                assert all((ROOT / s).exists() for s in sources), rest
                assert "." not in sources, "copy by name"
            if name == "RUN" and "apt-get install" in rest:
                assert "--no-install-recommends" in rest
                assert "rm -rf /var/lib/apt/lists/*" in rest
            if name == "RUN" and "pip install" in rest:
                named = re.findall(r"(?<=\s)([a-z][a-z0-9-]+)(?==|\s|$)", rest.split("pip install", 1)[1])
                for package in set(named) & {"mlflow", "boto3", "torch", "psycopg2-binary"}:
                    assert f"{package}==" in rest, f"{stage}: {package} without a version"


def test_a_build_sees_no_more_than_it_copies():
    rules = [line for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    allowed = {line[1:] for line in rules if line.startswith("!")}
    copied = {s for _, steps in STAGES.values() for n, rest in steps if n == "COPY" for s in shlex.split(rest)[:-1]}
    assert copied == allowed


# VM launcher


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_launcher_files_are_valid_by_rays_schema_and_its_own_checks(name):
    jsonschema = pytest.importorskip("jsonschema")
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(f"{name}.yaml")
    schema = json.loads((Path(ray.autoscaler.__path__[0]) / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))
    for wrong in ({"max_workerz": 1}, {"max_workers": "1"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(config | wrong, schema)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_launcher_groups_start_at_zero_and_the_head_does_no_work(name):
    config = load(f"{name}.yaml")
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert set(types) == GROUPS
    assert all(t["min_workers"] == 0 < t["max_workers"] for t in types.values())
    assert config["max_workers"] == sum(t["max_workers"] for t in types.values())
    assert "spot" in json.dumps(types["spot"]["node_config"]).lower()
    assert {n for n, t in types.items() if "GPU" in t["resources"]} == {"a100", "spot"}
    assert all(t["labels"]["mixgf.io/node-type"] == n for n, t in (types | {"head": head}).items()), (
        "the price table's keys"
    )
    cuda = {n for n, t in types.items() if "cuda" in t.get("docker", {}).get("worker_image", "")}
    assert cuda == {"a100", "spot"}


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_launcher_nodes_read_settings_from_the_environment_and_listen_on_loopback(name):
    config = load(f"{name}.yaml")
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, worker):
        assert ". ~/mixgf.env" in command.split("ray start")[0]
        assert "--metrics-export-port=8090" in command
    assert any(path.endswith(".ray/auth_token") for path in config["file_mounts"])
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "mixgf.env.example").read_text()


def test_aws_opens_one_port_to_one_address_and_gives_roles_of_our_own():
    config = load("aws.yaml")
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(r["CidrIp"].endswith("/32") for r in rule["IpRanges"])
    for name, node in config["available_node_types"].items():
        assert node["node_config"]["IamInstanceProfile"]["Name"] == ("mixgf-head" if name == "head" else "mixgf-worker")
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(d["Ebs"]["Encrypted"] for d in node["node_config"]["BlockDeviceMappings"])


# Kubernetes


def cluster_spec(name):
    spec = load(f"kubernetes/{name}.yaml")["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(name):
    spec = cluster_spec(name)
    return {"head": spec["headGroupSpec"]} | {g["groupName"]: g for g in spec["workerGroupSpecs"]}


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_manifests_are_valid_by_the_strict_schema(name):
    path = SHARED / "kuberay" / f"{KUBERAY[name]}-v1.schema.json"
    if not path.is_file():
        pytest.skip(f"KubeRay's schemas are not beside this checkout ({path.parent.name}/{path.name})")
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json.loads(path.read_text()))
    manifest = load(f"kubernetes/{name}.yaml")
    assert [f"{list(e.path)}: {e.message[:200]}" for e in check.iter_errors(manifest)] == []
    wrong = copy.deepcopy(manifest)
    wrong["spec"].get("rayClusterSpec", wrong["spec"])["workerGroupSpecs"][0]["maxReplica"] = 1
    assert list(check.iter_errors(wrong)), "the schema is strict"


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_unprivileged_and_the_cluster_wants_a_token(name):
    spec = cluster_spec(name)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["networkPolicy"]["mode"] == "DenyAllIngress"
    for group in groups(name).values():
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts what it is given"
            assert {"secretRef": {"name": "mixgf-credentials", "optional": True}} in container["envFrom"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount for one in pod["containers"] for mount in one["volumeMounts"]}
        assert mounts.keys() == volumes.keys()
        assert (mounts["tmp"]["mountPath"], volumes["tmp"]) == ("/tmp", {"name": "tmp", "emptyDir": {}})
        assert all(mount.get("readOnly") for name, mount in mounts.items() if name != "tmp")
    autoscaler = spec["autoscalerOptions"]
    assert autoscaler["securityContext"]["readOnlyRootFilesystem"] is True
    assert [mount["mountPath"] for mount in autoscaler["volumeMounts"]] == ["/tmp"]


@pytest.mark.parametrize("name", KUBERAY)
def test_groups_start_at_zero_and_the_head_does_no_work_on_kubernetes(name):
    head, *workers = groups(name).items()
    assert head[1]["rayStartParams"]["num-cpus"] == "0"
    assert {n for n, _ in workers} == (GROUPS if name == "raycluster" else {"spot"})
    for group, row in workers:
        assert row["minReplicas"] == row["replicas"] == 0 < row["maxReplicas"]
        assert row["template"]["spec"]["nodeSelector"] == {"mixgf.io/pool": group}
        gpu = "nvidia.com/gpu" in row["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert gpu == (group != "prepare") == row["template"]["spec"]["containers"][0]["image"].endswith("-cuda")


def test_the_config_of_a_job_is_where_its_command_looks():
    spec = load("kubernetes/rayjob.yaml")["spec"]
    path = re.search(r"--config (\S+)", spec["entrypoint"])[1]
    (container,) = groups("rayjob")["head"]["template"]["spec"]["containers"]
    assert str(Path(path).parent) in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_a_lost_job_is_submitted_again_and_a_finished_one_costs_nothing():
    spec = load("kubernetes/rayjob.yaml")["spec"]
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    script = re.search(r"/opt/mixgf/(jobs/\w+\.py)", spec["entrypoint"])[1]
    assert (ROOT / script).is_file()


# compose


def test_compose_is_valid_by_the_compose_specification():
    pytest.importorskip("check_jsonschema", reason="check-jsonschema (test extra) carries the compose schema")
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(CLUSTER / "compose.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_publishes_on_loopback_alone():
    services = load("compose.yaml")["services"]
    ports = {name: service.get("ports", []) for name, service in services.items()}
    assert all(LOOPBACK.fullmatch(port) for published in ports.values() for port in published)
    assert {n for n, p in ports.items() if p} == {"ray-head", "s3", "mlflow", "prometheus", "grafana"}
    assert not any(s.get("network_mode") == "host" or s.get("privileged") for s in services.values())


def test_no_service_has_capabilities_or_can_write_to_its_image():
    for name, service in load("compose.yaml")["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("cap_add", []) == (["CHOWN"] if name == "s3-volume" else []), name
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_versions_with_known_vulnerabilities_are_not_used_and_the_list_says_what_is():
    least = {"grafana/grafana": (12, 1, 10), "postgres": (17, 8)}
    said = (CLUSTER / "VERSIONS.md").read_text()
    for name, service in load("compose.yaml")["services"].items():
        image, _, tag = service["image"].partition(":")
        if image.startswith("mixgf"):
            continue
        assert f"| `{image}` | {tag} |" in said, name
        numbers = tuple(map(int, re.findall(r"\d+", tag.partition("-")[0])))
        assert numbers >= least.get(image, (0,)), f"{name}: {tag}"
    assert re.search(r"Checked on \d{4}-\d\d-\d\d", said)


def test_google_nodes_have_the_scopes_they_need_and_no_more():
    types = load("gcp.yaml")["available_node_types"]
    prefix = "https://www.googleapis.com/auth/"
    for name, row in types.items():
        (account,) = row["node_config"]["serviceAccounts"]
        wanted = {"devstorage.read_only"} | ({"compute"} if name == "head" else set())
        assert {scope.removeprefix(prefix) for scope in account["scopes"]} == wanted, name


def test_compose_is_complete_pinned_and_whole():
    config = load("compose.yaml")
    services = config["services"]
    for name, service in services.items():
        image = service["image"]
        assert re.search(r":v?\d+\.\d+", image), f"{name}: {image} has no version"
        assert "latest" not in image
        assert set(service.get("secrets", [])) <= set(config["secrets"]), name
        assert set(service.get("depends_on", [])) <= set(services), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in config["volumes"] or (CLUSTER / source).exists(), f"{name}: {source}"
        if "build" in service:
            assert service["build"]["target"] in STAGES
            assert (CLUSTER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    healthy = {
        d
        for s in services.values()
        if isinstance(s.get("depends_on"), dict)
        for d, c in s["depends_on"].items()
        if c["condition"] == "service_healthy"
    }
    assert all("healthcheck" in services[name] for name in healthy)


def test_compose_scrapes_the_ports_that_ray_opens_and_loads_the_boards():
    services = load("compose.yaml")["services"]
    scrape = load("compose/prometheus.yaml")["scrape_configs"][0]
    for sd in scrape["dns_sd_configs"]:
        for name in sd["names"]:
            assert f"--metrics-export-port={sd['port']}" in services[name]["command"]
    (provider,) = load("compose/grafana-boards.yaml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert (CLUSTER / "../dashboards").resolve() == (
        CLUSTER / next(s for s, t in mounts.items() if t == provider["options"]["path"])
    ).resolve()


def test_secrets_are_random_kept_and_out_of_reach(tmp_path):
    script = tmp_path / "compose" / "secrets.sh"
    script.parent.mkdir()
    script.write_text((CLUSTER / "compose/secrets.sh").read_text())
    runs = []
    for _ in range(2):
        done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
        runs.append({p.name: p.read_text() for p in sorted((tmp_path / "secrets").iterdir())})
        assert not any(v in done.stdout + done.stderr for v in runs[-1].values())
    assert runs[0] == runs[1], "a second call changes nothing"
    assert set(runs[0]) == set(load("compose.yaml")["secrets"])
    values = [v for k, v in runs[0].items() if k != "s3_credentials"]
    assert all(re.fullmatch("[0-9a-f]{64}", v) for v in values)
    assert len(set(values)) == len(values)
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert "secrets/" in (CLUSTER / ".gitignore").read_text().splitlines()
