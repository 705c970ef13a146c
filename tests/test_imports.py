"""Which packages can be imported on a machine that has only some of the dependencies."""

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest

SERVICES = ("ray", "anndata", "mlflow", "polars", "s3fs", "botocore", "aiobotocore", "boto3")
"""Cluster, file formats, tracking, object storage: what a computation on local files does not need."""
OTHERS = ("aiohttp", "deflate", "jinja2", "matplotlib", "psutil", "scanpy", "skimage", "sklearn", "statsmodels", "umap")
"""What a machine lacks that has torch, numpy, pandas, scipy, h5py, numba, pyarrow, safetensors and fsspec."""

BLOCK = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} must not be imported here")
sys.meta_path.insert(0, Blocked())
"""


def modules(package):
    found = importlib.import_module(package)
    if not hasattr(found, "__path__"):
        return [package]
    return [package, *(one.name for one in pkgutil.walk_packages(found.__path__, f"{package}."))]


def without(blocked, code):
    """Run code in a new process in which these packages cannot be imported."""
    script = BLOCK.format(blocked=set(blocked)) + code
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, env=os.environ, check=False
    )


@pytest.mark.parametrize(
    ("packages", "blocked"),
    [
        (("mixgf.encoder", "mixgf.training", "mixgf.perturbation"), (*SERVICES, *OTHERS)),
        (("mixgf.classification",), SERVICES),
    ],
)
def test_computation_imports_without_cluster_tracking_and_object_storage(packages, blocked):
    names = [name for package in packages for name in modules(package)]
    assert len(names) > 10
    code = f"for name in {names!r}:\n    importlib.import_module(name)\nprint('imported all')"
    result = without(blocked, code)
    assert result.returncode == 0, result.stderr
    assert "imported all" in result.stdout


def test_a_blocked_package_cannot_be_imported():
    result = without(("botocore",), "import botocore.session")
    assert result.returncode == 1
    assert "botocore must not be imported here" in result.stderr


def test_local_files_are_read_and_written_without_object_storage(tmp_path):
    code = f"""
from mixgf.storage import files
files.write_bytes({str(tmp_path / "a")!r}, b"x")
assert files.read_bytes({str(tmp_path / "a")!r}) == b"x"
files.remove({str(tmp_path)!r})
"""
    result = without(SERVICES, code)
    assert result.returncode == 0, result.stderr
