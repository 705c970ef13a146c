"""Which packages can be imported on a machine that has only some of the dependencies."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

SERVICES = ("ray", "anndata", "mlflow", "polars", "s3fs", "botocore", "aiobotocore", "boto3")
"""Cluster, file formats, tracking, object storage: what a computation on local files does not need."""
OTHERS = (
    "aiohttp",
    "deflate",
    "jinja2",
    "matplotlib",
    "psutil",
    "scanpy",
    "skimage",
    "sklearn",
    "statsmodels",
    "transformers",
    "umap",
)
"""What a machine lacks that has torch, numpy, pandas, scipy, h5py, numba, pyarrow, safetensors and fsspec."""

BLOCK = """
import importlib, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""Code after which these packages look as if they were not installed."""


def modules(package):
    found = importlib.import_module(package)
    if not hasattr(found, "__path__"):
        return [package]
    return [package, *(one.name for one in pkgutil.walk_packages(found.__path__, f"{package}."))]


def without(blocked, code):
    """Run code in a new process that has none of these packages."""
    script = BLOCK.format(blocked=set(blocked)) + code
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, env=os.environ, check=False
    )


@pytest.mark.parametrize(
    ("packages", "blocked"),
    [
        (("mixgf.encoder", "mixgf.training", "mixgf.perturbation"), (*SERVICES, *OTHERS)),
        (("mixgf.classification", "mixgf.api"), SERVICES),
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
    assert "No module named 'botocore'" in result.stderr


def test_local_files_and_errors_of_other_storage_need_no_s3(tmp_path):
    code = f"""
from mixgf.storage import files
files.write_bytes({str(tmp_path / "a")!r}, b"x")
assert files.read_bytes({str(tmp_path / "a")!r}) == b"x"
files.remove({str(tmp_path)!r})
from mixgf.storage import retry
assert retry.is_transient(TimeoutError()) and not retry.is_transient(PermissionError("no"))
assert "access denied" in str(retry.storage_error("gs://bucket/a", PermissionError("no")))
"""
    result = without(SERVICES, code)
    assert result.returncode == 0, result.stderr


def test_the_benchmark_of_a_gpu_runs_without_them(tmp_path):
    jobs = Path(__file__).parents[1] / "jobs"
    code = f"""
sys.path.insert(0, {str(jobs)!r})
import bench_gpu
for figure in bench_gpu.figures(quick=True, only="environment,perturb"):
    print(figure.figure)
"""
    result = without((*SERVICES, *OTHERS), code)
    assert result.returncode == 0, result.stderr
    assert "bf16 matrix product" in result.stdout
    assert "delete, 2 x 32" in result.stdout
