"""The Python API gives the commands' numbers to the bit, from AnnData in memory, backed or by path, in bounded memory."""

import doctest
import inspect
import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from invented import untrained_checkpoint
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file
from scipy import sparse

import mixgf as mg
from mixgf import cli
from mixgf.config.classification import Classify
from mixgf.config.data import QC, Source, Tokens
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Config, Tracking
from mixgf.config.training import Model, Train
from mixgf.execution import LocalExecutor
from mixgf.stages import annotate, classify, embed, export, perturb, prepare
from mixgf.storage import artifacts, files, tables

TYPES = ("beta cell", "alpha cell", "ductal cell")
SMALL = Model(num_layers=1, dim=32, num_heads=2, ffn_dim=32, max_positions=48)
PUBLIC = [
    mg.load, mg.load_classifier, mg.prepare, mg.pretrain, mg.classify, mg.write_report, mg.score_perturbations, mg.push, mg.pull, mg.CellEncoder.embed, mg.CellEncoder.perturb, mg.CellClassifier.annotate,
    mg.datasets.pancreas, mg.datasets.pancreas_path,
]  # fmt: skip


def pancreas(species, each):
    """Some cells of three types; four donors."""
    data = mg.datasets.pancreas(species)
    rows = np.concatenate([np.flatnonzero(data.obs["cell_type"] == kind)[:each] for kind in TYPES])
    return data[rows].copy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def run(folder):
    """A run on both species whose encoder is not trained: every cell is kept, so cells are those of the files."""
    for name, species in (("pancreas", "human"), ("mouse", "mouse")):
        pancreas(species, 40).write_h5ad(folder / f"{name}.h5ad")
    made = Config(
        output=str(folder / "runs" / "mine"), model=SMALL, tokens=Tokens(max_len=48), train=Train(micro_tokens=2048),
        qc=QC(method="none", drop_duplicates=False), tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
        sources=tuple(
            Source(uri=str(folder / f"{name}.h5ad"), species=species, name=name)
            for name, species in (("pancreas", "human"), ("mouse", "mouse"))
        ),
        classify=Classify(group="source", splits=("random",), models=("probe", "finetune"), epochs=1),
    )  # fmt: skip
    prepare.run(made, executor=LocalExecutor())
    untrained_checkpoint(made, SMALL)
    classify.run(made, executor=LocalExecutor())
    return made


@pytest.fixture(scope="module")
def cells(folder, run):
    return ad.read_h5ad(folder / "pancreas.h5ad")


@pytest.fixture(scope="module")
def encoder(run):
    return mg.load(run.output, device="cpu")


def model_uri(run, group="pancreas"):
    return f"{run.output}/classify/classifiers/{group}"


# import


def test_importing_mixgf_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, time; before, began = set(sys.modules), time.process_time(); import mixgf; "
        "took = time.process_time() - began; new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "print(took, sorted(new & {'numpy', 'torch', 'pandas', 'anndata', 'pyarrow', 'ray', 'mlflow', 'scipy'}))"
    )
    took, _, heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.partition(" ")  # fmt: skip
    assert heavy.strip() == "[]"
    assert float(took) < 0.1


def test_every_public_name_is_there():
    assert set(mg.__all__) <= set(dir(mg))
    for name in mg.__all__:
        assert getattr(mg, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        _ = mg.embedd


def test_neither_ray_nor_mlflow_is_imported(run, folder):
    code = f"""
import sys, mixgf as mg
adata = mg.datasets.pancreas()[:6]
encoder = mg.load({run.output!r})
encoder.embed(adata)
encoder.perturb(adata, start="", genes=["INS"], max_cells=2)
mg.load_classifier({model_uri(run)!r}).annotate(adata)
print([name for name in ("ray", "mlflow", "botocore", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# embed


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_vectors_are_those_of_the_command_to_the_bit(run, cells, encoder, folder):
    path = folder / "pancreas.h5ad"
    everything = embed.load(embed.run(run))
    expected = everything[: cells.n_obs]
    assert expected.std() > 0
    for given in (cells, ad.read_h5ad(path, backed="r"), str(path), path):
        found = encoder.embed(given)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected)
    rows = [50, 3, 4, 90]
    for whole in (cells, ad.read_h5ad(path, backed="r")):
        assert np.array_equal(encoder.embed(whole[rows]), expected[rows])
    assert np.array_equal(encoder.embed(str(folder / "mouse.h5ad")), everything[cells.n_obs :])  # found to be mouse


def test_numbers_do_not_depend_on_the_threads_of_the_session(cells, encoder):
    expected = encoder.embed(cells[:9])
    torch.set_num_threads(2)
    assert np.array_equal(encoder.embed(cells[:9]), expected)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_vectors_go_where_scanpy_looks_for_them(cells, encoder, tmp_path):
    expected, mine = encoder.embed(cells), cells.copy()
    assert encoder.embed(mine, inplace=True) is None
    assert np.array_equal(mine.obsm["X_mixgf"], expected)
    copied = encoder.embed(cells, copy=True, key_added="X_mine")
    assert np.array_equal(copied.obsm["X_mine"], expected)
    assert not cells.obsm.keys()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    encoder.embed(backed, inplace=True)
    assert np.array_equal(backed.obsm["X_mixgf"], expected)


def test_counts_may_lie_in_a_layer_and_genes_in_a_column(cells, encoder):
    other = ad.AnnData(np.log1p(cells.X.toarray()), obs=cells.obs)
    other.var["id"] = cells.var["ensembl_id"].to_numpy()
    other.layers["counts"] = cells.X.copy()
    assert np.array_equal(encoder.embed(other, layer="counts", genes="id"), encoder.embed(cells))
    with pytest.raises(
        mg.UserError,
        match=r"adata: count .* is not a whole number; X is already log-normalised; layer 'counts' holds counts: layer='counts'",
    ):
        encoder.embed(other, genes="id")


def test_columns_of_one_gene_are_summed_and_the_table_stays_as_it_was(cells, encoder):
    half = cells.X.toarray() // 2
    doubled = ad.AnnData(
        sparse.csr_matrix(np.hstack([half, cells.X.toarray() - half])),
        obs=cells.obs, var=pd.DataFrame({"ensembl_id": np.tile(cells.var["ensembl_id"], 2)}, index=map(str, range(2 * cells.n_vars))),
    )  # fmt: skip
    before = doubled.copy()
    assert np.array_equal(encoder.embed(doubled), encoder.embed(cells))
    for name in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(doubled.X, name), getattr(before.X, name)), name


def test_a_cell_without_a_known_gene_gets_no_vector(cells, encoder, caplog):
    few = cells[:4].copy()
    few.X = sparse.csr_matrix(np.vstack([few.X[:2].toarray(), np.zeros((1, few.n_vars)), few.X[3:].toarray()]))
    found = encoder.embed(few)
    assert np.isnan(found[2]).all()
    assert np.array_equal(np.delete(found, 2, 0), encoder.embed(cells[[0, 1, 3]]))
    with pytest.raises(mg.UserError, match=r"adata: 1 cells hold no gene of the model, for instance .* \(row 2\)"):
        encoder.perturb(few, start="")


@pytest.fixture
def large(tmp_path, cells):
    """A backed table whose counts take 70 MB in rows and 500 MB dense."""
    rng = np.random.default_rng(0)
    num, each = 6_000, 1_500
    indices = np.sort(
        rng.integers(0, cells.n_vars // each, (num, each)) + np.arange(each) * (cells.n_vars // each)
    ).ravel()
    counts = sparse.csr_matrix(
        (rng.integers(1, 9, num * each).astype(np.float32), indices, np.arange(num + 1) * each),
        shape=(num, cells.n_vars),
    )
    ad.AnnData(counts, var=cells.var).write_h5ad(tmp_path / "large.h5ad")
    return tmp_path / "large.h5ad"


def test_a_backed_table_is_read_in_blocks(large, run, encoder, monkeypatch):
    """The encoder is replaced: what is measured is what reading holds."""
    seen = []

    def vectors(model, sentences, rows, *_, **__):
        seen.append(len(rows))
        return np.zeros((len(rows), model.sizes.dim), np.float32)

    monkeypatch.setattr("mixgf.api.embed_cells", vectors)
    monkeypatch.setattr("mixgf.encoder.embed.embed_cells", vectors)
    labels = mg.load_classifier(model_uri(run), device="cpu")
    backed = ad.read_h5ad(large, backed="r")
    some = backed[np.arange(0, 6_000, 2)]
    for call in (encoder.embed, labels.annotate):
        for given in (backed, some, str(large)):
            seen.clear()
            tracemalloc.start()
            call(given)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert sum(seen) == (3_000 if given is some else 6_000)
            assert max(seen) <= 512
            assert peak < 45 << 20, peak


# annotate


def test_labels_are_those_of_the_command_to_the_bit(run, cells, folder, tmp_path):
    path = folder / "pancreas.h5ad"
    told = annotate.run(
        model_uri(run),
        Source(uri=str(path), species=""),
        str(tmp_path / "out.h5ad"),
        Config(),
        executor=LocalExecutor(),
    )
    expected = ad.read_h5ad(told["output"])
    model = mg.load_classifier(model_uri(run), device="cpu")
    columns = [name for name in expected.obs if name.startswith("mixgf_")]
    for given in (cells, ad.read_h5ad(path, backed="r"), str(path)):
        found = model.annotate(given)
        assert list(found.columns) == columns
        pd.testing.assert_frame_equal(found, expected.obs[columns], check_exact=True, check_names=False)
        assert found.attrs["verdicts"] == told["verdicts"]
    mine = cells.copy()
    assert model.annotate(mine, inplace=True) is None
    copied = model.annotate(cells, copy=True)
    for one in (mine, copied):
        one.write_h5ad(tmp_path / "mine.h5ad")
        again = ad.read_h5ad(tmp_path / "mine.h5ad")
        pd.testing.assert_frame_equal(again.obs, expected.obs, check_exact=True)
        pd.testing.assert_frame_equal(again.obsm["mixgf_probabilities"], expected.obsm["mixgf_probabilities"], check_exact=True)  # fmt: skip
        assert json.dumps(again.uns["mixgf_annotate"], default=str) == json.dumps(expected.uns["mixgf_annotate"], default=str)  # fmt: skip
    assert not [name for name in cells.obs if name.startswith("mixgf_")]


# perturb


@pytest.mark.parametrize(
    "more", [{}, {"screen": 3, "screen_sample": 10, "goal": True, "max_genes": 20}, {"genes": ("INS", "GCG+TTR"), "response": 5}]
)  # fmt: skip
def test_the_table_of_genes_is_that_of_the_command_to_the_bit(run, cells, encoder, tmp_path, more):
    settings = {"max_cells": 6, "max_genes": 8, "unrelated": 2, "num_permutations": 50, "donor": "donor"} | more
    where = " and species == 'human'"
    start, goal = "cell_type == 'alpha cell'", "cell_type == 'beta cell'" if settings.pop("goal", True) else ""
    chosen = replace(
        run, output=str(tmp_path), perturb=Perturb(start=start + where, goal=goal + where, **settings),
        inputs=replace(run.inputs, corpus=f"{run.output}/corpus", checkpoint=f"{run.output}/pretrain"),
    )  # fmt: skip
    expected = tables.read_table(f"{perturb.run(chosen, executor=LocalExecutor())}/genes.parquet").to_pandas()
    found = encoder.perturb(cells, start=start + where, goal=goal + where, source="pancreas", **settings)
    assert len(found)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


# loading


def test_a_run_a_checkpoint_and_a_folder_of_hugging_face_are_loaded(run, cells, encoder, tmp_path):
    expected = encoder.embed(cells[:7])
    for uri in (run.output, Path(run.output), f"{run.output}/pretrain", f"{run.output}/pretrain/"):
        assert np.array_equal(mg.load(uri, device="cpu").embed(cells[:7]), expected)
    files.copy(f"{run.output}/pretrain/record.json", str(tmp_path / "alone/record.json"))
    files.copy(f"{run.output}/pretrain/model.safetensors", str(tmp_path / "alone/model.safetensors"))
    with pytest.raises(mg.UserError, match=r"alone: its vocabulary is not beside it .*; pass vocabulary=URI"):
        mg.load(tmp_path / "alone")
    again = mg.load(tmp_path / "alone", vocabulary=f"{run.output}/corpus", device="cpu")
    assert np.array_equal(again.embed(cells[:7]), expected)


def test_published_weights_are_read_with_their_dictionary_and_medians(run, cells, encoder, tmp_path, caplog):
    """Ids of a published model are its own: here a permutation of ours."""
    bert = Path(export.export(replace(run, output=run.output)))
    medians = f"{run.output}/vocabulary/vocabulary.parquet"
    shuffled = tmp_path / "published"
    shuffled.mkdir()
    words, weights = json.loads((bert / "token_dictionary.json").read_text()), load_file(bert / "model.safetensors")
    order = np.random.default_rng(0).permutation(len(words))
    (shuffled / "config.json").write_bytes((bert / "config.json").read_bytes())
    (tmp_path / "ids.json").write_text(json.dumps({name: int(order[i]) for name, i in words.items()}))
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        weights[name] = weights[name][np.argsort(order)].contiguous()
    save_file(weights, shuffled / "model.safetensors")
    expected = encoder.embed(cells[:7])
    assert np.array_equal(mg.load(bert, medians=medians, cls=False, device="cpu").embed(cells[:7]), expected)
    ids = str(tmp_path / "ids.json")
    caplog.clear()
    published = mg.load(shuffled, dictionary=ids, medians=medians, cls=False, device="cpu")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("load: layer -1 is the last one here" in line for line in warned)
    assert any("load: a cell is the mean over its genes" in line for line in warned)
    assert published.species == ("human", "mouse")
    assert np.array_equal(published.embed(cells[:7]), expected)
    assert mg.load(shuffled, dictionary=ids, medians=medians).tokens.cls  # as the dictionary has it
    with pytest.raises(
        mg.UserError, match=r"published: no token_dictionary.json or .*; pass dictionary=URI of the token"
    ):
        mg.load(shuffled)
    with pytest.raises(mg.UserError, match=r"ranked by the median of each gene; pass medians=URI"):
        mg.load(shuffled, dictionary=str(tmp_path / "ids.json"))


# stages


@pytest.fixture(scope="module")
def tiny():
    """Settings of a run of seconds."""
    return {
        "model.num_layers": 1, "model.dim": 32, "model.num_heads": 2, "model.ffn_dim": 32, "model.max_positions": 48,
        "tokens.max_len": 48, "train.epochs": 1, "train.batch_cells": 16, "train.max_steps": 3, "train.warmup_steps": 1,
        "train.micro_tokens": 2048, "classify.models": ["probe"], "classify.group": "source", "classify.splits": ["random"],
    }  # fmt: skip


def contents(uri):
    """SHA-256 of every file that the record of an artifact names."""
    record = artifacts.require(uri, artifacts.find(uri).kind)
    return record.fingerprint, {name: facts["sha256"] for name, facts in record.files.items()}


@pytest.mark.ray
@pytest.mark.usefixtures("run", "ray_local")
def test_stages_make_what_the_commands_make_to_the_bit(folder, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources = {"human": [folder / "pancreas.h5ad"], "mouse": str(folder / "mouse.h5ad")}
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    options = [option for name, value in tiny.items() for option in ("--set", f"{name}={json.dumps(value)}" if not isinstance(value, str) else f"{name}={value}")]  # fmt: skip
    options += [
        "--output",
        str(theirs),
        "--set",
        "compute.num_workers=1",
        "--set",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
    ]
    given = [f"human={folder}/pancreas.h5ad", f"mouse={folder}/mouse.h5ad"]
    assert mg.prepare(sources, output=mine, settings=tiny) == str(mine / "corpus")
    for name, verb in (("pretrain", mg.pretrain), ("classify", mg.classify)):
        assert verb(output="mine", settings=tiny) == str(mine / name)
    assert not (mine / "mlflow.db").exists()
    for command in (["prepare", *given], ["pretrain"], ["classify"]):
        assert cli.main([*command, *options]) == 0, capsys.readouterr().err
    for name in ("corpus", "vocabulary", "pretrain", "classify", "classify/classifiers/pancreas"):
        assert contents(str(mine / name)) == contents(str(theirs / name)), name
    assert Path(mg.write_report(output=mine)).read_text().startswith("<!")
    assert mg.write_report(output=mine)  # a second call finds the function, not the package of that name
    assert np.array_equal(
        mg.load(mine).embed(folder / "pancreas.h5ad"), mg.load(theirs).embed(folder / "pancreas.h5ad")
    )


def test_mlflow_is_used_where_it_is_asked_for(folder, run, tiny, tmp_path, tracking_uri):
    changes = tiny | {"inputs.corpus": f"{run.output}/corpus"}
    mg.pretrain(output=tmp_path / "a", settings=changes, tracking_uri=tracking_uri)
    runs = MlflowClient(tracking_uri).search_runs(["1"], f"tags.`mixgf.output` = '{tmp_path}/a'")
    assert sorted(r.info.run_name for r in runs) == ["a", "pretrain"]


def test_settings_are_those_of_set_with_its_errors(tmp_path, folder):
    source = {"human": folder / "pancreas.h5ad"}
    errors = {
        r"--set train.lrr=0.1: no field 'lrr'; did you mean 'lr'": lambda: mg.pretrain(settings={"train.lrr": 0.1}, output=tmp_path),
        r"train.lr = -1.0: must be above 0": lambda: mg.pretrain(settings={"train.lr": -1.0}, output=tmp_path),
        r"engine = 'spark': must be local or ray": lambda: mg.pretrain(engine="spark", output=tmp_path),
        r"recipe": lambda: mg.prepare(source, recipe="huge", output=tmp_path),
        r"species": lambda: mg.prepare({"rat": "rat.h5ad"}, output=tmp_path),
        r"none.h5ad: no such file": lambda: mg.prepare({"human": tmp_path / "none.h5ad"}, output=tmp_path),
    }  # fmt: skip
    for text, call in errors.items():
        with pytest.raises(mg.UserError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)


# errors and documentation


def test_what_cannot_be_used_is_one_line(run, cells, encoder, tmp_path):
    errors = {
        r"nothing: no run, checkpoint or Hugging Face folder there": lambda: mg.load(tmp_path / "nothing"),
        r"device = 'cuda': torch finds no CUDA GPU": lambda: mg.load(run.output, device="cuda"),
        r"device = 'gpu7':": lambda: mg.load(run.output, device="gpu7"),
        r"--model .*: 2 classifiers there, one per group": lambda: mg.load_classifier(run.output),
        r"hidden_layer = -4: must be": lambda: encoder.embed(cells, hidden_layer=-4),
        r"pooling = 'cls': this model was trained on sentences without <cls>": lambda: encoder.embed(cells, pooling="cls"),
        r"embed.pooling = 'sum': must be": lambda: encoder.embed(cells, pooling="sum"),
        r"adata: species = 'rat': the model reads human, mouse": lambda: encoder.embed(cells, species="rat"),
        r"adata is list: must be an AnnData": lambda: encoder.embed([1]),
        r"inplace = True: needs an AnnData": lambda: encoder.embed("cells.h5ad", inplace=True),
        r"give one of them": lambda: encoder.embed(cells, inplace=True, copy=True),
        r"threads = 0: must be at least 1": lambda: encoder.embed(cells, threads=0),
        r"none.h5ad: no such file": lambda: encoder.embed(str(tmp_path / "none.h5ad")),
        r"perturb.max_cels: unknown field": lambda: encoder.perturb(cells, start="", max_cels=3),
        r"cell_type has no value 'alpha'": lambda: encoder.perturb(cells, start="cell_type == 'alpha'"),
        r"gene = 'MAFB2'": lambda: encoder.perturb(cells, start="", genes=["MAFB2"]),
        r"species = 'rat': must be human or mouse": lambda: mg.datasets.pancreas("rat"),
    }  # fmt: skip
    for text, call in errors.items():
        with pytest.raises(mg.UserError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_backed_table_is_not_copied_into_memory(encoder, folder, run):
    with pytest.raises(mg.UserError, match=r"copy = True: a backed AnnData cannot be copied in memory"):
        encoder.embed(ad.read_h5ad(folder / "pancreas.h5ad", backed="r"), copy=True)


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__qualname__)
def test_the_example_of_every_public_function_runs(function, run, folder, monkeypatch):
    monkeypatch.chdir(folder)  # where runs/mine is
    (test,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert test.examples, "no example"
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


def test_every_public_function_is_among_the_documented_ones():
    found = {f for name in mg.__all__ if inspect.isfunction(f := getattr(mg, name))}
    for kind in (mg.CellEncoder, mg.CellClassifier):
        found |= {f for name, f in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
    found |= {f for name, f in inspect.getmembers(mg.datasets, inspect.isfunction) if f.__module__ == "mixgf.datasets"}
    assert found == set(PUBLIC)


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells in order, without Jupyter."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((Path(__file__).parent.parent / "jobs" / "quickstart.ipynb").read_text())
    names = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
            assert not cell["outputs"], "the notebook is kept without outputs"
    assert names["human"].obsm["X_mixgf"].shape == (names["human"].n_obs, 64)
    assert set(names["human"].obs["mixgf_label"]) <= set(names["TYPES"])
    assert (tmp_path / "runs/quickstart/report.html").exists()
    assert not (tmp_path / "runs/quickstart/mlflow.db").exists()
