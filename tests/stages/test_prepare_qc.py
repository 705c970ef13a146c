"""Quality control from count files to the corpus: mitochondrial genes by species, and doublets by sample."""

import dataclasses
import sys

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from mixgf.config.data import QC, Prepare, Source, SpeciesRow, Tokens, Vocab
from mixgf.config.run import Config, Tracking
from mixgf.corpus import near_hashes, prepare_passes
from mixgf.corpus.summary import summarise_corpus
from mixgf.execution import LocalExecutor
from mixgf.report import corpus_text
from mixgf.stages import prepare
from mixgf.storage import artifacts, files, tables

NUM_GENES = 400


def species(folder, name, prefix, mito):
    genes = [f"{prefix}{i:05d}" for i in range(NUM_GENES)]
    table = {
        "gene": genes,
        "symbol": [f"{name}-{i}x" for i in range(NUM_GENES)],
        "biotype": ["protein_coding"] * NUM_GENES,
    }
    pq.write_table(pa.table(table | {"is_mito": [i in mito for i in range(NUM_GENES)]}), folder / f"{name}.parquet")
    return SpeciesRow(name=name, taxon=1, gene_prefix=prefix, genes=str(folder / f"{name}.parquet"))


def source(folder, name, prefix, counts, **obs):
    frame = pd.DataFrame(obs, index=[f"c{i}" for i in range(len(counts))])
    var = pd.DataFrame(index=[f"{prefix}{i:05d}" for i in range(NUM_GENES)])
    cells = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=frame, var=var)
    cells.write_h5ad(folder / f"{name}.h5ad")
    return Source(uri=str(folder / f"{name}.h5ad"), species=name, sample="lane" if "lane" in obs else "")


def config(folder, rows, sources, **changes):
    pq.write_table(pa.table({row.name: pa.array([], pa.string()) for row in rows}), folder / "pairs.parquet")
    return Config(
        output=str(folder / "run"), species=rows, sources=sources, vocab=Vocab(orthologs=(str(folder / "pairs.parquet"),)),
        tokens=Tokens(max_len=50), prepare=Prepare(shard_cells=70, block_cells=32), tracking=Tracking(uri="off"), **changes,
    )  # fmt: skip


def read(uri):
    record = artifacts.require(uri, "corpus")
    return pa.concat_tables([tables.read_table(f"{uri}/shards/{s['name']}") for s in record.details["shards"]])


# Mitochondrial genes


def test_cells_beyond_three_sd_of_their_source_by_the_mitochondrial_genes_of_their_species_are_dropped_and_counted(
    tmp_path,
):
    rng = np.random.default_rng(0)
    rows = (species(tmp_path, "ant", "ENSA", {0}), species(tmp_path, "bee", "ENSB", {1}))
    found = []
    for row in rows:
        counts = rng.poisson(3, (60, NUM_GENES))
        counts[:, :2] = 20  # gene 0 is mitochondrial in ants, gene 1 in bees
        counts[7, 0], counts[9, 1] = 200, 200
        counts[:, 2] += 5_000 - counts.sum(1)  # all cells have the same depth
        found.append(source(tmp_path, row.name, row.gene_prefix, counts))
    uri = prepare.run(config(tmp_path, rows, tuple(found), qc=QC(doublets="off")), executor=LocalExecutor())
    kept = read(uri)
    missing = {
        name: set(range(60)) - set(kept.filter(pa.compute.equal(kept["species"], name))["source_row"].to_pylist())
        for name in ("ant", "bee")
    }
    assert missing == {"ant": {7}, "bee": {9}}
    assert artifacts.require(uri, "corpus").counts["dropped"] == {
        "few_genes": 0, "depth": 0, "mito": 2, "doublet": 0, "duplicate": 0, "cap": 0,
    }  # fmt: skip
    dropped = tables.read_table(f"{uri}/dropped.parquet").to_pylist()
    assert [(d["source"], d["cells"]) for d in dropped if d["reason"] == "mito"] == [("ant", 1), ("bee", 1)]
    assert {s["source"]: s["dropped"]["mito"] for s in summarise_corpus(uri)["sources"]} == {"ant": 1, "bee": 1}
    assert set(kept["mito_fraction"].to_pylist()) == {20 / 5_000}


# Doublets


@pytest.fixture(scope="module")
def lanes(tmp_path_factory):
    """Two lanes of four cell types, in turns in one file, whose last cells are doublets, and a small lane of 30 cells."""
    pytest.importorskip("skimage", reason="scanpy's Scrublet needs scikit-image")
    folder = tmp_path_factory.mktemp("lanes")
    rng = np.random.default_rng(0)
    programs = rng.lognormal(0, 1.5, (4, NUM_GENES))
    programs /= programs.sum(1, keepdims=True)
    singlets = rng.poisson(programs[np.arange(560) % 4] * 2_000)
    doublets = singlets[:40] + singlets[41:81]  # of different types
    few = rng.poisson(programs[np.arange(30) % 4] * 2_000)
    lane = [("one", "two")[i // 4 % 2] for i in range(600)] + ["small"] * 30
    rows = (species(folder, "ant", "ENSA", {0}),)
    mine = source(
        folder, "ant", "ENSA", np.vstack([singlets, doublets, few]), lane=lane, doublet_score=["theirs"] * 630
    )
    return config(folder, rows, (mine,))


def made(lanes, name, **rules):
    of = dataclasses.replace(lanes, output=f"{lanes.output}-{name}", qc=QC(method="none", **rules))
    return prepare.run(of, executor=LocalExecutor())


def test_flags_change_no_kept_cell_and_a_drop_takes_just_the_flagged_ones_by_sample(lanes):
    off, flag, drop = (read(made(lanes, how, doublets=how)) for how in ("off", "flag", "drop"))
    assert off["doublet_score"].to_pylist() == ["theirs"] * 630  # not looked for: the file's own column
    assert "predicted_doublet" not in off.column_names
    assert flag.drop_columns(["doublet_score", "predicted_doublet"]).equals(off.drop_columns(["doublet_score"]))
    for name in ("index.parquet", "hashes.parquet"):
        assert len({files.sha256(f"{lanes.output}-{how}/corpus/{name}") for how in ("off", "flag")}) == 1
    cells = flag.select(["source_row", "lane", "doublet_score", "predicted_doublet"]).to_pandas()
    small = cells["lane"] == "small"
    assert cells.loc[small, "doublet_score"].isna().all()
    assert not cells.loc[small, "predicted_doublet"].any()
    assert cells.loc[~small, "doublet_score"].notna().all()
    called = set(cells.loc[cells["predicted_doublet"], "source_row"])
    real = set(range(560, 600))
    assert len(called & real) > 20
    assert len(called - real) < len(called) / 4
    assert set(cells["source_row"]) - set(drop["source_row"].to_pylist()) == called
    by_lane = cells[cells["predicted_doublet"]].groupby("lane").size()
    for how, kept in (("flag", 1), ("drop", 0)):
        uri = f"{lanes.output}-{how}/corpus"
        assert tables.read_table(f"{uri}/doublets.parquet").to_pylist() == [
            {"source": "ant", "sample": name, "cells": cells_, "scored": scored, "doublets": by_lane.get(name, 0),
             "kept": kept * by_lane.get(name, 0)}
            for name, cells_, scored in (("one", 300, 300), ("small", 30, 0), ("two", 300, 300))
        ]  # fmt: skip
        assert artifacts.require(uri, "corpus").counts["dropped"]["doublet"] == (1 - kept) * len(called)
        found = summarise_corpus(uri)["doublets"]
        assert found == {"ant": {"scored": 600, "doublets": len(called), "kept": kept * len(called)}}
    assert summarise_corpus(f"{lanes.output}-off/corpus")["doublets"] is None


def test_each_sample_is_scored_alone_with_the_expected_rate(lanes, monkeypatch):
    seen = []

    def scored(data, indices, indptr, num_columns, *, rate, seed):
        num = len(indptr) - 1
        seen.append((num, int(data.sum()), rate, seed))
        return np.linspace(0, 1, num), np.arange(num) == 4

    monkeypatch.setattr(prepare_passes, "scrublet", scored)
    uri = made(lanes, "rate", doublets="drop", doublet_rate=0.11)
    counts = anndata.read_h5ad(lanes.sources[0].uri)
    sums = [int(counts.X[(counts.obs["lane"] == name).to_numpy()].sum()) for name in ("one", "two")]
    assert seen == [(300, total, 0.11, lanes.seed) for total in sums]
    assert set(range(630)) - set(read(uri)["source_row"].to_pylist()) == {8, 12}  # the fifth cell of each lane


def test_without_scrublet_flags_are_left_out_in_one_line(lanes, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with caplog.at_level("INFO"):
        uri = made(lanes, "none")
    assert sum("Scrublet is not installed" in line for line in caplog.messages) == 1
    assert "predicted_doublet" not in read(uri).column_names
    monkeypatch.undo()
    assert made(lanes, "none", doublets="off") == uri  # the same corpus


# Cells that another file has with other genes


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """Three files of one study: 80 cells; 60 of them again without the genes that few cells have; 40 new cells and 10 of the second file."""
    folder = tmp_path_factory.mktemp("near")
    rng = np.random.default_rng(0)
    rate = rng.lognormal(0, 1.5, NUM_GENES)
    counts = rng.poisson(rate * rng.lognormal(0, 0.4, (120, NUM_GENES)))
    less = counts.copy()
    less[:, np.argsort(rate)[:150]] = 0
    rows = (species(folder, "ant", "ENSA", {0}),)
    files_ = {"whole": counts[:80], "filtered": less[20:80], "more": np.vstack([counts[80:], less[20:30]])}
    made = []
    for name, mine in files_.items():
        one = source(folder, "ant", "ENSA", mine)
        (folder / "ant.h5ad").rename(folder / f"{name}.h5ad")
        made.append(dataclasses.replace(one, uri=str(folder / f"{name}.h5ad"), name=name))
    return config(folder, rows, tuple(made))


def near(filtered, name, **rules):
    of = dataclasses.replace(
        filtered, output=f"{filtered.output}-{name}", qc=QC(method="none", doublets="off", **rules)
    )
    return prepare.run(of, executor=LocalExecutor())


def test_cells_of_another_file_with_other_genes_are_listed_or_dropped(filtered):
    flag, drop, off = (near(filtered, how, near_duplicates=how) for how in ("flag", "drop", "off"))
    same = [("filtered", i, "whole", 20 + i, True) for i in range(60)]
    found = [tuple(row.values()) for row in tables.read_table(f"{flag}/near_duplicates.parquet").to_pylist()]
    assert found == same  # the ten of the third file are exact copies
    counts = {
        how: artifacts.require(uri, "corpus").counts for how, uri in (("flag", flag), ("drop", drop), ("off", off))
    }
    assert [counts[how]["kept"] for how in ("flag", "drop", "off")] == [180, 120, 180]
    assert [counts[how]["dropped"]["duplicate"] for how in ("flag", "drop", "off")] == [10, 70, 10]
    assert [tuple(row.values()) for row in tables.read_table(f"{drop}/near_duplicates.parquet").to_pylist()] == [
        (*row[:-1], False) for row in same
    ]
    assert not files.exists(f"{off}/near_duplicates.parquet")
    assert not files.exists(f"{off}/near_hashes")
    assert "near_duplicates" not in artifacts.require(off, "corpus").config["qc"]  # as before there was this setting
    pair = {"source": "filtered", "same_source": "whole", "cells": 60}
    told = [summarise_corpus(uri) for uri in (flag, drop, off)]
    assert [one["near_duplicates"] for one in told] == [[pair | {"kept": 60}], [pair | {"kept": 0}], []]
    assert "60 of filtered equal cells of whole but for a gene filter; 60 are kept" in corpus_text.text(told[0])
    shards = [s["sha256"] for s in artifacts.require(flag, "corpus").details["shards"]]
    assert shards == [s["sha256"] for s in artifacts.require(off, "corpus").details["shards"]]
    for uri, number in ((flag, 180), (drop, 120)):
        assert sum(len(block) for block in near_hashes.blocks(uri, None)) == number


def test_without_a_search_for_equal_cells_the_third_file_equals_the_second(filtered):
    uri = near(filtered, "all", drop_duplicates=False)
    found = [tuple(row.values()) for row in tables.read_table(f"{uri}/near_duplicates.parquet").to_pylist()]
    third = {row[1]: row[2:4] for row in found if row[0] == "more"}
    assert set(third) == set(range(40, 50))
    assert all(row in (("filtered", k - 40), ("whole", k - 20)) for k, row in third.items())


def test_an_extended_corpus_lists_the_cells_of_the_older_one(filtered):
    together = near(filtered, "flag")
    first = dataclasses.replace(
        filtered, output=f"{filtered.output}-first", sources=filtered.sources[:1], qc=QC(method="none", doublets="off"),
        vocab=Vocab(reuse=f"{filtered.output}-flag/vocabulary", orthologs=filtered.vocab.orthologs),
    )  # fmt: skip
    older = prepare.run(first, executor=LocalExecutor())
    more = dataclasses.replace(
        first, output=f"{filtered.output}-more", sources=filtered.sources[1:],
        prepare=dataclasses.replace(filtered.prepare, extend=older),
    )  # fmt: skip
    uri = prepare.run(more, executor=LocalExecutor())
    assert tables.read_table(f"{uri}/near_duplicates.parquet").equals(
        tables.read_table(f"{together}/near_duplicates.parquet")
    )
    signatures = [np.concatenate(list(near_hashes.blocks(of, None))) for of in (uri, together)]
    np.testing.assert_array_equal(*signatures)
