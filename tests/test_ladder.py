"""`jobs/ladder.py` reads the counts of a study as they are in its file."""

import importlib
import shutil
from pathlib import Path

import anndata
import pytest

from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import files

NAME = "pancreas_mouse_baron"


@pytest.fixture
def ladder(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "jobs")
    return importlib.import_module("ladder")


def test_the_counts_of_a_study_are_those_of_its_file(ladder, tmp_path):
    shutil.copy(files.local_path(f"resource:{NAME}.h5ad"), tmp_path / f"{NAME}.h5ad")
    config = ladder.base_config(tmp_path / "run", (NAME,), str(tmp_path))
    world = ladder.World({"all": prepare.run(config, executor=LocalExecutor())}, {})
    cells, found = world.counts(NAME)
    assert cells.tolist() == list(range(world.corpus.num_cells))
    data = anndata.read_h5ad(tmp_path / f"{NAME}.h5ad")
    column = {gene: i for i, gene in enumerate(data.var["ensembl_id"].astype(str))}
    mine = [i for i, gene in enumerate(found.genes) if gene in column]
    assert len(mine) > 1_000
    rows = world.corpus.obs(["source_row"])["source_row"].to_numpy()[cells]
    expected = data.X.tocsr()[rows][:, [column[found.genes[i]] for i in mine]]
    more = found.matrix[:, mine].toarray() - expected.toarray()
    assert (more >= 0).all()
    assert (more > 0).any(0).sum() <= 3  # columns of former symbols are added to their gene
