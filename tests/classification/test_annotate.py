"""Labels for a user's file: the same as the classifier gave its test cells; doubted where they should be; the file stays as it is."""

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from invented import untrained_checkpoint
from scipy import sparse, special
from sklearn.linear_model import LogisticRegression

from mixgf.classification import annotate as annotation
from mixgf.classification import kept_classifier, registry, simple_classifiers, validation
from mixgf.classification.models.protocol import CellSet, Measured
from mixgf.classification.paths import ArtifactPaths
from mixgf.classification.places import Places
from mixgf.classification.readings import Classifier, Member, Reading
from mixgf.classification.validation import Validation
from mixgf.config.classification import Classify
from mixgf.config.data import Source, Tokens
from mixgf.config.run import Compute, Config, Tracking
from mixgf.config.training import Model, Train
from mixgf.distributed import pipelines
from mixgf.distributed.executor import RayExecutor
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor, Task
from mixgf.stages import annotate, classify, prepare
from mixgf.storage import artifacts, files, tables
from mixgf.storage.sealed import write_sealed

TYPES = ("beta cell", "alpha cell", "ductal cell")
MODELS = ("probe", "finetune", "genes_vote", "joint_pca", "encoder_pca", "genes_ranks")
SMALL = Model(num_layers=1, dim=32, num_heads=2, ffn_dim=32, max_positions=48)


def cells(name: str, each: int, types: tuple[str, ...] = TYPES, *, skip: int = 0) -> anndata.AnnData:
    data = anndata.read_h5ad(files.local_path(f"resource:pancreas_{name}_baron.h5ad"))
    labels = data.obs["cell_type"].astype(str).to_numpy()
    rows = np.concatenate([np.flatnonzero(labels == kind)[skip : skip + each] for kind in types])
    x = sparse.csr_matrix(data.X[rows]).astype(np.int32)
    obs = data.obs.iloc[rows][["cell_type", "organ"]].astype(str)
    obs["term"] = np.where(obs["cell_type"] == "ductal cell", "CL:0002079", "")
    return anndata.AnnData(x, obs=obs, var=data.var[["ensembl_id"]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A classification of both species at once, whose probe (on random weights) is kept."""
    folder = tmp_path_factory.mktemp("annotate")
    for name in ("human", "mouse"):
        cells(name, 40).write_h5ad(folder / f"{name}.h5ad")
    run = Config(
        output=str(folder / "run"), model=SMALL, tokens=Tokens(max_len=48), train=Train(micro_tokens=2048),
        tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
        sources=tuple(Source(uri=str(folder / f"{name}.h5ad"), species=name, name=name) for name in ("human", "mouse")),
        classify=Classify(group="source", splits=("random",), models=MODELS, epochs=1, label_id="term"),
    )  # fmt: skip
    prepare.run(run, executor=LocalExecutor())
    untrained_checkpoint(run, SMALL)
    classify.run(run, executor=LocalExecutor())
    return run


def _plan(run: Config) -> tuple[Config, ArtifactPaths]:
    """The classification's inputs again, with counts and vectors, which are removed at its end."""
    paths, _ = classify._plan(run, f"{run.output}/again")
    workspace, _ = classify._splits(run, paths)
    for source in ("human", "mouse"):
        workspace.write_counts(source, np.sort(workspace.table.cells[workspace.table.sources == source]))
    workspace.write_vectors("", 0, np.sort(workspace.table.cells))
    return run, paths


def model(run: Config, group: str = "human") -> str:
    return f"{run.output}/classify/classifiers/{group}"


def label(
    run: Config, data: anndata.AnnData, folder: Path, *, group: str = "human", name: str = "mine"
) -> tuple[dict, anndata.AnnData]:
    path = folder / f"{name}.h5ad"
    data.write_h5ad(path)
    found = annotate.run(
        model(run, group),
        Source(uri=str(path), species=""),
        str(folder / f"{name}.out.h5ad"),
        Config(),
        executor=LocalExecutor(),
    )
    return found, anndata.read_h5ad(found["output"])


def test_the_kept_classifier_is_fitted_to_all_cells_and_its_scores_are_of_the_test_cells(trained: Config) -> None:
    kept, _, record = kept_classifier.load(model(trained))
    assert record.kind == "classifier"
    assert kept.about["model"] in MODELS
    assert kept.about["training_cells"] == 118  # of 120; quality control drops two
    predictions = tables.read_table(f"{trained.output}/classify/predictions.parquet").to_pandas()
    mine = predictions[(predictions["group"] == "human") & (predictions["model"] == kept.about["model"])]
    assert kept.about["test"]["cells"] == len(mine) == 24  # 20 % of 3 x 40
    assert kept.about["test"]["accuracy"] == pytest.approx((mine["true"] == mine["predicted"]).mean())
    listed = artifacts.require(f"{trained.output}/classify", "classification").details["classifiers"]
    assert [one["group"] for one in listed] == ["human", "mouse"]


def test_the_kept_classifier_is_one_of_the_best_by_validation_and_says_why(trained: Config) -> None:
    about = kept_classifier.facts(model(trained))["about"]
    scores = {one["model"]: one["macro_f1"] for one in about["candidates"]}
    assert set(scores) == set(MODELS)
    assert scores[about["model"]] >= max(scores.values()) - 0.05
    assert about["why"].startswith("macro F1 ")
    assert about["validation"]["by"] == "cell"


@pytest.mark.parametrize("name", MODELS)
def test_every_model_labels_a_file_as_it_labelled_its_test_cells(name: str, trained: Config, tmp_path: Path) -> None:
    """A stored classifier gives the label and probability of the model in memory, from the raw file."""
    workspace, made = classify._splits(*_plan(trained))
    split = next(s for s in made if s.group == "human")
    model_ = registry.parse(name)
    problem = workspace.problem(split, model_)
    fit = kept_classifier.Fit(workspace, split, model_, problem, model_.fit(problem))
    kept = kept_classifier.assemble(fit, kept_classifier.validate(fit), test={"doubted": 0.0})
    kept_classifier.save(str(tmp_path / "kept"), kept, workspace.corpus.vocabulary)
    file = annotation.look(Source(uri=trained.sources[0].uri, species="human"), kept, workspace.corpus.vocabulary)
    plan = annotation.LabelPlan(
        model=str(tmp_path / "kept"),
        version=name,
        file=file,
        start=0,
        stop=file.num_cells,
        to=str(tmp_path / "part.parquet"),
    )
    next(iter(LocalExecutor().run([Task(part=plan.to, function=annotation.label_cells, args=(plan,), weight=1)])))
    found = annotation.frame([tables.read_table(str(tmp_path / "part.parquet"))])
    rows = workspace.corpus.obs(["source_row"])["source_row"].to_numpy()[workspace.table.cells[split.test]]
    target = validation.measured(fit.fitted, problem.target, trained)
    np.testing.assert_allclose(np.stack(found["p"].iloc[rows]), kept.probabilities(target), atol=2e-4)
    said = fit.fitted.predict(problem.target).argmax(1)
    assert (found["label"].iloc[rows].to_numpy() == np.asarray(kept.classes)[said]).all()
    assert len(set(said.tolist())) > 1  # so that equal is no accident


def test_cells_of_another_species_are_aligned(trained: Config, tmp_path: Path) -> None:
    found, out = label(trained, cells("mouse", 40), tmp_path, name="mouse")
    assert found["form"] == kept_classifier.REFITTED
    assert found["form_model"] == out.uns["mixgf_annotate"]["form_model"] == "genes_vote"
    assert (out.obs["mixgf_label"].astype(str) == out.obs["cell_type"]).mean() > 0.95


@pytest.mark.parametrize("chosen", ["genes_logreg", "pca_knn", "encoder_pca"])
def test_another_species_is_labelled_by_the_preferred_model_that_centres_by_types(chosen: str) -> None:
    """Validation has no cell of another species, so its choice does not hold there."""
    assert kept_classifier.model_across(chosen, [chosen, "genes_vote", "joint_pca"]) == "genes_vote"
    assert kept_classifier.model_across("pca_knn", ["pca_knn", "joint_pca"]) == "pca_knn"


def test_weights_of_the_members_are_stored(trained: Config, tmp_path: Path) -> None:
    """A form fitted to a file has members of unequal weight. Classifiers of earlier versions have none stored: all are equal."""
    kept, words, _ = kept_classifier.load(model(trained))
    first = kept.classifier.members[0]
    uneven = replace(kept, classifier=Classifier(members=(first, replace(first, weight=0.25))))
    kept_classifier.save(str(tmp_path / "form"), uneven, words)
    again, _ = kept_classifier.read(str(tmp_path / "form"))
    assert [member.weight for member in again.classifier.members] == [1, 0.25]
    facts = kept_classifier.facts(str(tmp_path / "form"))
    for one in facts["members"]:
        del one["weight"]
    write_sealed(str(tmp_path / "form" / "classifier.json"), facts)
    again, _ = kept_classifier.read(str(tmp_path / "form"))
    assert [member.weight for member in again.classifier.members] == [1, 1]


def test_a_file_of_one_type_keeps_its_label(trained: Config, tmp_path: Path) -> None:
    """The mean of such a file is that of its type: read relative to it, its cells would be like any other."""
    for species in ("human", "mouse"):
        _, out = label(trained, cells(species, 40, ("alpha cell",)), tmp_path, name=species)
        assert (out.obs["mixgf_label"].astype(str) == "alpha cell").mean() > 0.9


def test_a_file_without_genes_that_the_classifier_reads_has_a_model_of_the_genes_that_both_have(
    trained: Config, tmp_path: Path
) -> None:
    data = cells("human", 40)
    part = data[:, np.random.default_rng(1).permutation(data.n_vars)[: data.n_vars // 4]].copy()
    found, out = label(trained, part, tmp_path, name="quarter")
    assert found["form"] == kept_classifier.REFITTED
    assert (out.obs["mixgf_label"].astype(str) == out.obs["cell_type"]).mean() > 0.9
    whole, _ = label(trained, data, tmp_path, name="whole")
    assert whole["form"] == kept_classifier.ALIGNED


def test_a_classifier_carries_all_cells_of_rare_types_and_equally_many_of_the_others() -> None:
    labels = np.repeat([0, 1, 2, 3], [5, 400, 40, 90])
    rows = kept_classifier.balanced_rows(np.random.default_rng(0).permutation(labels), 200, 0)
    sizes = np.bincount(np.random.default_rng(0).permutation(labels)[rows])
    assert sizes.sum() <= 200
    assert sizes[0] == 5
    assert sizes[2] == 40
    assert sizes[1] == sizes[3] == (200 - 45) // 2
    assert len(kept_classifier.balanced_rows(labels, 1_000, 0)) == len(labels)


def test_the_cells_that_a_classifier_carries_are_stored_whole(trained: Config, tmp_path: Path) -> None:
    kept, words, _ = kept_classifier.load(model(trained))
    kept_classifier.save(str(tmp_path / "again"), kept, words)
    again, _ = kept_classifier.read(str(tmp_path / "again"))
    assert kept.reference is not None
    assert again.reference is not None
    assert (again.reference.counts_NG != kept.reference.counts_NG).nnz == 0
    assert kept.reference.counts_NG.shape == (118, len(kept.genes))
    np.testing.assert_array_equal(again.reference.labels_N, kept.reference.labels_N)
    assert again.reference.studies == (("human", "human"),)


def test_majority_and_terms_are_added_where_they_are_asked_for(trained: Config, tmp_path: Path) -> None:
    """Ids of the training cells come before those of names, a table of the user before both; cells without a gene have none."""
    data = cells("human", 40)
    x = data.X.tolil()
    x[0] = 0
    data.X = sparse.csr_matrix(x)
    data.write_h5ad(tmp_path / "mine.h5ad")
    source, to = Source(uri=str(tmp_path / "mine.h5ad"), species=""), str(tmp_path / "out.h5ad")
    (tmp_path / "ids.csv").write_text("label,id\nbeta cell,CL:0000168\n")
    found = {}
    for name, extras in (
        ("names", annotation.Extras(majority=True, ontology="names")),
        ("table", annotation.Extras(ontology=str(tmp_path / "ids.csv"))),
    ):
        annotate.run(model(trained), source, to, Config(), extras=extras, executor=LocalExecutor())
        found[name] = anndata.read_h5ad(to).obs.astype({"mixgf_label": str})
    plain = label(trained, data, tmp_path)[1].obs
    assert not {"mixgf_cluster", "mixgf_term"} & set(plain)
    obs = found["names"]
    assert obs["mixgf_label"].tolist() == plain["mixgf_label"].astype(str).tolist()
    assert obs["mixgf_cluster"].iloc[0] == -1
    assert obs["mixgf_majority"].iloc[0] == obs["mixgf_term"].iloc[0] == ""
    groups = obs.iloc[1:].groupby("mixgf_cluster", observed=True)
    assert len(groups) == 4  # of 119 cells
    for _, group in groups:
        assert group["mixgf_majority"].astype(str).unique().tolist() == [group["mixgf_label"].mode().iloc[0]]
    ids = obs.iloc[1:].groupby("mixgf_label")["mixgf_ontology_id"].unique()
    assert {name: list(one) for name, one in ids.items()} == {
        "alpha cell": ["CL:0000171"], "beta cell": ["CL:0000169"], "ductal cell": ["CL:0002079"],
    }  # fmt: skip
    trusted = obs[obs["mixgf_trusted"]]
    assert (trusted["mixgf_term_id"].astype(str) == trusted["mixgf_ontology_id"].astype(str)).all()
    doubted = obs.iloc[1:][~obs["mixgf_trusted"].iloc[1:]]
    assert len(doubted)
    assert (doubted["mixgf_term_id"].astype(str) != doubted["mixgf_ontology_id"].astype(str)).all()
    table = found["table"]
    assert set(table.loc[table["mixgf_label"] == "beta cell", "mixgf_ontology_id"]) == {"CL:0000168"}


def test_the_input_and_all_that_is_in_it_stay(trained: Config, tmp_path: Path) -> None:
    data = cells("human", 5)
    data.obsm["X_mine"] = np.arange(2.0 * data.n_obs).reshape(-1, 2)
    data.layers["twice"] = data.X * 2
    _, out = label(trained, data, tmp_path)
    before = anndata.read_h5ad(tmp_path / "mine.h5ad")
    assert not any(c.startswith("mixgf_") for c in before.obs)
    pd.testing.assert_frame_equal(out.obs[before.obs.columns], before.obs)
    np.testing.assert_array_equal(out.obsm["X_mine"], data.obsm["X_mine"])
    assert (out.layers["twice"] != data.layers["twice"]).nnz == 0
    assert (out.X != data.X).nnz == 0


def test_the_output_is_neither_the_input_by_another_spelling_nor_a_file_of_somebody_else(
    trained: Config, tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "x.h5ad"
    cells("human", 3).write_h5ad(path)
    (tmp_path / "symlink.h5ad").symlink_to(path)
    (tmp_path / "link.h5ad").hardlink_to(path)
    (tmp_path / "e").symlink_to(tmp_path / "d", target_is_directory=True)
    for name in ("mine.h5ad", "other.h5ad", "table.csv", "table.parquet", "empty.csv", "no.h5ad"):
        (tmp_path / name).write_bytes(b"cell,label\n" if name != "empty.csv" else b"")
    cells("human", 2).write_h5ad(tmp_path / "other.h5ad")
    tables.write_table(str(tmp_path / "table.parquet"), pa.table({"cell": ["a"]}))
    (tmp_path / "folder.h5ad").mkdir()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    own = ("d/x.h5ad", "d/../d/x.h5ad", "./d//x.h5ad", "e/x.h5ad", "symlink.h5ad", "link.h5ad")
    foreign = ("mine.h5ad", "other.h5ad", "table.csv", "table.parquet", "empty.csv", "no.h5ad", "folder.h5ad")
    for name in (*own, *foreign):
        with pytest.raises(
            UserError, match="is the input itself" if name in own else "not written by `mixgf annotate`"
        ):
            annotate.run(
                model(trained),
                Source(uri=str(path), species=""),
                f"{tmp_path}/{name}",
                Config(),
                executor=LocalExecutor(),
            )
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("ending", ["h5ad", "csv", "parquet"])
def test_labels_of_an_earlier_command_are_replaced(trained: Config, tmp_path: Path, ending: str) -> None:
    cells("human", 3).write_h5ad(tmp_path / "x.h5ad")
    source, to = Source(uri=str(tmp_path / "x.h5ad"), species="human"), tmp_path / f"out.{ending}"
    for group in ("human", "mouse"):
        annotate.run(model(trained, group), source, str(to), Config(), executor=LocalExecutor())
        assert to.exists()


def test_parts_of_any_size_and_a_csv_hold_the_same_labels(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = label(trained, cells("human", 9), tmp_path)
    monkeypatch.setattr(annotate, "PART_CELLS", 10)
    to = str(tmp_path / "mine.csv")
    annotate.run(
        model(trained), Source(uri=str(tmp_path / "mine.h5ad"), species="human"), to, Config(), executor=LocalExecutor()
    )
    table = pd.read_csv(to)
    assert table["mixgf_label"].tolist() == whole.obs["mixgf_label"].astype(str).tolist()
    np.testing.assert_allclose(table["mixgf_probability"], whole.obs["mixgf_probability"], atol=1e-6)
    assert not [p for p in tmp_path.iterdir() if ".parts-" in p.name]


@pytest.mark.ray
@pytest.mark.parametrize("size", [2_000, pipelines.BLOCK_BYTES])
def test_ray_gives_the_bytes_of_the_local_executor_for_any_size_of_blocks(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_local: None, size: int
) -> None:
    monkeypatch.setattr(annotate, "PART_CELLS", 50)
    monkeypatch.setattr(pipelines, "BLOCK_BYTES", size)
    path = tmp_path / "mine.h5ad"
    cells("human", 40).write_h5ad(path)
    settings, found = Config(compute=Compute(num_workers=2)), []
    for name, executor in (("here", LocalExecutor()), ("ray", RayExecutor(settings))):
        to = tmp_path / f"{name}.csv"
        annotate.run(model(trained), Source(uri=str(path), species=""), str(to), settings, executor=executor)
        found.append(to.read_bytes())
    assert found[0] == found[1]
    assert found[0].count(b"\n") == 121


def test_a_species_without_training_cells_and_missing_genes_are_said(trained: Config, tmp_path: Path) -> None:
    found, _ = label(trained, cells("mouse", 8), tmp_path, name="mouse")
    assert found["species"] == "mouse"
    assert any("trained on human cells only" in text for text in found["verdicts"])
    assert label(trained, cells("mouse", 8), tmp_path, group="mouse", name="mouse2")[0]["coverage"] > 0.99
    part = cells("human", 8)
    part = part[:, np.random.default_rng(0).permutation(part.n_vars)[: part.n_vars // 3]].copy()
    found, _ = label(trained, part, tmp_path, name="third")
    assert found["coverage"] < 0.5
    assert any("the file measures only" in text for text in found["verdicts"])


def test_shallow_and_empty_cells_are_doubted(trained: Config, tmp_path: Path) -> None:
    data = cells("human", 4)
    x = data.X.tolil()
    x[0] = 0
    keep = x[1].nonzero()[1][:9]
    row = np.zeros(data.n_vars, dtype=np.int32)
    row[keep] = 1
    x[1] = row
    data.X = sparse.csr_matrix(x)
    found, out = label(trained, data, tmp_path)
    assert out.obs["mixgf_doubt"].iloc[0] == kept_classifier.EMPTY
    assert out.obs["mixgf_label"].iloc[0] == ""
    assert kept_classifier.SHALLOW in out.obs["mixgf_doubt"].iloc[1]
    assert not out.obs["mixgf_trusted"].iloc[:2].any()
    assert found["doubts"][kept_classifier.EMPTY] == 1


def test_temperature_scaling_finds_the_divisor() -> None:
    """Labels drawn from softmax(z); shown 3 z, the fitted temperature is 3."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20_000, 4)) * 2
    p = special.softmax(z, axis=1)
    labels = (p.cumsum(1) < rng.random((len(z), 1))).sum(1)
    assert kept_classifier.fit_temperature(3 * z, labels) == pytest.approx(3, rel=0.05)


def test_a_head_with_weights_of_genes_is_kept_whole(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Its labels of the test cells are the predictions that were scored, so nothing of it is lost on the way."""
    folder = tmp_path_factory.mktemp("tuned")
    cells("human", 25).write_h5ad(folder / "human.h5ad")
    run = Config(
        output=str(folder / "run"), model=SMALL, tokens=Tokens(max_len=48), train=Train(micro_tokens=2048),
        tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
        sources=(Source(uri=str(folder / "human.h5ad"), species="human", name="human"),),
        classify=Classify(group="source", splits=("random",), models=("lora",), epochs=1, max_len=40),
    )  # fmt: skip
    prepare.run(run, executor=LocalExecutor())
    untrained_checkpoint(run, SMALL)
    classify.run(run, executor=LocalExecutor())
    kept, _, _ = kept_classifier.load(f"{run.output}/classify/classifiers/human")
    assert kept.layer == "all"
    assert kept.reads == {"vectors", "ranks"}
    _, out = label(run, cells("human", 25), tmp_path)
    said = tables.read_table(f"{run.output}/classify/predictions.parquet").to_pandas()
    mine = out.obs.loc[said["cell"].str.removeprefix("human:")]
    assert mine["mixgf_label"].astype(str).tolist() == said["predicted"].tolist()
    assert len(set(said["predicted"])) > 1  # so that equal is no accident


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_regression_is_a_linear_layer(num_classes: int) -> None:
    """The layer gives the probabilities of scikit-learn; a class without a training cell gets none."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 5, (90, 6)), rng.normal(3, 5, (20, 6))
    labels = np.arange(90) % num_classes
    train[:, 0] += 9 * labels
    expected = LogisticRegression(max_iter=1000).fit(train, labels).predict_proba(test)
    found = simple_classifiers.logistic_regression(train, labels, num_classes + 1)(test)
    np.testing.assert_allclose(found[:, :-1], expected, atol=1e-9)
    assert (found[:, -1] == 0).all()


def test_limits_doubt_the_stated_share_of_validation_cells_and_far_cells() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    vectors = (np.eye(8)[labels] * 5 + rng.normal(size=(400, 8)) * 2).astype(np.float32)
    head = simple_classifiers.LinearHead(np.eye(8)[:2] - np.eye(8)[:2].mean(0), np.zeros(2))
    classifier = Classifier(members=(Member(readings=(Reading(raw="vectors"),), head=head),))

    def cells(values: np.ndarray) -> CellSet[Measured]:
        return CellSet(Measured(vectors=values), np.full(len(values), "human"))

    train, out = cells(vectors[:200]), cells(vectors[200:])
    places, p = Places.fit(classifier.places(train), labels[:200], 2), classifier(out)
    distance = places.distances(classifier.places(out), p.argmax(1))
    part = np.full(200, validation.FOLD)
    found = Validation(
        by="cell", rows_N=np.arange(200), labels_N=labels[200:], probabilities_NC=p, distance_N=distance, part_N=part
    )
    kept = kept_classifier.Kept(
        classifier=classifier, encoder=None, classes=("a", "b"), pooling="mean", layer=-1, genes=np.empty(0, dtype=np.str_),
        gene_species="human", limits=kept_classifier.Limits.fit(found), places=places, share_V=np.zeros(3),
    )  # fmt: skip
    p = kept.probabilities(out)
    distance = kept.distances(out, p.argmax(1))
    assert (p.max(1) < kept.limits.least_probability).mean() == pytest.approx(kept_classifier.DOUBTED, abs=0.01)
    assert (distance > kept.limits.greatest_distance).mean() == pytest.approx(kept_classifier.DOUBTED, abs=0.01)
    strange = cells((np.eye(8)[[5]] * 25 + np.eye(8)[[0]]).astype(np.float32))
    p = kept.probabilities(strange)
    assert kept_classifier.FAR in kept.doubts(p, kept.distances(strange, p.argmax(1)), np.array([999]))[0]


def test_a_cell_beyond_a_limit_is_doubted_for_that_reason_and_one_at_the_limit_is_not() -> None:
    limits = kept_classifier.Limits(temperature=1.0, least_probability=0.7, greatest_distance=2.0)
    kept = kept_classifier.Kept(
        classifier=Classifier(members=()), encoder=None, classes=("a", "b"), pooling="mean", layer=-1, genes=np.empty(0, dtype=np.str_),
        gene_species="human", limits=limits, places=Places(centres_CD=np.zeros((2, 1)), spread_C=np.ones(2)), share_V=np.zeros(3), least_genes=10,
    )  # fmt: skip
    p = np.array([[0.7, 0.3], [0.31, 0.69], [0.9, 0.1], [0.9, 0.1], [0.5, 0.5]])
    found = kept.doubts(p, np.array([2.0, 0.1, 2.01, 1.0, 9.0]), np.array([10, 99, 99, 9, 1]))
    unsure, far, shallow = kept_classifier.UNSURE, kept_classifier.FAR, kept_classifier.SHALLOW
    assert found == ["", unsure, far, shallow, f"{unsure}; {far}; {shallow}"]


def test_what_cannot_be_used_is_one_line(trained: Config, tmp_path: Path) -> None:
    cells("human", 3).write_h5ad(tmp_path / "a.h5ad")
    source = Source(uri=str(tmp_path / "a.h5ad"), species="human")
    with pytest.raises(
        UserError, match=r"--model .*: 2 classifiers there, one per group of cells; name one of .*/human, .*/mouse"
    ):
        annotate.run(trained.output, source, str(tmp_path / "b.h5ad"), Config(), executor=LocalExecutor())
    with pytest.raises(UserError, match=r"--model .*: no classifier there; `mixgf classify` makes them"):
        annotate.run(str(tmp_path), source, str(tmp_path / "b.h5ad"), Config(), executor=LocalExecutor())
    with pytest.raises(UserError, match=r"--output .*b.txt: must end in .h5ad, .parquet or .csv"):
        annotate.run(model(trained), source, str(tmp_path / "b.txt"), Config(), executor=LocalExecutor())
    with pytest.raises(UserError, match=r"a.h5ad: species = 'rat': the model reads human, mouse"):
        annotate.run(
            model(trained), replace(source, species="rat"), str(tmp_path / "b.h5ad"), Config(), executor=LocalExecutor()
        )
    for name, other in (("human", "mouse"), ("mouse", "human")):
        cells(name, 3).write_h5ad(tmp_path / f"{name}.h5ad")
        swapped = Source(uri=str(tmp_path / f"{name}.h5ad"), species=other)
        with pytest.raises(UserError, match=rf"they are {name} genes: wrong species\?"):
            annotate.run(model(trained), swapped, str(tmp_path / "b.h5ad"), Config(), executor=LocalExecutor())
    strange = anndata.AnnData(sparse.csr_matrix(np.ones((3, 4), dtype=np.int32)))
    strange.var_names = [f"x{i}" for i in range(4)]
    strange.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(
        UserError, match=r"x.h5ad: 3 cells, none of 4 genes is known to the model; names are like x0, x1"
    ):
        annotate.run(
            model(trained),
            replace(source, uri=str(tmp_path / "x.h5ad")),
            str(tmp_path / "b.h5ad"),
            Config(),
            executor=LocalExecutor(),
        )
