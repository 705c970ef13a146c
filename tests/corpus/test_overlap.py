"""What an evaluation shares with a pretraining corpus: by counts whatever the order of columns, by sentence, by metadata."""

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from mixgf.config.data import QC, Source, Tokens
from mixgf.config.run import Config, Tracking
from mixgf.corpus import overlap
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import artifacts, files


def cells(rows: slice) -> anndata.AnnData:
    data = anndata.read_h5ad(files.local_path("resource:pancreas_human_baron.h5ad"))[rows]
    x = sparse.csr_matrix(data.X).astype(np.int32)
    obs = data.obs[["cell_type", "donor"]].astype(str).assign(dataset="baron")
    return anndata.AnnData(x, obs=obs, var=data.var[["ensembl_id"]])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("audit")
    cells(slice(0, 60)).write_h5ad(folder / "seen.h5ad")
    run = Config(output=str(folder / "run"), tokens=Tokens(max_len=64), qc=QC(method="none"), tracking=Tracking(uri=f"sqlite:///{folder}/m.db"),
                 sources=(Source(uri=str(folder / "seen.h5ad"), species="human", name="seen"),))  # fmt: skip
    return prepare.run(run, executor=LocalExecutor())


def mine(path: Path, data: anndata.AnnData) -> overlap.AuditedCells:
    data.write_h5ad(path)
    return overlap.evaluation_cells(f"human={path}", Config().species)


def test_cells_are_found_by_their_counts_in_any_order_of_columns(corpus: str, tmp_path: Path) -> None:
    data = cells(slice(40, 90))
    turned = data[:, np.random.default_rng(0).permutation(data.n_vars)].copy()
    turned.obs_names = [f"other{i}" for i in range(turned.n_obs)]
    found = overlap.compare_cells(mine(tmp_path / "a.h5ad", turned), overlap.corpus_cells(corpus))
    assert found.cells == (20, 50)
    assert found.names == (0, 50)
    assert "20 of 50 evaluation cells (40.0%) were in the pretraining corpus, by counts" in found.line


def test_one_count_more_is_another_cell_but_has_its_name(corpus: str, tmp_path: Path) -> None:
    data = cells(slice(0, 10))
    x = data.X.tolil()
    x[3, 7] += 1
    data.X = sparse.csr_matrix(x)
    evaluated, trained = mine(tmp_path / "a.h5ad", data), overlap.corpus_cells(corpus)
    found = overlap.compare_cells(replace(evaluated, near=None), trained)
    assert found.cells == (9, 10)
    assert found.names == (10, 10)
    assert "10 by name within a data set of the same name" in found.line
    near = overlap.compare_cells(evaluated, trained)  # its highest counts are the same
    assert (near.cells, near.near) == ((10, 10), 1)


@pytest.mark.parametrize("min_cells", [3, 10])
def test_cells_are_found_after_genes_were_filtered(corpus: str, tmp_path: Path, min_cells: int) -> None:
    detected = np.asarray(
        (anndata.read_h5ad(files.local_path("resource:pancreas_human_baron.h5ad")).X > 0).sum(0)
    ).ravel()
    data = cells(slice(40, 90))[:, detected >= min_cells].copy()
    evaluated, trained = mine(tmp_path / "a.h5ad", data), overlap.corpus_cells(corpus)
    found = overlap.compare_cells(evaluated, trained)
    assert found.cells == (20, 50)
    assert found.near is not None
    exact = overlap.compare_cells(replace(evaluated, near=None), trained)
    assert exact.cells == (20 - found.near, 50)
    assert (exact.near, "near" in exact.json()) == (None, False)
    if min_cells == 10:
        assert found.near > 10
        assert f"({found.near} of them with other genes, by their highest counts)" in found.line
    few = trained.only(np.arange(50))  # ten of the twenty
    assert overlap.compare_cells(evaluated, few).cells == (10, 50)
    assert overlap.compare_cells(trained.only(np.arange(45, 60)), evaluated).cells == (15, 15)


def test_donors_and_data_sets(corpus: str, tmp_path: Path) -> None:
    data = cells(slice(60, 80))
    known = data.obs["donor"].iloc[0]
    data.obs["donor"] = [known] * 10 + ["new"] * 10
    found = overlap.compare_cells(mine(tmp_path / "a.h5ad", data), overlap.corpus_cells(corpus))
    assert found.metadata == {"data set": (1, 1), "donor": (1, 2)}
    data.obs["dataset"] = "elsewhere"
    found = overlap.compare_cells(mine(tmp_path / "a.h5ad", data), overlap.corpus_cells(corpus))
    assert found.metadata == {"data set": (0, 1), "donor": (0, 2)}
    assert found.cells == (0, 20)


def test_a_corpus_against_itself_by_hash_and_by_sentence(corpus: str) -> None:
    one = overlap.corpus_cells(corpus)
    found = overlap.compare_cells(one, one)
    assert found.same
    assert found.cells == (60, 60)
    by_sentence = overlap.compare_cells(replace(one, hashes=None), one)
    assert (by_sentence.by, by_sentence.cells) == ("sentences", (60, 60))
    assert overlap.compare_cells(replace(one, hashes=None, corpus=None), one).cells is None


def test_another_corpus_of_the_same_cells_is_not_these_very_cells(corpus: str, tmp_path: Path) -> None:
    again = Config(output=str(tmp_path / "run"), tokens=Tokens(max_len=32), qc=QC(method="none"), tracking=Tracking(uri="off"),
                   sources=(Source(uri=str(tmp_path / "seen.h5ad"), species="human", name="seen"),))  # fmt: skip
    cells(slice(0, 60)).write_h5ad(tmp_path / "seen.h5ad")
    other = overlap.corpus_cells(prepare.run(again, executor=LocalExecutor()))
    found = overlap.compare_cells(other, overlap.corpus_cells(corpus))
    assert found.cells == (60, 60)
    assert not found.same
    assert "these very cells" not in found.line


def test_a_checkpoint_stands_for_the_corpus_beside_it(corpus: str, tmp_path: Path) -> None:
    beside = corpus.rsplit("/", 1)[0] + "/pretrain"
    parent = artifacts.require(corpus, "corpus").fingerprint
    for uri in (beside, str(tmp_path / "pretrain")):
        record = artifacts.plan("checkpoint", 1, {}, {"corpus": parent})
        artifacts.begin(uri, record)
        artifacts.finish(uri, record)
    assert overlap.training_corpus(beside) == corpus
    assert overlap.training_corpus(corpus.rsplit("/", 1)[0]) == corpus
    with pytest.raises(
        UserError, match=r"a checkpoint, whose corpus \(fingerprint .*\) does not lie beside it; name the corpus"
    ):
        overlap.training_corpus(str(tmp_path / "pretrain"))
    with pytest.raises(UserError, match="neither a finished corpus nor a checkpoint beside its corpus"):
        overlap.training_corpus(str(tmp_path))
    with pytest.raises(UserError, match="neither a finished corpus nor SPECIES=FILE with one of human, mouse"):
        overlap.evaluation_cells(str(tmp_path / "x.h5ad"), Config().species)
