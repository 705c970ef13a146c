"""Detection of doublets, compared with labels that do not come from expression: `bench.py doublets`.

Labels: genotypes (scmixology: CEL-seq2 of five cell lines) and hashtags (hashing: four cell lines, 2,000 genes; eccite:
blood). The steps are those of `prepare`: cells are measured and filtered, then Scrublet runs on the kept cells of each sample.
Baseline: the total count of a cell. For the precision of the verdicts it is the share of doublets, which random calls reach.

Inputs: labelled cells in MIXGF_SHARED/data/h5ad/. Means over three seeds.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
from measure import Figure
from scipy import sparse

from mixgf.cells import doublets, qc
from mixgf.config.data import HUMAN, QC, Source, Vocab
from mixgf.corpus import prepare_passes, shards
from mixgf.errors import UserError
from mixgf.storage import files, tables

SETS = {"scmixology": ("cellline_human_scmixology", "batch"), "hashing": ("cellline_human_hashing", ""),
        "eccite": ("pbmc_human_eccite_hto", "")}  # fmt: skip
"""Name to file, and to the column of its samples."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Kept cells of one file."""

    truth_N: np.ndarray
    depth_N: np.ndarray
    sample_N: np.ndarray
    score_N: np.ndarray
    verdict_N: np.ndarray


def folder() -> Path:
    """Where the labelled files lie."""
    chosen = Path(os.environ.get("MIXGF_SHARED") or Path(__file__).parents[2] / "shared") / "data" / "h5ad"
    if not chosen.is_dir():
        msg = f"{chosen}: no such folder; name the folder that has data/h5ad by the environment variable MIXGF_SHARED"
        raise UserError(msg)
    return chosen


def score(path: Path, sample: str, *, rules: QC, seed: int) -> Scored:
    """Score one file as prepare does, `sample` being the obs column of its samples ("" = the file is one)."""
    source = Source(uri=str(path), species="human", name=path.stem, sample=sample)
    with tempfile.TemporaryDirectory() as work:
        prepare_passes.describe_source(work, 0, source, row=HUMAN, rules=rules, biotypes=Vocab().biotypes, allowed=None)
        rows = int(files.read_json(shards.facts_uri(work, 0))["rows"])
        (row_range,) = prepare_passes.plan_row_ranges({0: (source, rows)}, rows)
        prepare_passes.measure_cells(
            prepare_passes.MetricsPlan(work=work, row_range=row_range, block_cells=2_048, keep_counts=False)
        )
        metrics, samples = prepare_passes.read_metrics(work, [0])
        kept = np.flatnonzero(qc.filter_cells(metrics, rules) == qc.KEPT)
        sample_N = np.full(len(kept), "", dtype=object)
        score_N, verdict_N = np.zeros(len(kept)), np.zeros(len(kept), dtype=bool)
        named = [("", kept)] if samples is None else samples.split(kept)
        for name, mine_R in named:
            sample_N[np.searchsorted(kept, mine_R)] = name
        for k, calls in enumerate(doublets.plan_calls([rows for _, rows in named])):
            part = f"00000-{k:05d}"
            prepare_passes.find_doublets(
                work, part, source, 0, calls, block_cells=2_048, rate=rules.doublet_rate, seed=seed
            )
            table = tables.read_table(shards.part_uri(work, "doublets", part))
            mine = np.searchsorted(kept, table["row"].to_numpy())
            score_N[mine], verdict_N[mine] = table["score"].to_numpy(), table["doublet"].to_numpy()
    truth = anndata.read_h5ad(path, backed="r").obs["is_doublet"].astype(str).isin(["True", "1"]).to_numpy()
    return Scored(truth[kept], metrics.n_counts[kept], sample_N, score_N, verdict_N)


def _figures(name: str, runs: list[Scored], mine: np.ndarray) -> Iterator[Figure]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth, depth = runs[0].truth_N[mine], runs[0].depth_N[mine]
    label = f"{name}, {len(truth):,} cells, {truth.mean():.1%} doublets"
    for what, unit, metric in (
        ("AUROC", "area", roc_auc_score),
        ("average precision", "area", average_precision_score),
    ):
        value = float(np.mean([metric(truth, r.score_N[mine]) for r in runs]))
        plain = float(metric(truth, depth))
        yield Figure(figure=f"{label}: {what}", value=value, unit=unit, baseline=plain, ratio=value / plain)
    called = float(np.mean([r.verdict_N[mine].sum() for r in runs]))
    right = float(np.mean([(r.verdict_N & r.truth_N)[mine].sum() for r in runs]))
    rate = float(truth.mean())
    if called:
        precision = right / called
        yield Figure(
            figure=f"{label}: precision of verdicts",
            value=precision,
            unit="share",
            baseline=rate,
            ratio=precision / rate,
        )
    yield Figure(figure=f"{label}: recall of verdicts", value=right / max(int(truth.sum()), 1), unit="share")


def _cost(num_cells: int) -> tuple[float, float]:
    """CPU seconds of one call of Scrublet on so many bundled cells, thinned anew at every repetition, and peak memory in GB."""
    cells = anndata.read_h5ad(files.local_path("resource:pancreas_human_baron.h5ad"))
    counts = sparse.vstack([sparse.csr_matrix(cells.X.astype(np.float32))] * -(-num_cells // cells.n_obs)).tocsr()[
        :num_cells
    ]
    counts.data = np.random.default_rng(0).binomial(counts.data.astype(np.int64), 0.85).astype(np.int32)
    counts.eliminate_zeros()
    start = time.process_time()
    doublets.scrublet(
        counts.data, counts.indices, counts.indptr.astype(np.int64), counts.shape[1], rate=QC().doublet_rate, seed=0
    )
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def cost(*, quick: bool) -> Iterator[Figure]:
    """CPU and memory of calls of Scrublet, each in a process of its own; imports and compilation are counted."""
    for num_cells in (200,) if quick else (1_000, 2_000, doublets.CALL_CELLS, 2 * doublets.CALL_CELLS):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cpu, memory = pool.apply(_cost, (num_cells,))
        name = f"one call of {num_cells:,} cells"
        yield Figure(figure=f"{name}: CPU per cell", value=1_000 * cpu / num_cells, unit="ms")
        yield Figure(figure=f"{name}: peak memory of the process", value=memory, unit="GB")


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """All figures: the cost of a call; every file with its samples as prepare treats them, each sample alone, and as one sample."""
    yield from cost(quick=quick)
    where = folder()
    for name, (file, sample) in SETS.items():
        path = where / f"{file}.h5ad"
        if not path.exists():
            msg = f"{path}: no such file; the folder that MIXGF_SHARED names must hold data/h5ad/{path.name}"
            raise UserError(msg)
        seeds = (0,) if quick else (0, 1, 2)
        runs = [score(path, sample, rules=QC(), seed=seed) for seed in seeds]
        everything = np.ones(len(runs[0].truth_N), dtype=bool)
        yield from _figures(f"{name}, by {sample}" if sample else name, runs, everything)
        for one in sorted(set(runs[0].sample_N.tolist())) if sample else ():
            yield from _figures(f"{name} {one}", runs, runs[0].sample_N == one)
        if sample:
            yield from _figures(
                f"{name}, as one sample", [score(path, "", rules=QC(), seed=s) for s in seeds], everything
            )
