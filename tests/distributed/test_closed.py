"""A local Ray is closed: its ports are on loopback, and calls without its token are refused."""

import json
import os
import subprocess
import sys

import pytest

DRIVER = """
import json, os, sys
if sys.argv[1] == "ray first":
    import ray
from mixgf.config.run import Config
from mixgf.distributed import session
import grpc, psutil, ray

def knock(port, method, **headers):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=10, metadata=tuple(headers.items()))
        except grpc.RpcError as error:
            return error.code().name
        return "OK"

SERVICES = {
    "gcs": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "jobs": "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "values": "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "node": "/ray.rpc.NodeManagerService/GetSystemConfig",
    "objects": "/ray.rpc.ObjectManagerService/FreeObjects",
    "worker": "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
}
with session.session(Config()):
    task = ray.remote(lambda: os.environ["RAY_AUTH_TOKEN"] == os.environ.get("RAY_AUTH_TOKEN"))
    assert ray.get(task.remote())
    me, found = psutil.Process(), []
    for process in [me, *me.children(recursive=True)]:
        for one in process.net_connections(kind="inet"):
            if one.status == psutil.CONN_LISTEN:
                found.append([process.name(), *one.laddr])
    token = {"authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    ports = sorted({port for _, _, port in found})
    knocks = {
        who: {f"{port} {name}": knock(port, method, **headers) for port in ports for name, method in SERVICES.items()}
        for who, headers in {"stranger": {}, "wrong": {"authorization": "Bearer " + "0" * 64}, "owner": token}.items()
    }
    print(json.dumps({"listening": found, "knocks": knocks, "home": sorted(os.listdir(os.environ["HOME"]))}))
"""


@pytest.mark.ray
@pytest.mark.parametrize("order", ["mixgf first", "ray first"])
def test_a_local_ray_listens_on_loopback_and_answers_nobody_without_its_token(order, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_TMPDIR": "/tmp"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, order], env=environment, capture_output=True, text=True, check=True, timeout=240
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["listening"]) >= 5
    assert {address for _, address, _ in found["listening"]} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found[
        "listening"
    ]
    assert "OK" in found["knocks"]["owner"].values(), "the knock is a call that Ray answers"
    for who in ("stranger", "wrong"):
        answers = found["knocks"][who]
        assert "OK" not in answers.values(), answers
        opened = [name for name, answer in found["knocks"]["owner"].items() if answer == "OK"]
        assert {answers[name] for name in opened} == {"UNAUTHENTICATED"}
    assert not [name for name in found["home"] if name == ".ray"], "no token is left in the home folder"
