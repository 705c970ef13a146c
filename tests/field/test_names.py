"""Any name of a column or label goes through the commands: expressions, splits, files, MLflow, AnnData; outputs join by `obs_names`."""

import html
import importlib
import logging
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from mixgf import cli
from mixgf.config.data import Source
from mixgf.config.expressions import literal, quoted
from mixgf.config.fields import with_absolute_paths
from mixgf.config.run import Config
from mixgf.corpus import obs_query
from mixgf.corpus.reader import Corpus
from mixgf.execution import LocalExecutor
from mixgf.report import build
from mixgf.report.figures import heatmap, style
from mixgf.stages import annotate
from mixgf.storage import tables
from tests.field import make_cases as make

TYPES = {
    "alpha cell": "NK/T",
    "beta cell": "=1+1",
    "delta cell": '\u65e5\u672c `B` "x" it\'s',
    "acinar cell": "../" + "\u03b1" * 150,
}
LABEL = "Zell-Typ \u03b1"
COLUMNS = (
    "cell type", "percent.mt", "a/b", "c/d/e", "\u65e5\u672c", "it's", 'say "x"', "back`tick", "``", "=1+1", "@x", "..",
    "and", "True", "in", "1", "-", "{x}", "%s %41", "a,b", "a=b", "C:\\x", "line\nbreak", "CELL TYPE", "u\u0308", "\u00fc", "n" * 300, "index", "_x", " padded ",
)  # fmt: skip
SMALL = (
    "qc.method=none", "qc.drop_duplicates=false", "tokens.max_len=128", "model.num_layers=1", "model.dim=32", "model.num_heads=2",
    "model.ffn_dim=32", "model.max_positions=128", "train.max_steps=4", "train.batch_cells=16", "compute.num_workers=1", "classify.seeds=1",
    "classify.models=probe,majority", "classify.splits=random,donor", "perturb.max_cells=4", "perturb.max_genes=4", "perturb.num_permutations=20",
)  # fmt: skip


def names_of(cells):
    return [f"cell {k:03d}/\u03b1:{k}" for k in range(cells)]


def write(path):
    a = make.cells(n=160, types=tuple(TYPES))
    kinds = a.obs["cell_type"].astype(str)
    a.obs_names = names_of(160)
    columns = {LABEL: kinds.map(TYPES).to_numpy(), "the `donor`": a.obs["donor"].astype(str).to_numpy()}
    columns |= {name: np.where(np.arange(160) % 4 == i % 4, "x", "y") for i, name in enumerate(COLUMNS)}
    a.obs = pd.DataFrame(columns, index=a.obs_names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a.write_h5ad(path)
    return a


def commands(path, output):
    """The words of every command of a run, as a user writes them; double underscores stand for the dots in names of settings."""
    start, goal = (f"{quoted(LABEL)} == {literal(label)}" for label in list(TYPES.values())[1:3])
    of_each = {
        "prepare": {}, "pretrain": {}, "classify": {"classify__label": LABEL, "classify__donor": "the `donor`"},
        "perturb": {"perturb__start": start, "perturb__goal": goal, "perturb__donor": "the `donor`"}, "embed": {}, "report": {},
    }  # fmt: skip
    for command, settings in of_each.items():
        chosen = [*SMALL, *(f"{name.replace('__', '.')}={value}" for name, value in settings.items())]
        sources = [f"human=Spender 1 \u03b1={path}"] if command == "prepare" else []
        yield [
            command,
            *sources,
            "--recipe",
            "laptop",
            "--output",
            str(output),
            *(w for s in chosen for w in ("--set", s)),
        ]


def run(words):
    """A command in this process."""
    config = with_absolute_paths(cli._config(cli._parser().parse_args(words)))
    if words[0] == "report":
        return build.build_report(config, f"{config.output}/report.html")
    return importlib.import_module(f"mixgf.stages.{words[0]}").run(config, executor=LocalExecutor())


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The file, and a run of it through all stages."""
    folder = tmp_path_factory.mktemp("names")
    a, output = write(folder / "in.h5ad"), folder / "run \u03b1%20"
    with warnings.catch_warnings():
        for words in commands(folder / "in.h5ad", output):
            if words[0] == "report":
                warnings.simplefilter("error", UserWarning)  # of a figure that has no room for a name
            run(words)
    return a, folder, output


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_line_on_ray_gives_the_same_from_the_first_name_to_the_last(chain, ray_local, tmp_path):
    _, folder, output = chain
    again = tmp_path / "run '2' \u03b1"
    log = logging.getLogger("mixgf")
    before = log.handlers[:], log.level, log.propagate
    for words in commands(folder / "in.h5ad", again):
        assert cli.main(words) == 0, words
    log.handlers[:], log.level, log.propagate = before
    for name in (
        "corpus/shards/00000.parquet",
        "classify/predictions.parquet",
        "perturb/genes.parquet",
        "embed/shards/00000.parquet",
    ):
        one, two = (tables.read_table(f"{place}/{name}").to_pandas() for place in (output, again))
        pd.testing.assert_frame_equal(one, two, check_exact=True)  # a missing value equals another one
    page = (again / "report.html").read_text()
    for label in TYPES.values():
        assert html.escape(label, quote=False) in page, label


@pytest.mark.slow
def test_every_column_is_in_the_corpus_and_can_be_asked_for(chain):
    a, _, output = chain
    obs = Corpus(str(output / "corpus")).obs()
    assert obs["cell"].tolist() == [f"Spender 1 \u03b1:{name}" for name in a.obs_names]
    for column in a.obs.columns:
        assert obs[column].tolist() == a.obs[column].tolist(), column
        value = a.obs[column].iloc[0]
        found = obs_query.select_cells(obs, f"{quoted(column)} == {literal(value)}", "perturb.start")
        np.testing.assert_array_equal(found, np.flatnonzero(a.obs[column].to_numpy() == value))


@pytest.mark.slow
def test_vectors_join_to_the_cells_of_the_file_by_its_own_names(chain):
    a, _, output = chain
    joined = ad.read_h5ad(output / "embed/cells.h5ad").obs.set_index("cell_name").loc[a.obs_names]
    for column in a.obs.columns:
        assert joined[column].astype(str).tolist() == a.obs[column].tolist(), column


@pytest.mark.slow
def test_labels_of_any_spelling_are_scored_and_shown(chain):
    _, _, output = chain
    predictions = tables.read_table(str(output / "classify/predictions.parquet")).to_pandas()
    assert set(predictions["true"]) == set(TYPES.values())
    page = (output / "report.html").read_text()
    for label in TYPES.values():
        assert html.escape(label, quote=False) in page, label


READ = {
    "h5ad": lambda path: ad.read_h5ad(path).obs.rename_axis("cell").reset_index(),
    "parquet": pd.read_parquet,
    "csv": pd.read_csv,
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", READ)
def test_labels_go_into_files_that_join_by_the_user_s_names(ending, chain):
    a, folder, output = chain
    to = folder / f"out.{ending}"
    source = Source(uri=str(folder / "in.h5ad"), species="", name="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        annotate.run(str(output), source, str(to), Config(), executor=LocalExecutor())
    found = READ[ending](to)
    assert found["cell"].tolist() == a.obs_names.tolist()
    formula = "'" if ending == "csv" else ""  # a spreadsheet would run =1+1
    labels = {formula + label if label.startswith("=") else label for label in TYPES.values()}
    assert set(found["mixgf_label"]) <= labels
    if ending == "h5ad":
        after = ad.read_h5ad(to)
        assert after.obs[list(a.obs.columns)].astype(str).equals(a.obs.astype(str))
        assert sorted(after.obsm["mixgf_probabilities"].columns) == sorted(TYPES.values())


def test_names_in_figures_are_short_and_no_mathematics():
    long = "../" + "\u03b1" * 150
    assert len(style.short(long)) == style.LONGEST_NAME
    assert style.short("CD4$^+$ T\ncell") == "CD4$^+$ T cell"
    table = pd.DataFrame([[1.0, 0.0], [0.0, 1.0]], index=["CD4$^+$", long], columns=["$x$ $", "\u65e5\u672c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = heatmap.heatmap(table, "t", rows="true", columns="predicted", text=[["1", "0"], ["0", "1"]])
    assert "CD4$^+$" in svg
    assert "$x$ $" in svg
    assert "\u65e5\u672c" in svg
