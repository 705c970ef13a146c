"""Laws of prepare: one Ray worker gives what the loop gives, blocks and kills change no byte, kept + dropped == read."""

import dataclasses
import os
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pytest
import s3_world
from executors import Through, backwards, dying
from invented import NUM_GENES
from scipy import sparse

from mixgf.cells import counts, packed_counts, row_major
from mixgf.config.data import QC, Prepare, Source, Tokens, Vocab
from mixgf.corpus import prepare_passes
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor, Receipt, attempt
from mixgf.genes import identify, species
from mixgf.genes.vocabulary import Vocabulary
from mixgf.stages import prepare
from mixgf.storage import artifacts, files, tables


def bytes_of(uri):
    paths = ["index.parquet", "mapping.parquet", "dropped.parquet", "vocabulary.parquet"]
    shards = [f"shards/{n}" for n in files.list_dir(f"{uri}/shards")]
    return {f: files.sha256(f"{uri}/{f}") for f in paths + shards}


def made(config, tmp_path, name, **changes):
    config = dataclasses.replace(config, output=str(tmp_path / name), **changes)
    return prepare.run(config, executor=LocalExecutor())


def shards(uri):
    record = artifacts.require(uri, "corpus")
    return pa.concat_tables([tables.read_table(f"{uri}/shards/{s['name']}") for s in record.details["shards"]])


def test_three_invented_species_become_the_sentences_of_the_formula(world, tmp_path):
    config, counts = world
    uri = made(config, tmp_path, "run")
    record = artifacts.require(uri, "corpus")
    table = shards(uri)
    vocabulary = Vocabulary.load(uri)
    assert record.details["species"] == ["ant", "bee", "cow"]
    assert record.details["vocabulary"] == vocabulary.hash == Vocabulary.load(f"{config.output}/vocabulary").hash
    read = sum(len(x) for x in counts.values())
    dropped = record.counts["dropped"]
    assert record.counts["read"] == read == record.counts["kept"] + sum(dropped.values())
    assert dropped["few_genes"] >= 3
    assert dropped["duplicate"] == 3
    index = tables.read_table(f"{uri}/index.parquet")
    assert index.num_rows == table.num_rows == record.counts["kept"] == sum(s["rows"] for s in record.details["shards"])
    assert index["length"].to_pylist() == table["length"].to_pylist() == [len(t) for t in table["tokens"].to_pylist()]
    assert [record.details["species"][c] for c in index["species"].to_pylist()] == table["species"].to_pylist()
    for cell in table.to_pylist():
        genes, row = vocabulary.species_genes(cell["species"]), counts[cell["species"]][cell["source_row"]]
        x = {int(t): int(row[int(g[4:])]) / m for g, t, m in zip(genes.genes, genes.tokens, genes.medians, strict=True)}
        expected = sorted((t for t in x if x[t] > 0), key=lambda t: (-x[t], t))[:20]
        assert cell["tokens"] == expected
        assert cell["cell"] == f"{cell['source']}:c{cell['source_row']}"
        assert (cell["n_counts"], cell["n_genes"]) == (row.sum(), (row > 0).sum())
        assert cell["mito_fraction"] == pytest.approx(row[0] / row.sum())
        assert cell["cell_type"] == "ab"[cell["source_row"] % 2]
        assert cell["donor"] == ("d1" if cell["species"] == "ant" else None)
        assert isinstance(cell["score"], str)  # a number in two sources, text in the third: text
    for name in ("ant", "bee", "cow"):  # medians against numpy's, over kept cells
        kept = counts[name][[c["source_row"] for c in table.to_pylist() if c["species"] == name]]
        x = kept / kept.sum(1, keepdims=True) * 10_000
        for gene, median in zip(
            vocabulary.species_genes(name).genes, vocabulary.species_genes(name).medians, strict=True
        ):
            column = x[:, int(gene[4:])]
            assert median == pytest.approx(np.median(column[column > 0]), rel=0.005)


def test_neither_blocks_nor_the_order_of_work_change_a_byte(world, tmp_path):
    config, _ = world
    expected = bytes_of(made(config, tmp_path, "one"))

    for block in (1, 10):
        other = dataclasses.replace(
            config, prepare=Prepare(shard_cells=10, block_cells=block), output=str(tmp_path / f"b{block}")
        )
        assert bytes_of(prepare.run(other, executor=Through(backwards))) == expected
    # another cut into shards: other files, the same sentences
    other = made(config, tmp_path, "cut", prepare=Prepare(shard_cells=7, block_cells=3))
    assert shards(other).equals(shards(str(tmp_path / "one" / "corpus")))


def test_groups_of_sources_change_no_byte(world, tmp_path, monkeypatch):
    config, _ = world
    ant, *others = config.sources
    config = dataclasses.replace(
        config, sources=(dataclasses.replace(ant, sample="donor"), *others), qc=QC(min_genes=3, max_cells_per_sample=9)
    )
    calls = []
    config = dataclasses.replace(config, output=str(tmp_path / "one"))
    expected = bytes_of(prepare.run(config, executor=dying(10**9, calls)))
    assert calls.count("group_metrics") == 1
    for name, value, number in (("GROUP_CELLS", 40, 1), ("GROUP_CELLS", 20, 0), ("GROUP_SOURCES", 2, 1)):
        monkeypatch.setattr(prepare_passes, name, value)
        calls.clear()
        output = str(tmp_path / f"{name}{value}")
        assert (
            bytes_of(prepare.run(dataclasses.replace(config, output=output), executor=dying(10**9, calls))) == expected
        )
        assert calls.count("group_metrics") == number  # of several sources
        monkeypatch.undo()


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 3])
def test_ray_gives_what_the_loop_gives(world, tmp_path, ray_local, workers):
    config, _ = world
    expected = bytes_of(made(config, tmp_path, "loop"))
    compute = dataclasses.replace(config.compute, num_workers=workers)
    assert bytes_of(prepare.run(dataclasses.replace(config, compute=compute))) == expected


def test_a_killed_run_continues_and_ends_with_the_same_bytes(world, tmp_path):
    config, _ = world
    expected = bytes_of(made(config, tmp_path, "whole"))
    made_calls = []

    total = 0
    for after in (2, 3, 5, 4, 6, 1):  # dies in every pass
        made_calls.clear()
        with pytest.raises(KeyboardInterrupt):
            prepare.run(config, executor=dying(after, made_calls))
        assert artifacts.find(f"{config.output}/corpus") is None
        total += len(made_calls)
    made_calls.clear()
    uri = prepare.run(config, executor=dying(10**9, made_calls))
    # three sources, eight units in three passes, one gene report, one group of metrics, genes of three species, four searches
    # for near duplicates:
    # nothing was made twice
    assert total + len(made_calls) == 3 + 3 * 8 + 1 + 1 + 3 + 4
    assert bytes_of(uri) == expected
    assert not files.exists(f"{uri}/work")
    made_calls.clear()
    assert prepare.run(config, executor=dying(0, made_calls)) == uri  # done: nothing to do
    with pytest.raises(UserError, match=r"holds another .*tokens\.max_len: 20 -> 19"):
        made(config, tmp_path, "run", tokens=Tokens(max_len=19))


def test_a_bad_source_does_not_lose_the_run_unless_strict(world, tmp_path):
    config, _ = world
    bad = anndata.read_h5ad(tmp_path / "bee.h5ad")
    bad.X[17, 4] = 0.5  # in its second unit
    bad.write_h5ad(tmp_path / "bee.h5ad")
    record = artifacts.require(made(config, tmp_path, "run"), "corpus")
    assert [r["name"] for r in record.details["refused"]] == ["bee"]
    assert "count 0.5 of cell c17 (row 17)" in record.details["refused"][0]["error"]
    assert [s["name"] for s in record.details["sources"]] == ["ant", "cow"]
    assert record.counts["read"] == 48
    with pytest.raises(UserError, match=r"count 0\.5 of cell c17"):
        made(config, tmp_path, "strict", prepare=Prepare(shard_cells=10, block_cells=4, strict=True))
    with pytest.raises(UserError, match=r"count 0\.5 of cell c17"):
        made(config, tmp_path, "only", sources=config.sources[1:2])
    assert artifacts.find(str(tmp_path / "only" / "corpus")) is None


def losing(lost, after=1 << 30):
    """An executor in which the second source ends the workers of one function; it dies after so many other tasks."""
    done = []

    def run(tasks):
        for number, task in enumerate(tasks):
            if task.source == 1 and task.function.__name__ == lost:
                yield Receipt(number, error="it ended its worker", lost=True)
                continue
            if len(done) >= after:
                raise KeyboardInterrupt
            done.append(task)
            yield attempt(number, task)

    return Through(run)


@pytest.mark.parametrize("lost", ["describe_source", "measure_cells"])
def test_a_source_that_a_killed_run_left_out_stays_left_out(world, tmp_path, lost):
    config, _ = world
    whole = prepare.run(dataclasses.replace(config, output=str(tmp_path / "whole")), executor=losing(lost))
    known = artifacts.require(whole, "corpus")
    assert [r["name"] for r in known.details["refused"]] == ["bee"]
    # it dies among the metrics, after the gene reports, and among the shards: then the source can be read
    for after in (4, 10, 25):
        again = dataclasses.replace(config, output=str(tmp_path / f"after{after}"))
        with pytest.raises(KeyboardInterrupt):
            prepare.run(again, executor=losing(lost, after))
        uri = prepare.run(again, executor=LocalExecutor())
        record = artifacts.require(uri, "corpus")
        if lost == "measure_cells" and after == 4:  # the first run had not come to its end with the metrics
            assert record.details["refused"] == []
            assert bytes_of(uri) == bytes_of(made(config, tmp_path, "all"))
        else:
            assert (record.details["refused"], record.counts) == (known.details["refused"], known.counts)
            assert bytes_of(uri) == bytes_of(whole)


def test_a_source_that_a_killed_run_used_is_not_left_out(world, tmp_path):
    config, _ = world
    with pytest.raises(KeyboardInterrupt):
        prepare.run(config, executor=losing("", after=14))  # after the gene reports
    files.remove(f"{config.output}/corpus/work/metrics/00004.parquet")  # of the second source
    with pytest.raises(UserError, match=r"bee\.h5ad: it ended its worker"):
        prepare.run(config, executor=losing("measure_cells"))
    assert bytes_of(prepare.run(config, executor=LocalExecutor())) == bytes_of(made(config, tmp_path, "whole"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"species": "bee"}, r"species = 'bee': only 0 of 30 genes are known .*ENSA00000.*wrong species"),
        ({"uri": "no.h5ad"}, r"no\.h5ad: no such file"),
        ({"sample": "batch"}, r"sources\[0\]\.sample = 'batch': no such column of obs; it has cell_type, score, donor"),
        ({"obs": ("kind",)}, r"sources\.obs = 'kind': no such column of obs"),
        ({"layer": "raw"}, r"layer = 'raw': not in the file; it has X"),
    ],
    ids=["species", "missing", "sample", "obs", "layer"],
)
def test_what_a_source_says_wrongly_is_refused(world, tmp_path, change, message):
    config, _ = world
    with pytest.raises(UserError, match=message):
        made(config, tmp_path, "run", sources=(dataclasses.replace(config.sources[0], **change),))


def test_too_few_counts_on_known_genes_refuse_a_source_with_its_commonest_unknown_names(world, tmp_path):
    config, _ = world
    cells = anndata.read_h5ad(tmp_path / "ant.h5ad")
    cells.var_names = [n if i < 10 else f"odd{i}" for i, n in enumerate(cells.var_names)]
    cells.X = cells.X.multiply(np.where(np.arange(NUM_GENES) == 11, 9, 1)).tocsr()
    cells.write_h5ad(tmp_path / "ant.h5ad")
    with pytest.raises(
        UserError, match=r"only \d+\.\d% of the counts are on known ant genes .*commonest unknown: odd11, .*neither"
    ):
        made(config, tmp_path, "run", sources=config.sources[:1])


def test_an_empty_file_and_a_run_without_kept_cells_are_refused(world, tmp_path):
    config, _ = world
    cells = anndata.read_h5ad(tmp_path / "ant.h5ad")
    cells[:0].copy().write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(UserError, match=r"empty\.h5ad: empty \(0 cells x 30 genes\)"):
        made(config, tmp_path, "run", sources=(Source(uri=str(tmp_path / "empty.h5ad"), species="ant"),))
    cells.X = sparse.csr_matrix(cells.shape, dtype=np.float32)
    cells.write_h5ad(tmp_path / "ant.h5ad")
    with pytest.raises(UserError, match=r"none of 37 cells passes \(37 few_genes\)"):
        made(config, tmp_path, "run2", sources=config.sources[:1])


def test_a_given_vocabulary_is_used_unchanged_and_imported_medians_are_kept(world, tmp_path):
    config, _ = world
    first = made(config, tmp_path, "first")
    reuse = Vocab(reuse=str(tmp_path / "first" / "vocabulary"))
    again = made(config, tmp_path, "again", vocab=reuse)
    assert Vocabulary.load(again).hash == Vocabulary.load(first).hash
    assert shards(again).equals(shards(first))
    assert not files.exists(str(tmp_path / "again" / "vocabulary"))
    lines = "".join(f"ENSA{i:05d}\t{1 + i % 3}\n" for i in range(12))
    (tmp_path / "m.tsv").write_text("gene\tmedian\n" + lines)
    imported = dataclasses.replace(config.vocab, medians=str(tmp_path / "m.tsv"))
    uri = made(
        config, tmp_path, "imported", vocab=imported, sources=config.sources[:1], qc=QC(method="none", min_genes=2)
    )
    vocabulary = Vocabulary.load(uri)
    assert vocabulary.species_genes("ant").medians.tolist() == [1.0 + i % 3 for i in range(12)]
    assert vocabulary.species == ("ant",)


def test_many_sketch_parts_are_merged_in_a_tree(world, tmp_path, monkeypatch):
    config, _ = world
    expected = Vocabulary.load(made(config, tmp_path, "flat")).hash
    monkeypatch.setattr(prepare, "MERGE_FAN_IN", 2)
    assert Vocabulary.load(made(config, tmp_path, "tree")).hash == expected


@pytest.mark.parametrize("column_major", [False, True])
def test_a_copy_of_the_counts_spares_two_reads_and_changes_no_byte(world, tmp_path, monkeypatch, column_major):
    """Cells are dropped for every reason that is known only after the source was read."""
    config, _ = world
    if column_major:
        for source in config.sources:
            cells = anndata.read_h5ad(source.uri)
            cells.X = sparse.csc_matrix(cells.X)
            cells.write_h5ad(source.uri)
    sources = tuple(dataclasses.replace(s, sample="cell_type") for s in config.sources)
    found, rows = {}, []
    read_blocks = counts.read_blocks

    def counting(reader, columns, start, stop, **options):
        rows.append(stop - start)
        return read_blocks(reader, columns, start, stop, **options)

    monkeypatch.setattr(counts, "read_blocks", counting)
    for keep_counts in (True, False):
        rows.clear()
        found[keep_counts] = made(
            config, tmp_path, f"kept-{keep_counts}", sources=sources, qc=QC(num_sd=1.2, max_cells_per_sample=6),
            prepare=Prepare(shard_cells=10, block_cells=4, keep_counts=keep_counts),
        )  # fmt: skip
        dropped = artifacts.require(found[keep_counts], "corpus").counts["dropped"]
        assert all(dropped[reason] for reason in ("few_genes", "depth", "mito", "duplicate", "cap"))
        num = 37 + 20 + 11
        if keep_counts and not column_major:
            assert sum(rows) == num
        else:  # three times, but for row ranges without kept cells
            assert 2 * num < sum(rows) <= 3 * num
    assert bytes_of(found[True]) == bytes_of(found[False])


def test_a_copy_that_is_damaged_in_the_middle_changes_no_cell(world, tmp_path, monkeypatch, caplog):
    config, _ = world
    expected = made(config, tmp_path, "whole")
    write_metrics, damaged = prepare_passes.write_metrics, []

    def damaging(parts, plan):
        write_metrics(parts, plan)
        path = Path(prepare_passes._copy_uri(plan.work, plan.row_range))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        good = []
        with pytest.raises(UserError, match="other bytes than were written"):
            good.extend(tables.read_batches(str(path)))
        damaged.append(len(good))

    measuring = dataclasses.replace(prepare_passes.measure_cells, write=damaging)
    monkeypatch.setattr(prepare_passes, "measure_cells", measuring)
    found = made(config, tmp_path, "damaged", prepare=dataclasses.replace(config.prepare, block_cells=3))
    assert max(damaged) > 0  # some batches before the damage are good
    assert "counts are read from the source" in caplog.text
    assert bytes_of(found) == bytes_of(expected)


def test_workers_forget_the_gene_tables_before_they_measure_cells(world, tmp_path):
    config, _ = world
    made(config, tmp_path, "run")
    held = lambda: (identify.gene_lookup.cache_info().currsize, species.gene_table.cache_info().currsize)  # noqa: E731
    assert min(held()) > 0  # a process that works alone keeps them for the next sources
    prepare_passes.measure_cells.release()
    assert held() == (0, 0)


def test_a_kept_copy_holds_the_counts_of_the_source(world, tmp_path):
    config, true = world
    work, source = str(tmp_path / "work"), config.sources[0]
    prepare_passes.describe_source(
        work, 0, source, row=config.species[0], rules=QC(), biotypes=("protein_coding",), allowed=None
    )
    (unit,) = prepare_passes.plan_row_ranges({0: (source, 37)}, 37)
    prepare_passes.measure_cells(prepare_passes.MetricsPlan(work=work, row_range=unit, block_cells=5, keep_counts=True))
    (name,) = files.list_dir(f"{work}/counts-00000")
    rows = [packed_counts.unpack(b, NUM_GENES) for b in tables.read_batches(f"{work}/counts-00000/{name}")]
    held = sparse.vstack([sparse.csr_array(row, shape=(len(row[2]) - 1, NUM_GENES)) for row in rows]).toarray()
    assert (held == true["ant"]).all()


def test_shared_tokens_caps_and_cls_reach_the_corpus(world, tmp_path):
    config, _ = world
    shared = dataclasses.replace(config.vocab, sharing="ortholog")
    sources = tuple(dataclasses.replace(s, sample="cell_type") for s in config.sources)
    uri = made(
        config,
        tmp_path,
        "run",
        vocab=shared,
        sources=sources,
        qc=QC(max_cells_per_sample=4),
        tokens=Tokens(max_len=8, cls=True),
    )
    assert Vocabulary.load(uri).size == 3 + 3 * NUM_GENES - 2 * 5
    table = shards(uri)
    assert {t[0] for t in table["tokens"].to_pylist()} == {2}
    assert max(table["length"].to_pylist()) == 8
    per_sample = table.group_by(["source", "cell_type"]).aggregate([("cell", "count")]).to_pylist()
    assert [r["cell_count"] for r in per_sample if r["source"] != "cow"] == [4] * 4
    assert max(r["cell_count"] for r in per_sample) == 4
    assert artifacts.require(uri, "corpus").counts["dropped"]["cap"] > 0


def test_a_column_major_source_gives_the_bytes_of_a_row_major_one(world, tmp_path, monkeypatch):
    config, _ = world
    expected = bytes_of(made(config, tmp_path, "rows"))
    monkeypatch.setattr(row_major, "CHUNK_ROWS", 4)
    for source in config.sources:
        cells = anndata.read_h5ad(source.uri)
        cells.X = sparse.csc_matrix(cells.X)
        cells.write_h5ad(source.uri)
    uri = made(config, tmp_path, "columns")
    found = bytes_of(uri)
    assert found == expected
    identities = [
        [s["counts_sha256"] for s in artifacts.require(u, "corpus").details["sources"]]
        for u in (str(tmp_path / "rows" / "corpus"), uri)
    ]
    assert identities[0] == identities[1]  # of the counts, whatever the file
    assert len(set(identities[0])) == 3
    assert not files.exists(f"{uri}/work")


def test_units_cover_every_row_once():
    source = Source(uri="a", species="b")
    found = prepare_passes.plan_row_ranges({0: (source, 25), 2: (source, 10), 3: (source, 1)}, 10)
    assert [(u.number, u.index, u.start, u.stop) for u in found] == [
        (0, 0, 0, 10),
        (1, 0, 10, 20),
        (2, 0, 20, 25),
        (3, 2, 0, 10),
        (4, 3, 0, 1),
    ]


def reordered(path):
    """The file's cells from the last to the first, in a file of as many bytes."""
    data = anndata.read_h5ad(path)
    before = path.stat().st_size
    data[::-1].copy().write_h5ad(path)
    with path.open("ab") as file:  # bytes behind the end of HDF5 are not read
        file.write(b"\0" * max(0, before - path.stat().st_size))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("after", range(1, 30, 4))
def test_a_source_that_changes_while_it_is_prepared_is_never_mixed_with_what_it_was(
    world, whole_corpus, tmp_path, after, keep
):
    config, _ = world
    config = dataclasses.replace(
        config, output=str(tmp_path / "run"), prepare=dataclasses.replace(config.prepare, keep_counts=keep)
    )
    calls = []
    with pytest.raises(KeyboardInterrupt):
        prepare.run(config, executor=dying(after, calls))
    path = files.local_path(config.sources[1].uri)
    reordered(path)
    described = calls.count("describe_source") >= 2
    error = ""
    try:
        uri = prepare.run(config, executor=LocalExecutor())
    except UserError as refusal:
        error = str(refusal)
    if error:
        assert "has changed since its cells were first read" in error or "another corpus: config.sources" in error
        return
    refused = [one["uri"] for one in artifacts.require(uri, "corpus").details["refused"]]
    if described and refused != [str(path)]:
        assert shards(uri).equals(shards(whole_corpus)), "all of it was read before"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("after", [4, 9, 18, 24])
def test_a_source_that_is_written_again_with_the_same_content_changes_nothing(small_world, tmp_path, after, keep):
    """Files of every format."""
    config = dataclasses.replace(small_world.config, output=str(tmp_path / "run"))
    config = dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, keep_counts=keep))

    def write_again():
        for path in small_world.folder.rglob("data/**/*"):
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000))

    with pytest.raises(KeyboardInterrupt):
        prepare.run(config, executor=dying(after, []))
    write_again()
    uri = prepare.run(config, executor=LocalExecutor())
    assert s3_world.contents(uri) == small_world.local
    write_again()
    assert prepare.run(config, executor=LocalExecutor()) == uri
    assert s3_world.contents(uri) == small_world.local


def renamed(cells):
    cells.obs_names = [*cells.obs_names[:-1], "another"]


def of_another_type(cells):
    cells.obs["cell_type"] = [*cells.obs["cell_type"].astype(str)[:-1], "another"]


def with_one_count_more(cells):
    cells.X = sparse.csr_matrix(cells.X)
    cells.X.data[-1] += 1


def with_genes_swapped(cells):
    cells.X = cells.X[:, [1, 0, *range(2, cells.n_vars)]]


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("change", [renamed, of_another_type, with_one_count_more, with_genes_swapped])
def test_a_finished_corpus_of_a_source_that_changed_is_not_up_to_date(world, tmp_path, change, column_major):
    config, _ = world
    path = Path(files.local_path(config.sources[0].uri))
    if column_major:
        cells = anndata.read_h5ad(path)
        cells.X = sparse.csc_matrix(cells.X)
        cells.write_h5ad(path)
    content = path.read_bytes() + b"\0" * 4096  # bytes behind the end of HDF5 are not read
    path.write_bytes(content)
    uri = made(config, tmp_path, "run")
    before = bytes_of(uri)
    path.write_bytes(content)  # written again, the same
    assert made(config, tmp_path, "run") == uri
    path.write_bytes(content[:-1] + b"1")  # not what is read
    assert made(config, tmp_path, "run") == uri
    cells = anndata.read_h5ad(path)
    change(cells)
    cells.write_h5ad(path)
    path.write_bytes(path.read_bytes().ljust(len(content), b"\0"))
    assert path.stat().st_size == len(content), "another size is another plan"
    with pytest.raises(UserError, match="has changed since its cells were first read"):
        made(config, tmp_path, "run")
    path.write_bytes(content)
    assert made(config, tmp_path, "run") == uri
    assert bytes_of(uri) == before
    assert not files.exists(f"{uri}/work")
