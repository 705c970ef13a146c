"""The paper's three perturbation experiments run on files laid out as CELLxGENE's, and stand beside its Table 4.

The cells are the bundled pancreas ones under assumed diagnoses: what is tested is the way, not the disease.
"""

from importlib import resources

import anndata
import numpy as np
import pytest

from mixgf.config import data, parse, recipes, run, training
from mixgf.config.data import Source
from mixgf.config.parse import override
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.perturbation import reference_genes
from mixgf.report import build, load
from mixgf.stages import perturb, prepare
from mixgf.storage import artifacts, files, tables

SMALL = ["tokens.max_len=128", "model.max_positions=128", "train.precision=fp32", "compute.gpus_per_worker=0", "perturb.max_cells=20", "perturb.min_coverage=0.1",
         "perturb.num_permutations=300", "vocab.reuse=", "qc.method=none"]  # fmt: skip
DISEASES = {
    "human": ("Alzheimer disease",),
    "mouse": ("diabetic kidney disease", "autosomal dominant polycystic kidney disease"),
}


def _file(path, species):
    """Counts in raw.X under Ensembl ids, log values in X, `disease` and `donor_id` in obs."""
    full = anndata.read_h5ad(str(resources.files("mixgf") / "resources" / f"pancreas_{species}_baron.h5ad"))
    full.X = full.X.astype(np.float32)
    full = full[:: len(full) // 90][:, full.var["ensembl_id"].astype(str) != ""].copy()
    full = full[:, ~full.var["ensembl_id"].duplicated()].copy()
    full.var_names = full.var["ensembl_id"].astype(str).to_numpy()
    full.var = full.var[[]]
    number = np.arange(len(full))
    full.obs["disease"] = np.array(["normal", *DISEASES[species]])[number % (1 + len(DISEASES[species]))]
    full.obs["donor_id"] = [f"d{i}" for i in number // 4 % 7]
    full.raw = full.copy()
    full.X = full.X.log1p()
    full.write_h5ad(path)


@pytest.fixture(scope="module")
def made(ray_local, tmp_path_factory):
    """A corpus of both files, made by the recipe, and an untrained encoder on its vocabulary."""
    folder = tmp_path_factory.mktemp("experiments")
    sources = []
    for species in DISEASES:
        path = folder / f"{species}.h5ad"
        _file(path, species)
        sources.append(Source(uri=str(path), species=species, layer="raw"))
    chosen = override(recipes.get("paper_dkd"), [*SMALL, f"output={folder}"])
    chosen = parse.from_dict(run.Config, parse.to_dict(chosen) | {"sources": [parse.to_dict(s) for s in sources]})
    corpus = prepare.run(chosen)
    vocabulary = Corpus(corpus).vocabulary
    record = artifacts.plan("checkpoint", 1, {}, {})
    artifacts.begin(f"{folder}/weights", record)
    row = training.Model(num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_positions=128, init_sd=0.3)
    model = MaskedModel(row, vocabulary.size, seed=5)
    checkpoint.publish_checkpoint(
        f"{folder}/weights", record, model, vocabulary=vocabulary.hash, tokens=data.Tokens(max_len=128)
    )
    return corpus, f"{folder}/weights"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("name", "at_least"), [("dkd", set()), ("adpkd", set()), ("alzheimer", {"HSPB1"})])
def test_a_recipe_of_the_paper_prints_its_genes_beside_table_4(made, tmp_path, caplog, name, at_least):
    corpus, weights = made
    caplog.set_level("INFO")
    changes = [f"output={tmp_path}", f"inputs.corpus={corpus}", f"inputs.checkpoint={weights}"]
    chosen = override(recipes.get(f"paper_{name}"), [*SMALL, *changes])
    uri = perturb.run(chosen, executor=LocalExecutor())
    genes = tables.read_table(f"{uri}/genes.parquet").to_pandas()
    assert genes["num_donors"].max() >= 3
    assert set(genes["species"]) == set(reference_genes.read_table4(name)["species"])
    assert set(genes["operation"]) == set(reference_genes.read_table4(name)["operation"])
    table = reference_genes.compare_with_table4(genes, chosen).set_index("symbol")
    assert set(table.index) == set(reference_genes.read_table4(name)["symbol"])
    scored = set(table.index) & set(genes["symbol"])
    assert at_least <= scored
    for gene, row in table.iterrows():
        assert (row["rank"] > 0) == (gene in scored), (gene, row.to_dict())
        if gene in scored:
            mine = genes[genes["symbol"] == gene].iloc[0]
            assert 1 <= row["rank"] <= row["of"]
            assert (row["shift"], row["p_cell"]) == (mine["shift"], mine["p_cell"])
    said = caplog.text
    assert f"paper's Table 4 ({name}) | this run:" in said
    assert ("not scored" in said) == (scored != set(table.index))
    html = build.render(load.load_results(chosen, light=True), "key")
    assert "Table 4 of the paper" in html
    caplog.clear()
    perturb.run(chosen, executor=LocalExecutor())  # nothing is computed again, and the table is printed again
    said = caplog.text
    assert "already there" in said
    assert "this run:" in said


@pytest.mark.slow
@pytest.mark.ray
def test_another_list_of_known_genes_needs_no_new_perturbation(made, tmp_path, caplog):
    corpus, weights = made
    caplog.set_level("INFO")
    changes = [f"output={tmp_path}", f"inputs.corpus={corpus}", f"inputs.checkpoint={weights}"]
    chosen = override(recipes.get("paper_alzheimer"), [*SMALL, *changes])
    perturb.run(chosen, executor=LocalExecutor())
    caplog.clear()
    perturb.run(override(chosen, ["perturb.reference_genes=HSPB1,S100B,HSP90AA1"]), executor=LocalExecutor())
    said = caplog.text
    assert "already there" in said
    assert "known genes, 1 of" in said
    assert "baseline: differential expression" in said
    with pytest.raises(UserError, match=r"perturb\.reference_genes = 'none\.tsv': no such file"):
        perturb.run(
            override(chosen, ["perturb.reference_genes=none.tsv", f"output={tmp_path}/other"]), executor=LocalExecutor()
        )
    assert not files.exists(f"{tmp_path}/other/perturb")


def test_only_recipes_for_given_cells_bring_a_question_of_their_own():
    asking = {name for name, make in recipes.RECIPES.items() if make().perturb.start or make().perturb.alternatives}
    assert asking == {"demo", "gpu_smoke", "paper_dkd", "paper_adpkd", "paper_alzheimer"}
