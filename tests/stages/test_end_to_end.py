"""The whole way on real human and mouse cells: one command, every stage, nothing twice, and nothing left of a refusal."""

import hashlib
import json
from pathlib import Path

import anndata
import pytest

from mixgf import cli
from mixgf.config import recipes
from mixgf.config.parse import override, to_dict
from mixgf.storage import artifacts, files, tables

SMALL = [
    "qc.max_cells_per_sample=90",
    "tokens.max_len=32",
    "model.num_layers=1",
    "model.dim=16",
    "model.num_heads=2",
    "model.ffn_dim=16",
    "train.epochs=1",
    "train.warmup_steps=2",
    "classify.epochs=1",
    "classify.warmup_steps=2",
    "classify.models=finetune,knn,knn@untrained,majority,hvg_logreg",
    "classify.min_class_fraction=0.05",
    "perturb.max_cells=6",
    "perturb.max_genes=8",
    "perturb.num_permutations=100",
]
KINDS = {
    "vocabulary": "vocabulary",
    "corpus": "corpus",
    "pretrain": "checkpoint",
    "embed": "embeddings",
    "classify": "classification",
    "perturb": "perturbation",
}


def contents(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "mlflow" not in p.name and "mlflow-artifacts" not in str(p)
    }


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_every_stage_runs_on_real_cells_and_nothing_runs_twice(ray_local, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative output is the caller's, not that of the workers
    output = tmp_path / "run"
    config = override(recipes.get("demo"), [*SMALL, "output=run"])
    path = tmp_path / "small.json"
    path.write_text(json.dumps(to_dict(config)))
    assert cli.main(["run", "--config", str(path), "--debug"]) == 0
    out = capsys.readouterr().out
    assert "report.html" in out
    assert "mlflow ui" in out

    records = {name: artifacts.require(str(output / name), kind) for name, kind in KINDS.items()}
    vocabulary = records["corpus"].details["vocabulary"]
    assert records["pretrain"].details["vocabulary"] == records["perturb"].details["vocabulary"] == vocabulary
    assert records["corpus"].counts["kept"] == 180

    scores = tables.read_table(str(output / "classify" / "scores.parquet")).to_pandas()
    assert {"human>mouse", "mouse>human"} <= set(scores.direction)
    assert set(scores.model) == set(config.classify.models)
    genes = tables.read_table(str(output / "perturb" / "genes.parquet")).to_pandas()
    assert set(genes.operation) == {"delete", "overexpress"}
    cells = anndata.read_h5ad(output / "embed" / "cells.h5ad")
    assert cells.obsm["X_mixgf"].shape == (180, 16)

    html = (output / "report.html").read_text()
    assert 'src="http' not in html
    assert "<link" not in html

    before = contents(output)
    assert cli.main(["run", "--config", str(path), "--debug"]) == 0
    assert contents(output) == before


@pytest.mark.ray
def test_a_normalised_matrix_is_one_line_exit_code_2_and_leaves_nothing(ray_local, tmp_path, capsys):
    cells = anndata.read_h5ad(files.local_path("resource:pancreas_mouse_baron.h5ad"))[:50].copy()
    cells.X = cells.X.astype("float32").log1p()
    cells.write_h5ad(tmp_path / "logged.h5ad")
    code = cli.main(["prepare", f"mouse={tmp_path / 'logged.h5ad'}", "--output", str(tmp_path / "run")])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixgf:")]
    assert code == 2
    assert len(err) == 1
    assert "logged.h5ad" in err[0]
    assert "normalised" in err[0]
    assert not (tmp_path / "run" / "corpus").exists()


@pytest.mark.ray
def test_one_bad_source_does_not_lose_the_others_and_the_exit_code_says_so(ray_local, tmp_path, capsys):
    good = files.local_path("resource:pancreas_mouse_baron.h5ad")
    cells = anndata.read_h5ad(good)[:60].copy()
    cells.write_h5ad(tmp_path / "good.h5ad")
    (tmp_path / "torn.h5ad").write_bytes(Path(good).read_bytes()[:10_000])
    args = [f"mouse={tmp_path / 'good.h5ad'}", f"mouse={tmp_path / 'torn.h5ad'}", "--output", str(tmp_path / "run")]
    assert cli.main(["prepare", *args]) == 3
    assert "torn.h5ad" in capsys.readouterr().err
    assert artifacts.require(str(tmp_path / "run" / "corpus"), "corpus").counts["read"] == 60
