"""What is imported is declared in pyproject.toml, what is declared is imported, and a missing package is one line."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mixgf import cli
from mixgf.cells.open import open_reader
from mixgf.errors import UserError, require_package
from mixgf.storage import files

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INDIRECT = {
    "s3fs": "fsspec loads it for s3:// URIs",
    "gcsfs": "fsspec loads it for gs:// URIs",
    "adlfs": "fsspec loads it for az:// URIs",
    "psutil": "MLflow's system metrics need it",
    "scikit-image": "scanpy's Scrublet imports it",
}
OPTIONAL = {"scvi": "scvi-tools", "scib_metrics": "scib-metrics", "optuna": "optuna"}
"""Modules of extras that the tests do without, and their distributions."""


def names(lines):
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported(folder, declared):
    """Distributions that the Python files of a folder import, wherever in the file.

    Where several install one module (mlflow, mlflow-skinny), the declared one.
    """
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.partition(".")[0])
    own = {path.stem for part in ("", "cluster", "dashboards", "jobs", "tests") for path in (ROOT / part).iterdir()}
    where = packages_distributions()
    found = set()
    for name in modules - own - set(sys.stdlib_module_names):
        candidates = {canonicalize_name(one) for one in where.get(name) or [OPTIONAL[name]]}
        found |= candidates & declared or candidates
    return found


def test_the_package_imports_what_it_declares_and_declares_what_it_imports():
    declared = names(
        [
            *PROJECT["dependencies"],
            *(
                line
                for name in ("s3", "gs", "az", "zarr", "soma", "doublets", "optuna", "baselines")
                for line in EXTRAS[name]
            ),
        ]
    )
    found = imported("mixgf", declared)
    assert found - declared == set(), "imported and not declared"
    assert declared - found - set(INDIRECT) == set(), "declared and not imported"


def test_tests_and_benchmarks_import_nothing_that_the_test_extra_lacks():
    declared = names([*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)])
    assert imported("tests", declared) | imported("jobs", declared) <= declared


def test_a_missing_dependency_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(["report", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "mixgf: needs the package jinja2, which is not installed; run: pip install mixgf\n"
    )


def test_doublets_without_scanpy_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    file = tmp_path / "cells.h5ad"
    arguments = ["prepare", f"human={file}", "--output", str(tmp_path / "run"), "--set", "qc.doublets=drop"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == (
        "mixgf: qc.doublets=drop: needs the package scanpy, which is not installed; run: pip install 'mixgf[doublets]'\n"
    )


def test_s3_without_s3fs_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setenv("AWS_REGION", "nowhere-1")  # other settings than any cached file system has
    with pytest.raises(UserError, match=r"^s3://: needs the package s3fs, .* pip install 'mixgf\[s3\]'$"):
        files.exists("s3://bucket/key")


def test_a_zarr_store_without_zarr_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "cells.zarr").mkdir()
    (tmp_path / "cells.zarr/zarr.json").touch()
    monkeypatch.setitem(sys.modules, "zarr", None)
    with (
        pytest.raises(UserError, match=r"cells\.zarr: needs the package zarr, .* pip install 'mixgf\[zarr\]'$"),
        open_reader(str(tmp_path / "cells.zarr")),
    ):
        pass


def test_an_experiment_without_tiledbsoma_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells/__tiledb_group.tdb").touch()
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    missing = pytest.raises(UserError, match=r"cells: needs the package tiledbsoma, .* pip install 'mixgf\[soma\]'$")
    with missing, open_reader(str(tmp_path / "cells")):
        pass


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("az", "adlfs")])
def test_other_stores_without_their_package_name_the_extra(scheme, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"^{scheme}://: needs the package {package}, .* pip install 'mixgf\[{scheme}\]'$"
    ):
        files.exists(f"{scheme}://bucket/key")


def test_an_installed_package_is_not_imported_by_the_check():
    require_package("this", "poetry", "python")  # importing `this` prints and leaves it in sys.modules
    assert "this" not in sys.modules
