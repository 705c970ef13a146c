"""From a run's artifacts to one self-contained HTML file, and to the short table that ends a run.

Layout: `report` loads and writes, `sections` and `scorecard` lay out, `findings` works out what may be said, `figures`
draws, `page` names what a page is made of. The file opens anywhere: no request leaves it.
"""

from __future__ import annotations

import hashlib
from importlib import metadata, resources
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from mixgf import (
    across,
    artifacts,
    findings,
    hits,
    lab,
    leaderboard,
    perturbation,
    progress,
    scorecard,
    sections,
    spaces,
    storage,
)
from mixgf.config import Config, fingerprint, to_dict
from mixgf.page import Run, Section

MAX_PAIRS = 2_000_000
"""Pairs of genes in a response matrix that is still read."""
MAX_CELLS = 4000
"""Most cells in the map and its neighbour counts."""
MAX_SHARDS = 64
"""Most shards of embeddings that are read, drawn with a key."""
_KEY = '<meta name="mixgf-inputs" content="'
_PACKAGES = (
    "anndata",
    "jinja2",
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "ray",
    "scikit-learn",
    "scipy",
    "torch",
    "umap-learn",
)


def uris(config: Config) -> dict[str, str]:
    """Where each stage's artifact is, or would be."""
    given = config.inputs
    places = {"corpus": given.corpus, "pretrain": given.checkpoint, "embed": given.embeddings, "classify": given.classification,
              "perturb": given.perturbation, "tune": "", "compare": ""}  # fmt: skip
    return {stage: uri or storage.join(config.output, stage) for stage, uri in places.items()}


def load(config: Config, *, light: bool = False) -> Run:
    """Read what a run left behind; `light` leaves out cells and embeddings, which a large corpus has many of."""
    places = uris(config)
    records = {stage: record for stage, uri in places.items() if (record := artifacts.find(uri)) is not None}
    wanted = {
        "mapping": ("corpus", "mapping.parquet"), "dropped": ("corpus", "dropped.parquet"), "history": ("pretrain", "history.parquet"),
        "scores": ("classify", "scores.parquet"), "efficiency": ("classify", "efficiency.parquet"), "rejection": ("classify", "rejection.parquet"),
        "integration": ("classify", "integration.parquet"), "centroids": ("classify", "centroids.parquet"), "comparisons": ("classify", "comparisons.parquet"), "epochs": ("classify", "epochs.parquet"),
        "per_class": ("classify", "per_class.parquet"),
        "confusion": ("classify", "confusion.parquet"), "genes": ("perturb", "genes.parquet"), "nulls": ("perturb", "calibration.parquet"),
        "arms": ("tune", "arms.parquet"), "effects": ("tune", "effects.parquet"), "interactions": ("tune", "interactions.parquet"),
        "responses": ("perturb", "responses.parquet"),
    }  # fmt: skip
    if not light:
        wanted |= {"predictions": ("classify", "predictions.parquet"), "maps": ("classify", "maps.parquet")}
    tables: dict[str, pd.DataFrame] = {}
    for name, (stage, file) in wanted.items():
        uri = storage.join(places[stage], file)
        if name == "responses" and stage in records and records[stage].counts.get(name, 0) > MAX_PAIRS:
            continue  # the section says so
        if stage in records and storage.exists(uri):
            tables[name] = storage.read_table(uri).to_pandas()
    for file in records["compare"].files if "compare" in records else ():
        stem = file.removesuffix(".parquet")
        if not light and stem != file:
            tables[across.PREFIX + stem] = storage.read_table(storage.join(places["compare"], file)).to_pandas()
    lengths: dict[str, np.ndarray] = {}
    vectors, obs, total = None, None, 0
    if not light and "corpus" in records:
        tables["cells"], lengths = _cells(config, places["corpus"], records["corpus"])
        embedded = records.get("embed")
        if embedded is not None and embedded.parents.get("corpus") == records["corpus"].fingerprint:
            vectors, obs, total = _embeddings(config, places, records["corpus"])
    return Run(
        config=config,
        uris=places,
        records=records,
        tables=tables,
        lengths=lengths,
        vectors_ND=vectors,
        obs=obs,
        num_embedded=total,
    )


def _columns(config: Config, shard: str, extra: tuple[str, ...] = ()) -> pd.DataFrame:
    """Species, source, type, donor (and more) of a shard's cells; a label that means "no label" is empty."""
    with storage.open_read(shard) as file:
        there = set(pq.read_schema(file).names)
    label, donor = config.classify.label, config.classify.donor
    frame = storage.read_table(
        shard, [c for c in dict.fromkeys(("species", "source", label, donor, *extra)) if c in there]
    ).to_pandas()
    types = frame[label].astype(object).fillna("").astype(str) if label in there else pd.Series("", index=frame.index)
    donors = frame[donor].astype(object).fillna("").astype(str) if donor in there else pd.Series("", index=frame.index)
    return frame.assign(type=types.where(~types.isin(config.classify.unlabelled), ""), donor=donors)


def _cells(config: Config, corpus: str, record: artifacts.Record) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Numbers of cells by source, species, type and donor, and of cells by length, over all shards, one at a time."""
    keys = ["source", "species", "type", "donor"]
    counts: list[pd.DataFrame] = []
    lengths: dict[str, np.ndarray] = {}
    for shard in record.details["shards"]:
        frame = _columns(config, storage.join(corpus, "shards", shard["name"]), ("length",))
        counts.append(frame.groupby(keys, observed=True).size().rename("cells").reset_index())
        for species, part in frame.groupby("species", observed=True):
            more = np.bincount(part["length"].to_numpy())
            old = lengths.get(str(species), np.zeros(0, np.int64))
            size = max(len(more), len(old))
            lengths[str(species)] = np.pad(old, (0, size - len(old))) + np.pad(more, (0, size - len(more)))
    if not counts:
        return pd.DataFrame(columns=[*keys, "cells"]), lengths
    return pd.concat(counts).groupby(keys)["cells"].sum().reset_index(), dict(sorted(lengths.items()))


def _embeddings(
    config: Config, places: dict[str, str], record: artifacts.Record
) -> tuple[np.ndarray, pd.DataFrame, int]:
    """Vectors, and species and type, of a sample of the embedded cells that depends on the seed only."""
    shards = record.details["shards"]
    rng = np.random.default_rng([config.seed, 0x4D4150])
    chosen = sorted(rng.choice(len(shards), min(len(shards), MAX_SHARDS), replace=False).tolist())
    sizes = [int(shards[i]["rows"]) for i in chosen]
    picked = np.sort(rng.choice(sum(sizes), min(sum(sizes), MAX_CELLS), replace=False))
    vectors, frames, start = [], [], 0
    for i, size in zip(chosen, sizes, strict=True):
        rows = picked[(picked >= start) & (picked < start + size)] - start
        start += size
        name = shards[i]["name"]
        column = storage.read_table(storage.join(places["embed"], "shards", name), ["vector"])[
            "vector"
        ].combine_chunks()
        vectors.append(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)[rows])
        frames.append(_columns(config, storage.join(places["corpus"], "shards", name)).iloc[rows][["species", "type"]])
    return np.concatenate(vectors), pd.concat(frames, ignore_index=True), sum(int(s["rows"]) for s in shards)


def write(config: Config, uri: str) -> str:
    """Write the report of a run as one HTML file at `uri`; does nothing when it is there, made of the same inputs.

    Returns:
        `uri`.
    """
    key = _key(config)
    if storage.exists(uri) and f"{_KEY}{key}" in storage.read_bytes(uri)[:4096].decode(errors="ignore"):
        progress.say(f"report: {uri} is up to date")
        return uri
    storage.write_bytes(uri, render(load(config), key).encode())
    return uri


def _key(config: Config) -> str:
    """Changes when the config, an artifact, a library or the report's own code changes."""
    code = hashlib.sha256()
    for name in (
        "report.py",
        "page.py",
        "sections.py",
        "scorecard.py",
        "leaderboard.py",
        "spaces.py",
        "across.py",
        "paper.py",
        "findings.py",
        "hits.py",
        "known.py",
        "perturbation.py",
        "ablation.py",
        "lab.py",
        "sweep_figures.py",
        "responses.py",
        "screen_figures.py",
        "figures.py",
        "layouts.py",
        "resources/report.html.j2",
    ):
        code.update((resources.files("mixgf") / name).read_bytes())
    found = {stage: record for stage, uri in uris(config).items() if (record := artifacts.find(uri)) is not None}
    return fingerprint({"config": to_dict(config), "code": code.hexdigest(), "versions": _versions(),
                        "inputs": {stage: [r.fingerprint, r.created] for stage, r in found.items()}})  # fmt: skip


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}


def all_sections(run: Run) -> list[Section]:
    """The report's sections in reading order."""
    made = [scorecard.brief(run), sections.corpus(run), sections.training(run), sections.embedding(run), leaderboard.section(run), spaces.section(run),
            scorecard.classification(run), across.section(run), perturbation.section(run), lab.section(run), sections.provenance(run, _versions())]  # fmt: skip
    return [section for section in made if section.blocks]


def render(run: Run, key: str) -> str:
    """The page as HTML text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mixgf", "resources"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page: dict[str, Any] = {"sections": all_sections(run), "tiles": scorecard.tiles(run), "run": run, "key": key}
    return environment.get_template("report.html.j2").render(page)


# the table at the end of a run


def summary_rows(run: Run) -> list[tuple[str, ...]]:
    """One row per task and model of ours: task, model, accuracy, macro F1, best baseline, its scores, verdict."""
    scores = run.tables.get("scores")
    if scores is None or scores.empty:
        return []
    found = findings.duels(findings.board(scores), run.tables.get("comparisons"))
    rows: list[tuple[str, ...]] = []
    for key in dict.fromkeys((d.split, d.group, d.direction, d.model) for d in sorted(found, key=_order)):
        pair = {d.metric: d for d in found if (d.split, d.group, d.direction, d.model) == key}
        if len(pair) < 2:
            continue
        duel, accuracy = pair["macro_f1"], pair["accuracy"]
        verdict = {
            "ahead": "better",
            "behind": "WORSE",
            "level": "lower, within error" if duel.lower else "higher, within error",
        }[duel.verdict]
        rows.append((
            f"{findings.SPLIT_NAMES.get(duel.split, duel.split)}: {findings.task_label(*key[:3])}", findings.label(duel.model),
            findings.share(accuracy.score[0]), findings.share(duel.score[0]), findings.label(duel.baseline),
            findings.share(accuracy.baseline_score[0]), findings.share(duel.baseline_score[0]), verdict,
        ))  # fmt: skip
    return rows


def _order(duel: findings.Duel) -> tuple[int, str, str, int]:
    splits = list(findings.SPLITS)
    return (
        splits.index(duel.split) if duel.split in splits else len(splits),
        duel.group,
        duel.direction,
        findings.OWN.index(duel.model),
    )


def summary(config: Config) -> str:
    """The end of a run as text: what was reached, the best baseline beside it, the top genes."""
    run = load(config, light=True)
    lines = []
    if "corpus" in run.records:
        counts = run.records["corpus"].counts
        lines.append(f"cells      {counts.get('kept', 0):,} kept of {counts.get('read', 0):,}")
    if (history := run.tables.get("history")) is not None and len(history):
        ends = {name: sections.loss_ends(history, name) for name in sections.LOSSES if name in set(history["name"])}
        said = [
            f"{findings.lower(sections.CURVES[name])} {first:.3f} -> {last:.3f}" for name, (first, last) in ends.items()
        ]
        lines.append(f"training   {'; '.join(said)}")
    if "classify" in run.records and (seen := run.records["classify"].details.get("audit")):
        lines.append(f"audit      {seen['line']}")
    if rows := summary_rows(run):
        head = (
            "task",
            "model",
            "accuracy",
            "macro F1",
            "best baseline",
            "accuracy",
            "macro F1",
            "by macro F1 the model is",
        )
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines += [
            "",
            *("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)),
            "",
        ]
    if (genes := run.tables.get("genes")) is not None and len(genes):
        for operation, part in genes.groupby("operation", sort=False):
            top = " ".join(part.sort_values(["shift", "gene"], ascending=[False, True]).head(8)["symbol"])
            lines.append(
                f"{operation:<10} {top}  ({len(hits.hits(part))} of {len(part):,} genes are hits: a donor-level FDR of 5 %, and unusual for their rank)"
            )
        if left := run.records["perturb"].counts.get("not_scored", 0):
            lines.append(f"{'':<10} not complete: the budget was spent before {left:,} genes were scored")
    return "\n".join(lines) if lines else "nothing was made yet"
