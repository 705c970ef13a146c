"""Laws of inspect: every figure is the plain count over the sentences, whatever the batches; what is not recorded is null."""

import dataclasses
import json

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixgf import cli
from mixgf.config import recipes
from mixgf.config.data import QC, Prepare, Source, Tokens
from mixgf.config.run import Tracking
from mixgf.corpus import summary
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.genes.vocabulary import Vocabulary
from mixgf.report import corpus_text
from mixgf.report.figures import corpus_inspection
from mixgf.stages import prepare
from mixgf.storage import artifacts, files

MAX_LEN = 700


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """150 human and 90 mouse bundled cells, one source of each named in the config, and one file that is refused."""
    folder = tmp_path_factory.mktemp("inspect")
    sources = []
    for species, num in (("human", 150), ("mouse", 90)):
        cells = anndata.read_h5ad(files.local_path(f"resource:pancreas_{species}_baron.h5ad"))
        some = cells[np.linspace(0, cells.n_obs - 1, num).astype(int)].copy()
        some.obs[f"of {species}"] = "yes"  # a column that the other source lacks
        some.write_h5ad(folder / f"{species}.h5ad")
        sources.append(Source(uri=str(folder / f"{species}.h5ad"), species=species))
    (folder / "broken.h5ad").write_bytes((folder / "mouse.h5ad").read_bytes()[:20_000])
    config = dataclasses.replace(
        recipes.get("default"), output=str(folder / "run"), tokens=Tokens(max_len=MAX_LEN),
        sources=(*sources, Source(uri=str(folder / "broken.h5ad"), species="mouse")), qc=QC(method="mad", num_mads=2.0),
        prepare=Prepare(shard_cells=64, block_cells=50), tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
    )  # fmt: skip
    return prepare.run(config, executor=LocalExecutor())


def cells_of(uri):
    record = artifacts.require(uri, "corpus")
    return pa.concat_tables([pq.read_table(f"{uri}/shards/{s['name']}") for s in record.details["shards"]]).to_pylist()


def test_every_figure_is_the_plain_count_over_the_sentences(corpus, monkeypatch):
    found = summary.summarise_corpus(corpus)
    json.dumps(found, allow_nan=False)
    cells, record, vocabulary = cells_of(corpus), artifacts.require(corpus, "corpus"), Vocabulary.load(corpus)
    assert found["cells"] == {"read": 240, "kept": len(cells), "dropped": record.counts["dropped"]}
    assert found["tokens"] == sum(len(c["tokens"]) for c in cells)
    assert found["bytes"] == sum(files.size(f"{corpus}/shards/{n}") for n in files.list_dir(f"{corpus}/shards"))
    for row in found["sources"]:
        mine = [c for c in cells if c["source"] == row["source"]]
        assert row["kept"] == len(mine)
        assert row["read"] == row["kept"] + sum(row["dropped"].values())
        assert sum(row["dropped"].values()) > 0  # else the law above is empty
        assert row["mean_counts"] == pytest.approx(np.mean([c["n_counts"] for c in mine]))
        assert row["mean_genes"] == pytest.approx(np.mean([c["n_genes"] for c in mine]))
        assert 0.9 < row["counts_known"] <= 1
    assert [r["source"] for r in found["sources"]] == ["human", "mouse"]
    assert [r["name"] for r in found["refused"]] == ["broken"]
    for species in ("human", "mouse"):
        mine = [c for c in cells if c["species"] == species]
        types = [c["cell_type"] for c in mine]
        assert found["cell_types"][species] == {t: types.count(t) for t in set(types)}
        lengths = sorted(len(c["tokens"]) for c in mine)
        told = found["lengths"][species]
        for name, value in told["quantiles"].items():  # the smallest length that so many cells do not exceed
            share = float(name[:-1]) / 100
            assert value == min(n for n in lengths if sum(m <= n for m in lengths) >= max(1, share * len(lengths)))
        assert told["at_max_len"] == np.mean([n == MAX_LEN for n in lengths])
        assert told["mean"] == pytest.approx(np.mean(lengths))
        assert told["histogram"] == np.histogram(lengths, bins=np.asarray(told["edges"]) - 0.5)[0].tolist()
        assert told["histogram"][-1] == sum(n == MAX_LEN for n in lengths) > 0
        seen = {int(t): 0 for t in vocabulary.species_genes(species).tokens}
        for cell in mine:
            for token in cell["tokens"]:
                seen[token] += 1
        part = found["vocabulary"]["species"][species]
        assert part["genes"] == len(seen) == part["seen"] + part["never"]
        assert part["never"] == sum(n == 0 for n in seen.values()) > 0
        assert part["median_cells"] == np.median(list(seen.values()))
        assert part["seen_in"]["10%"] == sum(n >= 0.1 * len(mine) for n in seen.values())
        assert part["by_cells"][0] == max(seen.values())
        table = part["of_table"]
        assert table["share"] * table["genes"] == pytest.approx(part["genes"])
    for name, share in found["columns"].items():
        assert share == pytest.approx(np.mean([c[name] is not None for c in cells])), name
    assert min(found["columns"].values()) < 1 == max(found["columns"].values())
    monkeypatch.setattr(summary, "BATCH_CELLS", 7)
    assert _close(summary.summarise_corpus(corpus), found)


def _close(one, two):
    """Equal but for the last bits of means, which are sums in another order."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_close(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(_close, one, two))
    return one == pytest.approx(two, rel=1e-12) if isinstance(one, float) else one == two


def test_the_text_says_what_was_found(corpus):
    found = summary.summarise_corpus(corpus)
    text = corpus_text.text(found)
    kept = found["cells"]["kept"]
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in found["cells"]["dropped"].items() if n)
    assert f"{kept:,} cells kept of 240 read ({100 * kept / 240:.1f} %); dropped: {dropped}\n" in text
    assert "refused  broken: " in text
    assert "columns of every cell: " in text
    assert max(map(len, text.splitlines()[:3])) < 120
    many = {f"type {i:02d}": 100 - i for i in range(50)}
    text = corpus_text.text(found | {"cell_types": {"human": many}, "unlabelled": {"human": 3}})
    assert "cell types, human: 50, 3 cells without one" in text
    assert f"… 30 more types with {sum(100 - i for i in range(20, 50)):,} cells" in text
    assert "type 19" in text
    assert "type 20" not in text
    rows = [found["sources"][0] | {"source": f"s{i}", "kept": 10} for i in range(45)]
    assert "… 5 more sources with 50 kept cells" in corpus_text.text(found | {"sources": rows})


def test_shares_are_never_rounded_to_all_or_nothing():
    shares = (0, 1e-6, 0.5, 0.99999, 1)
    assert [corpus_text.percent(x) for x in shares] == ["0.0 %", "<0.1 %", "50.0 %", "99.9 %", "100.0 %"]


def test_what_a_corpus_does_not_record_is_null(make_corpus, tmp_path):
    uri = make_corpus([5, 9, 7, 3, 40], [0, 0, 1, 1, 1], [3, 2])  # no sources, no mapping, no counts
    found = summary.summarise_corpus(uri)
    assert [(r["source"], r["read"], r["kept"], r["counts_known"], r["mean_counts"]) for r in found["sources"]] == [
        ("source", None, 5, None, None)
    ]
    assert found["vocabulary"]["species"]["human"]["of_table"] is None
    assert found["lengths"]["mouse"]["quantiles"]["50%"] == 7
    assert "kept; dropped: none" in corpus_text.text(found)
    assert corpus_inspection.draw(found, "svg").startswith(b"<?xml")
    # an importer's columns of nulls, and cells without a type
    record = artifacts.require(uri, "corpus")
    for shard in record.details["shards"]:
        where = files.join(uri, "shards", shard["name"])
        table = pq.read_table(where)
        table = table.append_column("n_counts", pa.nulls(table.num_rows, pa.int64()))
        table = table.set_column(table.column_names.index("cell_type"), "cell_type", pa.nulls(table.num_rows, pa.string()))  # fmt: skip
        pq.write_table(table, where)
    found = summary.summarise_corpus(uri)
    assert found["cell_types"] is None
    assert found["sources"][0]["mean_counts"] is None
    assert found["columns"]["n_counts"] == 0
    assert "no column cell_type" in corpus_text.text(found)


def test_shared_ids_are_counted_for_the_species_whose_cell_it_is(make_corpus):
    uri = make_corpus([4, 6], [0, 1], [2])
    table = pq.read_table(f"{uri}/vocabulary.parquet").replace_schema_metadata(None)
    shared = table.set_column(0, "token", pa.array([*range(3, 43)] * 2, pa.int32()))  # gene i is one id in both
    Vocabulary(shared, species=("human", "mouse"), sharing="ortholog").save(f"{uri}/vocabulary.parquet")
    shard = pq.read_table(f"{uri}/shards/00000.parquet")
    tokens = pa.array([[3, 4, 5, 6], [3, 4, 5, 6, 7, 8]], pa.list_(pa.int32()))
    pq.write_table(shard.set_column(0, "tokens", tokens), f"{uri}/shards/00000.parquet")
    words = summary.summarise_corpus(uri)["vocabulary"]
    assert (words["size"], words["shared_tokens"]) == (43, 40)
    assert {n: p["seen"] for n, p in words["species"].items()} == {"human": 4, "mouse": 6}


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_picture_is_the_same_bytes_again_and_names_every_source(corpus, tmp_path, kind):
    found = summary.summarise_corpus(corpus)
    corpus_inspection.save(found, str(tmp_path / f"a.{kind}"))
    data = (tmp_path / f"a.{kind}").read_bytes()
    assert data.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind])
    assert data == corpus_inspection.draw(found, kind)
    if kind == "svg":
        for word in ("human", "mouse", "kept, human", "dropped: depth", "cells read", "tokens", "log scale"):
            assert word in data.decode()


def test_sources_beyond_the_most_are_drawn_as_one():
    one = {"source": "a", "species": "human", "kept": 9, "read": 10, "dropped": {"depth": 1}}
    rows = [one | {"source": f"s{i}", "kept": i, "read": i + 1} for i in range(100)]
    drawn = corpus_inspection._drawn(rows)
    assert len(drawn) == corpus_text.MAX_SOURCES
    for key in ("kept", "read"):
        assert sum(s[key] for s in drawn) == sum(s[key] for s in rows)
    assert sum(s["dropped"]["depth"] for s in drawn) == 100


def test_the_command_prints_text_or_one_object_and_draws_where_told(corpus, tmp_path, capsys):
    assert cli.main(["inspect", corpus]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"as a figure: mixgf inspect {corpus} --plot corpus.png\n")
    before = sorted(files.list_dir(corpus))
    assert cli.main(["inspect", corpus, "--json", "--plot", str(tmp_path / "c.PNG")]) == 0
    assert json.loads(capsys.readouterr().out)["cells"]["read"] == 240
    assert (tmp_path / "c.PNG").stat().st_size > 10_000
    for kind in ("PNG", "svg", "pdf"):
        for _ in range(2):  # its own figure is replaced
            assert cli.main(["inspect", corpus, "--json", "--plot", str(tmp_path / f"c.{kind}")]) == 0
    (tmp_path / "mine.png").write_bytes(b"of a user")
    assert cli.main(["inspect", corpus, "--plot", str(tmp_path / "mine.png")]) == 2
    assert "mine.png: is there and was not drawn by mixgf" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == b"of a user"
    assert sorted(files.list_dir(corpus)) == before


def test_whoever_names_something_else_is_told_what_to_name(corpus, make_corpus, tmp_path, capsys):
    run = corpus.removesuffix("/corpus")
    files.write_json(str(tmp_path / "half" / "plan.json"), files.read_json(f"{corpus}/record.json"))
    cells = tmp_path / "cells.h5ad"
    cells.write_bytes(b"x")
    for argv, message in (
        ([run], f"the folder of a whole run, not a corpus; its corpus is {corpus}"),
        ([f"{run}/vocabulary"], "holds a vocabulary, not a corpus; name the corpus folder"),
        ([str(tmp_path / "half")], r"no finished corpus (unfinished); give the same `mixgf prepare` again"),
        ([str(cells)], "no finished corpus (a file or an empty folder)"),
        ([str(tmp_path)], "no finished corpus (a folder without a record)"),
        ([corpus, "--plot", "a.gif"], "--plot a.gif: must end in .png, .svg or .pdf"),
        ([corpus, "--plot", "plot"], "--plot plot: must end in .png, .svg or .pdf"),
        ([corpus, "--plot", f"{corpus}/a.png"], "lies inside the corpus, to which nothing may be added"),
    ):
        assert cli.main(["inspect", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    uri = make_corpus([5, 9], [0, 1], [1, 1])
    (first, second) = (f"{uri}/shards/0000{i}.parquet" for i in (0, 1))
    files.remove(second)
    with pytest.raises(UserError, match=r"00001\.parquet: a shard of the corpus is missing; restore it"):
        summary.summarise_corpus(uri)
    files.write_bytes(first, files.read_bytes(first)[:-9])
    with pytest.raises(UserError, match=r"00000\.parquet: damaged \(.*\); restore it"):
        summary.summarise_corpus(uri)
