"""The classification stage from end to end on small real cells: Ray equals the loop, nothing is done twice."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from executors import Through, refusing
from invented import untrained_checkpoint
from scipy import sparse

from mixgf.classification import encoders, labels, registry
from mixgf.classification.models.scvi import Scvi
from mixgf.classification.paths import ArtifactPaths
from mixgf.classification.tables import comparisons
from mixgf.classification.workspace import Workspace, find_embeddings
from mixgf.config import parse
from mixgf.config.classification import Classify
from mixgf.config.data import Source, Tokens
from mixgf.config.run import Compute, Config, Inputs, Tracking
from mixgf.config.training import Embed, Model, Train
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint, embed
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor, Task
from mixgf.stages import classify, prepare
from mixgf.storage import artifacts, files, tables

TYPES = ("beta cell", "alpha cell", "delta cell", "ductal cell")
SMALL = Model(num_layers=2, dim=32, num_heads=2, ffn_dim=64, max_positions=64)


def subset(name: str, folder: Path, each: int) -> str:
    data = anndata.read_h5ad(files.local_path(f"resource:pancreas_{name}_baron.h5ad"))
    matrix = sparse.csr_matrix(
        (data.X.data.astype(np.int32), data.X.indices.astype(np.int32), data.X.indptr), shape=data.shape
    )
    labels = data.obs["cell_type"].astype(str).to_numpy()
    rows = np.concatenate([np.flatnonzero(labels == kind)[:each] for kind in TYPES])
    obs = data.obs.iloc[rows][["cell_type", "organ"]].astype(str)
    obs["donor"] = [f"{name}{i % 4}" for i in range(len(obs))]
    obs.iloc[0, 0] = "unknown"
    path = folder / f"{name}.h5ad"
    anndata.AnnData(matrix[rows], obs=obs, var=data.var[["ensembl_id"]]).write_h5ad(path)
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished corpus and a checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("classify")
    run = Config(
        output=str(folder / "run"), model=SMALL, tokens=Tokens(max_len=64), embed=Embed(), train=Train(micro_tokens=2048),
        tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
        sources=tuple(Source(uri=subset(name, folder, each), species=name, name=name) for name, each in (("human", 40), ("mouse", 30))),
        classify=Classify(seeds=1, epochs=1, num_hvgs=200, splits=("random", "donor", "species"),
                          models=("finetune", "knn", "probe", "knn@untrained", "majority", "hvg_logreg")),
    )  # fmt: skip
    prepare.run(run, executor=LocalExecutor())
    untrained_checkpoint(run, SMALL)
    return run


def at(base: Config, folder: Path, **changes: object) -> Config:
    """The same inputs, another output."""
    inputs = Inputs(corpus=f"{base.output}/corpus", checkpoint=f"{base.output}/pretrain")
    return replace(base, output=str(folder), inputs=inputs, classify=replace(base.classify, **changes))


def table(run: Config, name: str) -> pd.DataFrame:
    return tables.read_table(f"{run.output}/classify/{name}.parquet").to_pandas()


@pytest.fixture(scope="module")
def local(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    run = at(base, tmp_path_factory.mktemp("local"))
    classify.run(run, executor=LocalExecutor())
    return run


def test_every_model_is_scored_on_every_split_with_an_interval(local: Config) -> None:
    scores = table(local, "scores")
    tasks = scores[["group", "split", "direction", "seed"]].drop_duplicates()
    assert sorted(set(tasks["split"])) == ["donor", "random", "species"]
    assert set(scores[scores["split"] == "species"]["direction"]) == {"human>mouse", "mouse>human"}
    assert len(scores) == len(tasks) * len(local.classify.models) * 4
    none = scores["interval_by"] == "none"
    assert ((scores["low"] <= scores["high"]) & scores["value"].between(0, 1))[~none].all()
    assert scores.loc[none, ["low", "high"]].isna().all(axis=None)
    donor_of = Corpus(f"{local.inputs.corpus}").obs(["cell", "donor"]).set_index("cell")["donor"]
    tested = table(local, "predictions").assign(donor=lambda p: p["cell"].map(donor_of))
    keys = ["group", "split", "direction", "seed", "model"]
    donors = scores.join(tested.groupby(keys)["donor"].nunique(), on=keys)["donor"]
    assert set(donors) >= {1, 4}
    assert (none == (donors.isin([2, 3]) | ((donors == 1) & (scores["split"] == "donor")))).all()


def test_scores_are_those_of_the_predictions(local: Config) -> None:
    predictions, scores = table(local, "predictions"), table(local, "scores")
    keys = ["group", "split", "direction", "seed", "model"]
    right = (predictions["true"] == predictions["predicted"]).groupby([predictions[k] for k in keys]).mean()
    accuracy = scores[scores["metric"] == "accuracy"].set_index(keys)["value"]
    pd.testing.assert_series_equal(right.sort_index(), accuracy.sort_index(), check_names=False)
    confusion = table(local, "confusion")
    assert confusion["count"].sum() == len(predictions) == table(local, "per_class")["num_test"].sum()


def test_predictions_are_of_the_test_cells_and_their_labels(local: Config) -> None:
    corpus = Corpus(f"{local.inputs.corpus}")
    label = corpus.obs(["cell", "cell_type"]).set_index("cell")["cell_type"]
    predictions, split_cells = table(local, "predictions"), table(local, "splits")
    assert (predictions["true"].to_numpy() == label[predictions["cell"]].to_numpy()).all()
    assert "unknown" not in set(predictions["true"])
    task = ["group", "split", "direction", "seed"]
    tested = {k: set(f["cell"]) for k, f in split_cells[split_cells["part"] == "test"].groupby(task)}
    for (*key, _), frame in predictions.groupby([*task, "model"]):
        assert set(frame["cell"]) == tested[tuple(key)]
        assert not frame["cell"].duplicated().any()


def test_a_baseline_learns_where_the_majority_cannot(local: Config) -> None:
    scores = table(local, "scores")
    means = scores[(scores["metric"] == "macro_f1") & (scores["split"] == "random")].groupby("model")["value"].mean()
    assert means["hvg_logreg"] > 0.8
    assert means["majority"] < 0.2
    found = table(local, "comparisons")
    assert set(found[found["split"] == "random"]["baseline"]) == {"hvg_logreg"}
    assert set(found["model"]) == {"finetune", "knn", "probe", "knn@untrained"}


def test_predictions_of_the_best_model_lie_in_anndata(local: Config) -> None:
    data = anndata.read_h5ad(f"{local.output}/classify/cells.h5ad")
    tested = data.obs[data.obs["predicted"].notna()]
    assert 0 < len(tested) < data.n_obs
    assert data.uns["mixgf"]["model"] in registry.OWN


def test_running_again_does_nothing_and_leaves_no_parts(local: Config) -> None:
    def hashes() -> dict[str, str]:
        folder = Path(local.output) / "classify"
        return {str(p.relative_to(folder)): files.sha256(str(p)) for p in sorted(folder.rglob("*")) if p.is_file()}

    before = hashes()
    classify.run(local, executor=Through(refusing))
    after = hashes()
    assert before == after
    assert "record.json" in after


def without_times(run: Config, name: str) -> pd.DataFrame:
    frame = table(run, name)
    return frame.sort_values(list(frame.columns)).reset_index(drop=True)


TABLES = ("scores", "per_class", "confusion", "predictions", "comparisons", "epochs", "splits")


FEW = {"splits": ("species",), "models": ("finetune", "knn@untrained", "majority", "hvg_logreg")}


@pytest.fixture(scope="module")
def looped(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    run = at(base, tmp_path_factory.mktemp("few"), **FEW)
    classify.run(run, executor=LocalExecutor())
    return run


@pytest.mark.ray
def test_ray_gives_what_the_loop_gives(looped: Config, base: Config, tmp_path: Path, ray_local) -> None:
    run = at(base, tmp_path, **FEW)
    classify.run(replace(run, compute=Compute(cpus_per_worker=2.0)))  # two workers at a time
    for name in TABLES:
        pd.testing.assert_frame_equal(without_times(run, name), without_times(looped, name))


def test_a_killed_run_makes_only_what_is_missing_and_ends_the_same(
    looped: Config, base: Config, tmp_path: Path
) -> None:
    run = at(base, tmp_path, **FEW)

    def dies(tasks: Sequence[Task]):
        yield from LocalExecutor().run(tasks[:3])
        if len(tasks) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classify.run(run, executor=Through(dies))
    assert artifacts.find(f"{run.output}/classify") is None
    folder = f"{run.output}/classify/parts"
    have = {name for kind in files.list_dir(folder) for name in files.list_dir(f"{folder}/{kind}")}
    made: list[str] = []

    def counts(tasks: Sequence[Task]):
        made.extend(task.part.rsplit("/", 1)[-1] for task in tasks)
        yield from LocalExecutor().run(tasks)

    classify.run(run, executor=Through(counts))
    assert have
    assert not have & set(made)
    for name in TABLES:
        pd.testing.assert_frame_equal(without_times(run, name), without_times(looped, name))


def test_the_embeddings_artifact_is_used_where_it_fits(base: Config, tmp_path: Path) -> None:
    """Vectors from the artifact's shards equal those made in parts; those of other settings are refused."""
    corpus, encoder = Corpus(base.output + "/corpus"), artifacts.require(base.output + "/pretrain", "checkpoint")
    run = replace(at(base, tmp_path), inputs=Inputs(embeddings=str(tmp_path / "embed")))
    with pytest.raises(UserError, match=r"inputs.embeddings = .*embed: not of this corpus, checkpoint and embed"):
        find_embeddings(run, corpus.record, encoder)
    parents = {"corpus": corpus.record.fingerprint, "checkpoint": encoder.fingerprint}
    record = artifacts.plan("embeddings", 1, parse.to_dict(run.embed), parents)
    model = encoders.load(base.output + "/pretrain", "", base, corpus)
    for shard, start in enumerate(corpus.starts[:-1].tolist()):
        vectors = embed.embed_cells(model, corpus, np.arange(start, corpus.starts[shard + 1]), "mean", -1)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        tables.write_table(str(tmp_path / "embed" / "shards" / f"{shard:05d}.parquet"), pa.table({"vector": column}))
    artifacts.finish(str(tmp_path / "embed"), record)
    assert find_embeddings(run, corpus.record, encoder)[0] == str(tmp_path / "embed")
    assert find_embeddings(at(base, tmp_path / "elsewhere"), corpus.record, encoder) == ("", None)
    paths = ArtifactPaths(corpus=base.output + "/corpus", checkpoint=base.output + "/pretrain", output=str(tmp_path / "classify"),
                          embeddings=str(tmp_path / "embed"))  # fmt: skip
    workspace = Workspace(config=base, paths=paths, table=labels.labelled(corpus, base.classify))
    cells = np.array([200, 3, 77, 4])
    made_here = replace(workspace, paths=replace(paths, embeddings=""))
    for number, block in enumerate(np.array_split(np.arange(corpus.num_cells), 2)):
        made_here.write_vectors("", number, block)
    np.testing.assert_array_equal(workspace.vectors("", cells), made_here.vectors("", cells))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("scgpt",)}, r"classify.models: 'scgpt' is not known; there are finetune, .*knn"),
        (
            {"seeds_per_model": {"finetuned": 1}},
            r"classify.seeds_per_model: 'finetuned' is not known; there are finetune, ",
        ),
        (
            {"seeds_per_model": {"finetune": 0}},
            r"classify.seeds_per_model = 0: must be at least 1",
        ),
        ({"label": "celltype"}, r"classify.label = 'celltype': the corpus has no such column; it has .*cell_type"),
        ({"label": "organ"}, r"classify.splits = random, donor, species: none can be made"),
        ({"unlabelled": (*TYPES, "unknown")}, r"classify.label = 'cell_type': none of \d+ cells has a label"),
    ],
    ids=["unknown model", "seeds of no model", "no seeds", "no such label", "one type", "no labels"],
)
def test_what_cannot_be_done_is_one_line(
    base: Config, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        classify.run(at(base, tmp_path, **changes), executor=LocalExecutor())
    assert not files.list_dir(str(tmp_path / "classify"))


def test_only_the_chosen_cells_take_part_and_the_record_says_what_the_encoder_had_seen(
    base: Config, tmp_path: Path
) -> None:
    run = at(
        base,
        tmp_path,
        cells="species == 'human' and cell_type != 'delta cell'",
        splits=("random",),
        models=("majority", "knn"),
    )
    classify.run(run, executor=LocalExecutor())
    assert set(table(run, "scores")["group"]) == {"human"}
    assert set(table(run, "predictions")["true"]) == set(TYPES) - {"delta cell"}
    record = artifacts.require(f"{run.output}/classify", "classification")
    assert record.details["audit"]["cells"] == [record.counts["labelled"]] * 2
    assert "(100.0%) were in the pretraining corpus" in record.details["audit"]["line"]
    assert [one["model"] for one in record.details["classifiers"]] == ["knn"]  # the majority cannot be kept
    with pytest.raises(UserError, match=r"classify.cells: species has no value 'rat'"):
        classify.run(at(base, tmp_path / "b", cells="species == 'rat'"), executor=LocalExecutor())


def test_a_checkpoint_of_another_corpus_is_audited_cell_by_cell(base: Config, tmp_path: Path) -> None:
    """Trained on a corpus that holds the human cells only: exactly these are counted."""
    old = replace(
        base,
        output=str(tmp_path / "old"),
        sources=base.sources[:1],
        vocab=replace(base.vocab, reuse=f"{base.output}/vocabulary"),
    )
    prepare.run(old, executor=LocalExecutor())
    seen = Corpus(f"{old.output}/corpus")
    record = artifacts.plan("checkpoint", checkpoint.SCHEMA, {"other": 1}, {"corpus": seen.record.fingerprint})
    artifacts.begin(f"{old.output}/pretrain", record)
    checkpoint.publish_checkpoint(
        f"{old.output}/pretrain",
        record,
        MaskedModel(SMALL, seen.vocabulary.size),
        vocabulary=seen.vocabulary.hash,
        tokens=base.tokens,
    )
    run = at(base, tmp_path / "new", splits=("random",), models=("majority",))
    run = replace(run, inputs=replace(run.inputs, checkpoint=f"{old.output}/pretrain"))
    classify.run(run, executor=LocalExecutor())
    found = artifacts.require(f"{run.output}/classify", "classification").details["audit"]
    labels = Corpus(run.inputs.corpus).obs(["species", "cell_type"])
    known = labels[labels["cell_type"] != "unknown"]
    assert found["cells"] == [int((known["species"] == "human").sum()), len(known)]


def test_a_model_whose_package_is_not_there_is_left_out_with_its_reason(
    base: Config, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(Scvi, "package", "no_such_package_of_anyone")
    run = at(base, tmp_path, splits=("random",), models=("majority", "scvi"))
    with caplog.at_level("WARNING"):
        classify.run(run, executor=LocalExecutor())
    assert set(table(run, "scores")["model"]) == {"majority"}
    assert "left out: scvi is not installed (pip install 'mixgf[baselines]')" in caplog.text


def noted(made: list[str]):
    """A local executor that notes the file of every prediction."""

    def run(tasks: Sequence[Task]):
        made.extend(task.part.rsplit("/", 1)[-1] for task in tasks if "/predictions/" in task.part)
        yield from LocalExecutor().run(tasks)

    return Through(run)


def test_models_added_to_a_finished_classification_use_what_is_there(base: Config, tmp_path: Path) -> None:
    """More models, seeds, splits and an encoder: the same tables as if asked for at once, and nothing twice."""
    first, more = {"splits": ("random",), "models": ("knn", "majority", "probe")}, {
        "splits": ("random", "species"), "models": ("knn", "majority", "probe", "hvg_logreg", "knn@again", "finetune"), "seeds": 2, "seeds_per_model": {"finetune": 1, "majority": 1},
        "encoders": {"again": f"{base.output}/pretrain"}, "label_shares": (0.2, 1.0), "unseen_types": 1, "curve_models": ("probe", "hvg_logreg"),
        "integration_cells": 150,
    }  # fmt: skip
    made: list[list[str]] = [[], [], []]
    run = at(base, tmp_path / "grown", **first)
    classify.run(run, executor=noted(made[0]))
    classify.run(at(base, tmp_path / "grown", **more), executor=noted(made[1]))
    at_once = at(base, tmp_path / "at_once", **more)
    classify.run(at_once, executor=noted(made[2]))
    assert made[0]
    assert not set(made[0]) & set(made[1])
    assert sorted(made[0] + made[1]) == sorted(made[2])
    grown = replace(run, classify=at_once.classify)
    for name in (*TABLES, "efficiency", "rejection", "integration", "maps", "centroids"):
        pd.testing.assert_frame_equal(without_times(grown, name), without_times(at_once, name))
    scores, curve, open_ = (table(grown, name) for name in ("scores", "efficiency", "rejection"))
    assert set(curve["share"]) == {0.2, 1.0}
    assert set(curve["model"]) == set(open_["model"]) == {"probe", "hvg_logreg"}
    assert set(open_["metric"]) == {"auroc", "rejected"}
    assert set(open_["unseen"]) <= set(TYPES)
    assert set(table(grown, "integration")["space"]) == {"trained", "again", "expression"}
    centroids = table(grown, "centroids").set_index("space")
    assert (
        centroids.loc["again", ["umap", "umap_aligned", "distance_difference"]].to_numpy().max() < 1e-6
    )  # the same encoder
    assert centroids.loc["expression", "umap"].min() > 0
    assert set(scores[scores["model"] == "finetune"]["seed"]) == {0}
    assert set(scores[scores["model"] == "knn"]["seed"]) == {0, 1}
    assert set(scores[scores["model"] == "majority"]["seed"]) == {0}
    found = table(grown, "comparisons").set_index("model")["seeds"]
    assert set(found["finetune"]) == {1}
    assert set(found["knn"]) == {2}
    # a best baseline of fewer seeds: over those that both have
    predicted = {name: table(grown, name) for name in ("scores", "predictions")}
    fewer = {name: one[(one["model"] != "hvg_logreg") | (one["seed"] == 0)] for name, one in predicted.items()}
    workspace, splits = classify._splits(at_once, classify._plan(at_once, f"{at_once.output}/classify")[0])
    paired = comparisons(workspace.table, splits, fewer, at_once.seed)
    assert set(paired["baseline"]) == {"hvg_logreg"}
    assert set(paired["seeds"]) == {1}
    for kept in artifacts.require(f"{run.output}/classify", "classification").details["classifiers"]:
        assert artifacts.require(kept["uri"], "classifier").details["validation"] == kept["validation"]
    with pytest.raises(
        UserError, match=r"holds another classification: config.asked.curve|holds another classification: "
    ):
        classify.run(run, executor=LocalExecutor())  # fewer models
    with pytest.raises(UserError, match=r"config.models.knn.knn: 5 -> 3"):
        classify.run(at(base, tmp_path / "grown", **more, knn=3), executor=LocalExecutor())


def test_encoders_stand_beside_each_other_on_the_same_splits(base: Config, tmp_path: Path) -> None:
    """The run's checkpoint under another name scores the same; another one does not; one of another vocabulary is refused."""
    other = replace(base, output=str(tmp_path / "other"), inputs=Inputs(corpus=f"{base.output}/corpus"))
    for name, vocabulary in (("small", Corpus(f"{base.output}/corpus").vocabulary.hash), ("strange", "another")):
        record = artifacts.plan("checkpoint", checkpoint.SCHEMA, {name: 1}, {})
        artifacts.begin(f"{other.output}/{name}", record)
        made = MaskedModel(replace(SMALL, num_layers=1), Corpus(f"{base.output}/corpus").vocabulary.size, seed=5)
        checkpoint.publish_checkpoint(f"{other.output}/{name}", record, made, vocabulary=vocabulary, tokens=base.tokens)
    encoders = {"same": f"{base.output}/pretrain", "small": f"{other.output}/small"}
    models = ("knn", "knn@same", "knn@small", "knn@untrained")
    run = at(base, tmp_path / "run", splits=("random",), models=models, encoders=encoders)
    classify.run(run, executor=LocalExecutor())
    found = table(run, "predictions").set_index(["model", "cell"])[["predicted", "probability"]]
    pd.testing.assert_frame_equal(found.loc["knn"], found.loc["knn@same"])
    assert (found.loc["knn"] != found.loc["knn@small"]).any().any()
    assert (found.loc["knn@untrained"] != found.loc["knn@small"]).any().any()
    strange = at(
        base,
        tmp_path / "strange",
        splits=("random",),
        models=("knn", "knn@x"),
        encoders={"x": f"{other.output}/strange"},
    )
    with pytest.raises(
        UserError, match=r"^classify.encoders: x=.*/strange: made with vocabulary another, but the corpus has "
    ):
        classify.run(strange, executor=LocalExecutor())
    assert not files.list_dir(f"{strange.output}/classify")


def test_every_prediction_is_a_run_under_one_parent_once(base: Config, tmp_path: Path) -> None:
    """Killed after some tasks and given again, then extended: as many children as predictions, with scores."""
    from mlflow.tracking import MlflowClient

    tracked = Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="one")

    def dies(tasks: Sequence[Task]):
        for receipt in LocalExecutor().run(tasks):
            if "majority" in tasks[receipt.number].part:  # the last one is made, and its receipt is lost
                raise KeyboardInterrupt
            yield receipt

    run = replace(
        at(base, tmp_path / "run", splits=("random",), models=("knn", "majority", "hvg_logreg")), tracking=tracked
    )
    with pytest.raises(KeyboardInterrupt):
        classify.run(run, executor=Through(dies))
    classify.run(run, executor=LocalExecutor())
    run = replace(run, classify=replace(run.classify, models=(*run.classify.models, "centroid")))
    classify.run(run, executor=LocalExecutor())
    client = MlflowClient(tracked.uri)
    found = client.search_runs([client.get_experiment_by_name("one").experiment_id])
    parents = [r for r in found if r.info.run_name == "classify"]
    assert len(parents) == 1
    above = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.run_id for r in above] == [parents[0].data.tags["mlflow.parentRunId"]]
    assert any(name.startswith("classify/kept/") for name in above[0].data.metrics) == bool(
        artifacts.require(f"{run.output}/classify", "classification").details["classifiers"]
    )
    children = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    scores = table(run, "scores")
    scores = scores[scores["metric"] == "macro_f1"].set_index(["group", "model", "seed"])["value"]
    assert len(children) == len(found) - 2 == len(scores)
    for child in children:
        p = child.data.params
        assert child.data.metrics["macro_f1"] == scores[p["group"], p["model"], int(p["seed"])]
        assert {"accuracy_low", "seconds"} <= set(child.data.metrics)
        assert child.info.status == "FINISHED"


def test_a_dry_run_counts_and_makes_nothing(base: Config, tmp_path: Path) -> None:
    text = classify.dry_run(
        at(base, tmp_path, splits=("random",), seeds=3, models=("knn", "majority"), label_shares=(0.1,))
    )
    assert "random      2 tasks,     6 splits, 6 with fewer labels" in text
    assert "12 predictions" in text
    assert "24 predictions to make: about" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("knn@mlm",)}, r"classify.models: 'knn@mlm': no encoder 'mlm'; there are untrained; name it with classify.encoders=mlm=URI"),
        ({"encoders": {"untrained": "x"}}, r"classify.encoders: untrained=x: must be NAME=URI of a checkpoint"),
        ({"encoders": {"runs/mlm": ""}}, r"classify.encoders: runs/mlm=: must be NAME=URI of a checkpoint"),
    ],
    ids=["encoder not named", "reserved name", "no name"],
)  # fmt: skip
def test_what_is_no_encoder_is_one_line(base: Config, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classify.run(at(base, tmp_path, **changes), executor=LocalExecutor())
