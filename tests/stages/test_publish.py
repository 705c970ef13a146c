"""A published model answers as its run did, wherever it travelled; what is damaged or another model is refused."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from invented import untrained_checkpoint
from mlflow.tracking import MlflowClient

import mixgf as mg
from mixgf import cli
from mixgf.classification import kept_classifier
from mixgf.config.classification import Classify
from mixgf.config.data import Source, Tokens
from mixgf.config.run import Config, Tracking
from mixgf.config.training import Model, Train
from mixgf.corpus import overlap
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import classify, prepare, publish
from mixgf.storage import files, model_store

TYPES = ("beta cell", "alpha cell", "ductal cell")
SMALL = Model(num_layers=1, dim=32, num_heads=2, ffn_dim=32, max_positions=48)


def cells(species: str, each: int, skip: int = 0) -> anndata.AnnData:
    data = mg.datasets.pancreas(species)
    rows = np.concatenate([np.flatnonzero(data.obs["cell_type"] == kind)[skip : skip + each] for kind in TYPES])
    return data[rows].copy()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("publish")
    cells("human", 30).write_h5ad(folder / "human.h5ad")
    cells("mouse", 10).write_h5ad(folder / "mouse.h5ad")
    made = Config(
        output=str(folder / "run"), model=SMALL, tokens=Tokens(max_len=48), train=Train(micro_tokens=2048), tracking=Tracking(uri="off"),
        sources=(
            Source(uri=str(folder / "human.h5ad"), species="human", name="islets"),
            Source(uri=str(folder / "mouse.h5ad"), species="mouse", name="others"),
        ),
        classify=Classify(group="source", splits=("random",), models=("genes_vote",), cells="species == 'human'"),
    )  # fmt: skip
    prepare.run(made, executor=LocalExecutor())
    untrained_checkpoint(made, SMALL)
    classify.run(made, executor=LocalExecutor())
    return made.output


def same_answers(run: str, model: str, *, exact: bool = True) -> None:
    mine, others = cells("human", 6, skip=40), cells("mouse", 10)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 0, "atol": 2e-2}
    np.testing.assert_allclose(mg.load(model).embed(mine), mg.load(run).embed(mine), **tolerance)
    for data in (mine, others):
        a, b = (mg.load_classifier(uri).annotate(data) for uri in (model, run))
        assert a["mixgf_label"].tolist() == b["mixgf_label"].tolist()
        np.testing.assert_allclose(a["mixgf_probability"], b["mixgf_probability"], **tolerance)


def test_a_model_pushed_to_a_folder_and_pulled_answers_by_its_name(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXGF_MODELS", str(tmp_path / "home"))
    with pytest.raises(UserError, match="no run, checkpoint or Hugging Face folder there"):
        mg.load("islets")
    assert cli.main(["push", "islets", "--from", run, "--licence", "CC-BY-4.0", "--to", str(tmp_path / "shelf")]) == 0
    assert cli.main(["pull", "islets", "--from", str(tmp_path / "shelf")]) == 0
    same_answers(run, "islets")
    assert "islets" in model_store.names()
    card = (tmp_path / "home" / "islets" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "alpha cell, beta cell, ductal cell" in card
    found = model_store.manifest(str(tmp_path / "home" / "islets"))
    assert found is not None
    assert 80 < found["audit"]["classifier islets"]["training_cells"] < found["audit"]["encoder_cells"]
    assert found["audit"]["sources"] == ["islets", "others"]
    recipe = json.loads((tmp_path / "home" / "islets" / "recipe.json").read_text())
    assert recipe["classifier islets"]["model"] == "genes_vote"
    assert [one["uri"] for one in recipe["corpus"]["sources"]] == [
        "human.h5ad",
        "mouse.h5ad",
    ]
    for name in found["files"]:  # no paths of this machine
        assert str(Path(run).parent).encode() not in (tmp_path / "home" / "islets" / name).read_bytes(), name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "islets").mkdir()  # a folder of this name here comes first
    assert model_store.resolve("islets") == "islets"


def test_a_model_pushed_to_this_machine_is_found_by_annotate(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXGF_MODELS", str(tmp_path))
    assert cli.main(["push", "here", "--from", run, "--licence", "MIT"]) == 0
    assert kept_classifier.find("here") == str(tmp_path / "here" / "classifiers" / "islets")
    with pytest.raises(UserError, match=r"models with a name: here"):
        kept_classifier.find(str(tmp_path / "nowhere"))
    # what it saw travels with it
    cells("human", 30).write_h5ad(tmp_path / "seen.h5ad")
    capsys.readouterr()
    assert cli.main(["audit", f"human={tmp_path}/seen.h5ad", "here", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    again = overlap.compare_cells(
        overlap.evaluation_cells(f"human={tmp_path}/seen.h5ad", Config().species),
        overlap.training_cells(f"{run}/corpus"),
    )
    assert told["cells"] == list(again.cells or ())
    assert told["cells"][0] > 80


def test_half_precision_and_fewer_cells_change_little_and_no_cells_are_carried_on_demand(
    run: str, tmp_path: Path
) -> None:
    whole, half = (mg.push(name, run, licence="MIT", to=tmp_path, half=name == "half") for name in ("whole", "half"))
    same_answers(run, half, exact=False)
    size = {name: files.size(f"{tmp_path}/{name}/pretrain/model.safetensors") for name in ("whole", "half")}
    assert size["half"] < 0.52 * size["whole"]
    few = mg.push("few", run, licence="MIT", to=tmp_path, cells=30)
    kept, _, _ = kept_classifier.load(f"{few}/classifiers/islets")
    assert kept.reference is not None
    assert np.bincount(kept.reference.labels_N).tolist() == [10, 10, 10]
    none = mg.push("none", run, licence="MIT", to=tmp_path, cells=0)
    assert kept_classifier.load(f"{none}/classifiers/islets")[0].reference is None
    assert not files.exists(f"{none}/classifiers/islets/cells.parquet")
    said = mg.load_classifier(none).annotate(cells("human", 6, skip=40))
    assert (
        said["mixgf_label"].tolist()
        == mg.load_classifier(whole).annotate(cells("human", 6, skip=40))["mixgf_label"].tolist()
    )


def test_a_damaged_or_other_model_is_refused(run: str, tmp_path: Path) -> None:
    made = mg.push("one", run, licence="MIT", to=tmp_path / "shelf")
    assert mg.push("one", run, licence="MIT", to=tmp_path / "shelf") == made  # the same again: nothing to do
    with pytest.raises(UserError, match="holds another model of this name"):
        mg.push("one", run, licence="CC0-1.0", to=tmp_path / "shelf")
    with pytest.raises(UserError, match=r"NAME 'a/b': must be letters"):
        mg.push("a/b", run, licence="MIT", to=tmp_path)
    with pytest.raises(UserError, match=r"no encoder .* and no classifier there"):
        mg.push("none", tmp_path, licence="MIT", to=tmp_path)
    with pytest.raises(UserError, match=r"two: no model there"):
        mg.pull("two", tmp_path / "shelf", to=tmp_path / "home")
    weights = Path(made) / "pretrain" / "model.safetensors"
    good = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(UserError, match=r"pretrain/model.safetensors: not the bytes that model.json lists"):
        mg.pull("one", tmp_path / "shelf", to=tmp_path / "home")
    assert model_store.manifest(str(tmp_path / "home" / "one")) is None
    assert not (tmp_path / "home" / "one" / "pretrain" / "model.safetensors").exists()
    weights.unlink()
    with pytest.raises(UserError, match=r"pretrain/model.safetensors: missing"):
        mg.pull("one", tmp_path / "shelf", to=tmp_path / "home")
    manifest = Path(made) / "model.json"
    found = json.loads(manifest.read_text())
    found["files"]["../../outside"] = {"bytes": 1, "sha256": "0"}
    manifest.write_text(json.dumps(found))
    with pytest.raises(UserError, match="names a file outside its folder"):
        mg.pull("one", tmp_path / "shelf", to=tmp_path / "home")


def test_a_model_goes_through_the_registry_of_mlflow_and_mlflow_serves_it(run: str, tmp_path: Path) -> None:
    import mlflow

    place = f"sqlite:///{tmp_path}/mlflow.db"
    assert mg.push("islets", run, licence="MIT", to=place) == "models:/islets/1"
    assert mg.push("islets", run, licence="MIT", to=place, half=True) == "models:/islets/2"
    same_answers(run, mg.pull("islets@1", place, to=tmp_path / "home"))
    with pytest.raises(UserError, match=r"islets@9: no such model in the registry"):
        mg.pull("islets@9", place, to=tmp_path)
    newest = mg.pull("islets", place, to=tmp_path / "newest")
    assert model_store.manifest(newest)["choices"]["half"]  # type: ignore[index]
    version = MlflowClient(place).get_model_version("islets", "1")
    assert "Licence: MIT" in str(version.description)
    cells("human", 3).write_h5ad(tmp_path / "three.h5ad")
    mlflow.set_tracking_uri(place)
    try:
        said = mlflow.pyfunc.load_model("models:/islets/1").predict(
            pd.DataFrame({"path": [str(tmp_path / "three.h5ad")]})
        )
    finally:
        mlflow.set_tracking_uri(None)
    assert said["label"].isin(TYPES).all()


def test_transformers_reads_the_hugging_face_form(run: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = mg.push("islets", run, licence="MIT", to=tmp_path, huggingface=True)
    model = transformers.BertForMaskedLM.from_pretrained(made)
    words = json.loads((Path(made) / "token_dictionary.json").read_text())
    assert model.config.vocab_size == max(words.values()) + 1
    same_answers(run, made)  # as a model of mixgf, with its own vocabulary and medians


def test_s3_holds_models_by_name(run: str, tmp_path: Path, s3_bucket: str) -> None:
    mg.push("islets", run, licence="MIT", to=f"{s3_bucket}/models")
    same_answers(run, mg.pull("islets", f"{s3_bucket}/models", to=tmp_path))
    assert mg.load_classifier(f"{s3_bucket}/models/islets").classes == ("alpha cell", "beta cell", "ductal cell")


def test_one_classifier_can_be_published_alone(run: str, tmp_path: Path) -> None:
    made = mg.push("labels", f"{run}/classify/classifiers/islets", licence="MIT", to=tmp_path)
    assert mg.load_classifier(made).classes == ("alpha cell", "beta cell", "ductal cell")
    assert not files.exists(f"{made}/pretrain")
    assert publish.CLASSIFIERS in files.list_dir(made)
