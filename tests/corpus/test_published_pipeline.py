"""Parity with the published family: with its medians, our sentences are those of its formula, ties and last bits aside.

The reference below is written from the formula (paper section 3.2: count / depth * 10,000 / median, sorted descending),
densely, cell by cell, with numpy's unstable argsort, and reads the file with anndata. Ours goes the way of `prepare`.
"""

import csv
import gzip
import os
import re
import sys
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest

from mixgf.config import data
from mixgf.corpus import prepare_passes, shards
from mixgf.genes import identify
from mixgf.genes.species import gene_table
from mixgf.genes.vocabulary import NUM_SPECIALS, build_vocabulary, read_median_table
from mixgf.storage import files

SHARED = Path(os.environ.get("MIXGF_SHARED") or Path(__file__).parents[3] / "shared")
TABLE = SHARED / "data/tables/geneformer/geneformer_v1_30M_tokens_medians.tsv.gz"
MAX_LEN = 2048

pytestmark = pytest.mark.skipif(
    not TABLE.exists(), reason=f"the published medians are not on this machine (MIXGF_SHARED, or {SHARED.name} beside the checkout)"
)  # fmt: skip


@pytest.fixture(scope="module")
def published():
    """Gene to (token, median) of the published table."""
    with gzip.open(TABLE, "rt") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {r["key"]: (int(r["token"]), float(r["median"])) for r in rows if r["median"]}


@pytest.fixture(scope="module")
def vocabulary():
    table = gene_table(data.HUMAN)
    medians = read_median_table(str(TABLE), (data.HUMAN,), {"human": set(table["gene"].to_pylist())})
    return build_vocabulary(medians, {"human": table}, sharing="separate", orthologs={})


def test_the_published_table_is_imported_gene_by_gene(published, vocabulary):
    ours = vocabulary.species_genes("human")
    found = dict(zip(ours.genes, ours.medians.tolist(), strict=True))
    # 19 ids like ENSGR0000002586 name copies on Y of genes that the table has from X as well; Ensembl gave that form up
    retired = {g for g in published if re.fullmatch(r"ENSGR\d+", g)}
    assert len(retired) == 19
    assert found == {g: m for g, (_, m) in published.items() if g not in retired}
    # published ids follow <pad> 0 and <mask> 1 in the order of Ensembl ids; ours follow one special token more
    shift = {int(t) - published[g][0] for g, t in zip(ours.genes, ours.tokens, strict=True)}
    assert shift == {NUM_SPECIALS - 2}
    genes = vocabulary.genes()
    assert all(genes[token + 1] == g for g, (token, _) in published.items() if g not in retired)


def sentences(path, vocabulary, tmp_path):
    """Genes of every cell's sentence by the functions of prepare: describe, measure, encode, a Parquet shard."""
    source, work = data.Source(uri=path, species="human", name="cells", genes="ensembl_id"), str(tmp_path / "work")
    vocabulary.save(str(tmp_path / "vocabulary.parquet"))
    allowed = {"human": vocabulary.species_genes("human").genes.tolist()}
    prepare_passes.describe_source(work, 0, source, row=data.HUMAN, rules=data.QC(), biotypes=(), allowed=allowed)
    rows = files.read_json(shards.facts_uri(work, 0))["rows"]
    (unit,) = prepare_passes.plan_row_ranges({0: (source, rows)}, rows)
    prepare_passes.measure_cells(
        prepare_passes.MetricsPlan(work=work, row_range=unit, block_cells=500, keep_counts=False)
    )
    plan = prepare_passes.ShardPlan(
        work=work, row_range=unit, keep_N=np.ones(rows, dtype=bool), shard=0, to=str(tmp_path),
        vocabulary=str(tmp_path / "vocabulary.parquet"), digest=vocabulary.hash, tokens=data.Tokens(max_len=MAX_LEN), obs={},
        block_cells=500,
    )  # fmt: skip
    prepare_passes.encode_shard(plan)
    genes = np.asarray(vocabulary.genes(), dtype=object)
    return [genes[t] for t in pq.read_table(tmp_path / "00000.parquet")["tokens"].to_pylist()]


def ensembl_ids(cells, published):
    """Ensembl id of every column; the few columns that carry a symbol instead are read as prepare reads them."""
    names = cells.var["ensembl_id"].astype(str).to_numpy(dtype=object)
    others = np.flatnonzero([not re.fullmatch(r"ENSG\d+", n) for n in names])
    texts = [names[i] or cells.var_names[i] for i in others]
    known = identify.gene_lookup(data.HUMAN)
    names[others] = identify.identify_columns(texts, known, biotypes=(), vocabulary=frozenset(published))[
        "gene"
    ].to_pylist()
    return names


@pytest.mark.parametrize("name", ["bundled pancreas_human_baron", "pbmc_human_pbmc3k"])
def test_sentences_are_those_of_the_published_formula(name, published, vocabulary, tmp_path, capsys):
    bundled = files.local_path("resource:pancreas_human_baron.h5ad")
    path = bundled if name.startswith("bundled") else SHARED / "data/h5ad" / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"{path.name} is not on this machine")
    ours = sentences(str(path), vocabulary, tmp_path)
    cells = anndata.read_h5ad(path)
    counts_NG = cells.X.tocsr().astype(np.float64)
    names = ensembl_ids(cells, published)
    genes = np.asarray(sorted({n for n in names if n} & published.keys()), dtype=object)
    columns = {gene: i for i, gene in enumerate(genes)}
    known = np.flatnonzero([n in columns for n in names])
    gene_of_known = np.asarray([columns[n] for n in names[known]])
    median_G = np.asarray([published[g][1] for g in genes])
    assert len(ours) == cells.n_obs
    assert len(known) > 10_000
    positions = other = ties = near = equal = 0
    gap = 0.0
    for row, found in enumerate(ours):
        cell_G = counts_NG[row].toarray()[0]
        count_G = np.zeros(len(genes))
        np.add.at(count_G, gene_of_known, cell_G[known])  # columns of one gene are summed
        x_G = count_G / cell_G.sum() * 10_000 / median_G
        (there,) = np.nonzero(count_G)
        order = there[np.argsort(-x_G[there])][:MAX_LEN]
        theirs = genes[order]
        assert len(found) == len(theirs) == len(set(found))
        a, b = x_G[[columns[g] for g in found]], x_G[order]
        differ = found != theirs
        positions, other = positions + len(found), other + int(differ.sum())
        equal += int((np.diff(b) == 0).sum())
        ties += int((differ & (a == b)).sum())
        ulps = np.abs(a - b) / np.spacing(np.maximum(a, b))
        gap = max(gap, float(ulps.max(initial=0)))
        near += int((differ & (a != b) & (ulps <= 1)).sum())
    with capsys.disabled():
        sys.stdout.write(
            f"\n{name}: {len(ours):,} cells, {positions:,} positions with {equal:,} equal neighbours, "
            f"{other:,} differ: {ties:,} exact ties, {near:,} one ulp apart, largest gap {gap} ulp\n"
        )
    assert other == ties + near
    assert positions > 1_000_000
