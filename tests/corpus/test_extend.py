"""Adding sources to a corpus: only they are read, and the corpus is that of all sources prepared together."""

import dataclasses

import anndata
import pytest
from executors import Through, dying, refusing

from mixgf.config.data import QC, Prepare, Tokens, Vocab
from mixgf.corpus import prepare_passes
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import artifacts, files, tables


@pytest.fixture
def runs(world, tmp_path):
    """A corpus of two sources, the config that adds the third, and that of all three at once with the same vocabulary."""
    config, _ = world
    config = dataclasses.replace(
        config, sources=tuple(dataclasses.replace(s, obs=("cell_type",)) for s in config.sources)
    )
    first = dataclasses.replace(config, output=str(tmp_path / "all"))
    prepare.run(first, executor=LocalExecutor())  # only for a vocabulary that knows all three species
    fixed = dataclasses.replace(config, vocab=Vocab(reuse=str(tmp_path / "all" / "vocabulary")))
    old = dataclasses.replace(fixed, output=str(tmp_path / "old"), sources=config.sources[:2])
    older = prepare.run(old, executor=LocalExecutor())
    new = dataclasses.replace(
        fixed, output=str(tmp_path / "new"), sources=config.sources[2:],
        prepare=dataclasses.replace(config.prepare, extend=older),
    )  # fmt: skip
    together = dataclasses.replace(fixed, output=str(tmp_path / "together"))
    return older, new, together


def contents(uri):
    names = files.list_dir(uri)
    paths = [n for n in names if n.endswith(".parquet")] + [f"shards/{n}" for n in files.list_dir(f"{uri}/shards")]
    return {f: files.sha256(f"{uri}/{f}") for f in paths}


def test_an_added_source_alone_is_read_and_the_corpus_is_that_of_all_together(runs, monkeypatch):
    older, new, together = runs
    expected = prepare.run(together, executor=LocalExecutor())
    read = []
    measure = prepare_passes.measure_cells
    monkeypatch.setattr(
        prepare_passes,
        "measure_cells",
        lambda plan: (read.append(plan.row_range.source.name), measure(plan)),
    )
    before = contents(older)
    uri = prepare.run(new, executor=LocalExecutor())
    assert set(read) == {"cow"}
    assert contents(older) == before
    assert contents(uri) == contents(expected)
    a, b = artifacts.require(uri, "corpus"), artifacts.require(expected, "corpus")
    assert a.counts == b.counts
    assert {k: a.details[k] for k in a.details} == b.details
    assert a.parents["extends"] == artifacts.require(older, "corpus").fingerprint
    assert Corpus.open(uri).num_cells == a.counts["kept"]


def test_a_killed_extension_continues_and_a_second_one_does_nothing(runs):
    _, new, together = runs
    expected = contents(prepare.run(together, executor=LocalExecutor()))
    calls = []

    with pytest.raises(KeyboardInterrupt):
        prepare.run(new, executor=dying(9, calls))
    assert {"copy_shard", "measure_cells"} & set(calls)
    uri = prepare.run(new, executor=LocalExecutor())
    assert contents(uri) == expected

    assert prepare.run(new, executor=Through(refusing)) == uri


def test_cells_that_the_older_corpus_holds_are_duplicates(runs, tmp_path):
    older, new, _ = runs
    source = artifacts.require(older, "corpus").config["sources"][0]
    cells = anndata.read_h5ad(source["uri"])
    cells[:20].copy().write_h5ad(tmp_path / "again.h5ad")
    again = dataclasses.replace(
        new.sources[0], uri=str(tmp_path / "again.h5ad"), species=source["species"], name="again", obs=()
    )
    both = dataclasses.replace(new, sources=(*new.sources, again), qc=new.qc)
    uri = prepare.run(both, executor=LocalExecutor())
    dropped = {(r["source"], r["reason"]): r["cells"] for r in tables.read_table(f"{uri}/dropped.parquet").to_pylist()}
    kept = {r["source"]: r["cells_kept"] for r in tables.read_table(f"{uri}/mapping.parquet").to_pylist()}
    assert kept["again"] == 0
    assert dropped["again", "duplicate"] > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": Vocab()}, r"the vocabulary is not fixed: new cells change its medians.*--set vocab\.reuse"),
        ({"qc": QC(min_genes=9)}, r"made with other settings: qc\.\w+: .*prepare all sources together"),
        ({"tokens": Tokens(max_len=7)}, r"made with other settings: tokens\.max_len: 20 -> 7"),
        ({"prepare": Prepare(extend="nowhere")}, r"nowhere: no finished corpus"),
    ],
    ids=["vocabulary", "qc", "tokens", "missing"],
)
def test_what_cannot_be_added_says_why_and_how_else(runs, change, message):
    _, new, _ = runs
    with pytest.raises(UserError, match=message):
        prepare.run(dataclasses.replace(new, **change), executor=LocalExecutor())


def test_a_source_that_is_there_and_a_foreign_vocabulary_are_refused(runs, tmp_path, world):
    _, new, _ = runs
    config, _ = world
    with pytest.raises(UserError, match=r"holds a source named 'ant' already; give only the sources to be added"):
        prepare.run(dataclasses.replace(new, sources=config.sources[:1]), executor=LocalExecutor())
    other = dataclasses.replace(config, output=str(tmp_path / "other"), sources=config.sources[:1])
    prepare.run(other, executor=LocalExecutor())
    foreign = dataclasses.replace(new, vocab=Vocab(reuse=str(tmp_path / "other" / "vocabulary")))
    with pytest.raises(UserError, match=r"made with another vocabulary than vocab\.reuse"):
        prepare.run(foreign, executor=LocalExecutor())


def test_more_sources_in_the_same_output_are_refused_with_the_way_to_add_them(runs, world, tmp_path):
    config, _ = world
    fewer = dataclasses.replace(config, output=str(tmp_path / "grow"), sources=config.sources[:2])
    prepare.run(fewer, executor=LocalExecutor())
    with pytest.raises(
        UserError, match=r"holds another corpus: .*--set prepare\.extend=\S+/corpus --set vocab\.reuse=\S+/vocabulary"
    ):
        prepare.run(dataclasses.replace(fewer, sources=config.sources), executor=LocalExecutor())
