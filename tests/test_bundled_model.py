"""The model that travels with the package: it loads with the present schemas, answers before any training, and doubts other tissues.

After a change of a schema it is made again with `jobs/bundled_model.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

import mixgf as mg
from mixgf import cli
from mixgf.storage import artifacts, files, model_store

SHARED = Path(os.environ.get("MIXGF_SHARED", Path(__file__).parents[2] / "shared"))
PBMC = SHARED / "data" / "h5ad" / "pbmc_human_pbmc3k.h5ad"
FOLDER = f"{model_store.BUNDLED}/pancreas"


@pytest.fixture(scope="module")
def classifier() -> mg.CellClassifier:
    return mg.load_classifier("pancreas")


def some(species: str, number: int = 300) -> anndata.AnnData:
    data = mg.datasets.pancreas(species)
    return data[np.sort(np.random.default_rng(0).permutation(data.n_obs)[:number])].copy()


def test_it_is_small_and_whole() -> None:
    found = model_store.manifest(FOLDER)
    assert found is not None
    assert found["licence"] == "MIT"
    assert sum(files.find(FOLDER).values()) <= 10_000_000
    for name, wanted in found["files"].items():
        assert artifacts.checksums_of(FOLDER, [name])[name] == wanted, name
    card = files.read_bytes(f"{FOLDER}/README.md").decode()
    assert "no other tissue" in card
    assert "cannot label other tissues" in card


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_it_labels_pancreas_cells_of_both_species(classifier: mg.CellClassifier, species: str) -> None:
    data = some(species)
    said = classifier.annotate(data, ontology="names")
    assert (said["mixgf_label"].astype(str).to_numpy() == data.obs["cell_type"].astype(str).to_numpy()).mean() > 0.95
    assert said["mixgf_trusted"].mean() > 0.85
    assert "CL:0000169" in set(said["mixgf_ontology_id"])


def test_another_name_is_refused_with_the_names_that_there_are() -> None:
    for load in (mg.load, mg.load_classifier):
        with pytest.raises(mg.UserError, match=r"models with a name: .*pancreas"):
            load("pancreass")


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_its_encoder_tells_types_apart(species: str) -> None:
    """Each cell's nearest other cell by cosine has the same type more often than the most frequent type is guessed right."""
    data = some(species)
    vectors = mg.load("pancreas").embed(data)
    assert vectors.dtype == np.float32
    unit = vectors - vectors.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    near = unit @ unit.T
    np.fill_diagonal(near, -2)
    types = data.obs["cell_type"].astype(str).to_numpy()
    assert (types[near.argmax(1)] == types).mean() > max(np.unique(types, return_counts=True)[1]) / len(types) + 0.2


def test_cells_of_no_known_kind_are_doubted(classifier: mg.CellClassifier) -> None:
    """Counts are the same, of other genes: each gene has the counts of another one."""
    data = some("human")
    data.X = data.X.astype(np.float32)[:, np.random.default_rng(1).permutation(data.n_vars)]
    assert classifier.annotate(data)["mixgf_trusted"].mean() < 0.3


@pytest.mark.skipif(not PBMC.exists(), reason="no pbmc_human_pbmc3k.h5ad: set MIXGF_SHARED to the shared data")
def test_blood_cells_are_mostly_doubted(classifier: mg.CellClassifier) -> None:
    data = anndata.read_h5ad(PBMC)
    said = classifier.annotate(data[:600].copy())
    assert said["mixgf_trusted"].mean() < 0.4
    assert any("are doubted" in text for text in said.attrs["verdicts"])


def test_embed_on_the_command_line_takes_a_file_and_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = some("mouse", 20)
    data.write_h5ad(tmp_path / "mine.h5ad")
    assert cli.main(["embed", str(tmp_path / "mine.h5ad"), "--model", "pancreas"]) == 0
    made = anndata.read_h5ad(tmp_path / "mine.embedded.h5ad")
    np.testing.assert_array_equal(made.obsm["X_mixgf"], mg.load("pancreas").embed(data))
    assert (made.X != data.X).nnz == 0
    assert cli.main(["embed", "--model", "pancreas"]) == 2
    assert "FILE and --model go together" in capsys.readouterr().err


def test_a_bundled_file_is_labelled_where_the_command_runs_and_without_ray(tmp_path: Path) -> None:
    code = (
        "import sys; from mixgf import cli; code = cli.main(['annotate', 'resource:pancreas_mouse_baron.h5ad', '--model', 'pancreas']); "
        "assert 'ray' not in sys.modules; sys.exit(code)"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MIXGF_MODELS")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pancreas_mouse_baron.annotated.h5ad"]
    made = anndata.read_h5ad(tmp_path / "pancreas_mouse_baron.annotated.h5ad")
    assert made.n_obs == mg.datasets.pancreas("mouse").n_obs
    assert "mixgf_label" in made.obs
