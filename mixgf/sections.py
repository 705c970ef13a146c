"""Sections of the report on cells, training, embedding and provenance: from the loaded tables of a run to blocks.

A section whose stage has not run says so and names the command. What the words claim is worked out in `findings`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from mixgf import checkpoint, figures, findings, layouts
from mixgf.artifacts import Record
from mixgf.config import to_dict
from mixgf.page import Cell, Fold, Grid, Picture, Run, Section, Text, count, missing, plural, title_case

# corpus


REASONS = {
    "few_genes": "too few genes", "depth": "depth out of range", "mito": "mitochondrial share out of range", "doublet": "doublets",
    "duplicate": "duplicates of other cells", "cap": "over the cap per sample",
}  # fmt: skip


def reason(name: str) -> str:
    """Why a cell was dropped, for readers."""
    return REASONS.get(name, name.replace("_", " "))


def corpus(run: Run) -> Section:
    """Cells by species, source and type; what was dropped and why; sentence lengths; gene mapping."""
    record, cells = run.records.get("corpus"), run.tables.get("cells")
    if record is None or cells is None:
        return missing("corpus", "Cells", "prepare", run)
    kept, read = int(cells["cells"].sum()), int(record.counts.get("read", 0))
    reasons = {k: int(v) for k, v in record.counts.get("dropped", {}).items() if v}
    lost = ", ".join(f"{n:,} {reason(r)}" for r, n in reasons.items())
    blocks: list[Any] = [
        Text(f"{kept:,} of {plural(read, 'cell')} were kept; " + (f"dropped: {lost}." if lost else "none was dropped."))
    ]
    blocks += [
        Text(f"{entry['name']} was refused: {entry['error']}", "refused") for entry in record.details.get("refused", [])
    ]
    blocks.append(_sources(cells, run.tables.get("dropped"), list(reasons)))
    named = cells[cells["type"] != ""]
    if len(named):
        counts = named.pivot_table(index="type", columns="species", values="cells", aggfunc="sum", fill_value=0)
        hidden = max(0, len(counts) - 40)
        blocks.append(
            Picture(
                figures.cells_by_type(counts),
                f"Cells by type (column `{run.config.classify.label}`) and species, after "
                f"quality control.{f' The {hidden} rarest types are left out.' if hidden else ''}",
            )
        )
    if run.lengths:
        longest = int(record.details.get("max_len", run.config.tokens.max_len))
        full = sum(int(h[longest:].sum()) for h in run.lengths.values()) / max(
            1, sum(int(h.sum()) for h in run.lengths.values())
        )
        words = f"{full:.1%} of the cells have {longest:,} genes or more, and their sentences end there."
        if full > 0.99:
            blocks.append(Text(f"Sentence lengths: {words}"))
        else:
            what = "Sentence lengths: how many genes of a cell, ranked by expression, the model sees."
            blocks.append(Picture(figures.lengths(run.lengths, longest), f"{what} {words}"))
    if len(mapping := run.tables.get("mapping", pd.DataFrame())):
        shown = [
            c
            for c in mapping.columns
            if c not in ("species", "cells_read", "cells_kept") and not (mapping[c].astype(str) == "").all()
        ]
        blocks.append(
            _plain(
                mapping[shown],
                "Genes of each source, matched to Ensembl identifiers. Renamed: found under a previous symbol "
                "or an alias. Summed: added to another column of the same gene. Counts on unmapped genes are lost.",
            )
        )
    return Section("corpus", "Cells", blocks)


def _sources(cells: pd.DataFrame, dropped: pd.DataFrame | None, reasons: list[str]) -> Grid:
    """Per source: cells kept, types, donors, and the cells dropped by reason."""
    lost = pd.DataFrame()
    if dropped is not None and len(dropped):
        lost = dropped.pivot_table(index="source", columns="reason", values="cells", aggfunc="sum", fill_value=0)
    reasons = [r for r in reasons if r in lost.columns]
    rows = []
    for (species, source), part in cells.groupby(["species", "source"], sort=True):
        donors = part.loc[part["donor"] != "", "donor"].nunique()
        rows.append([Cell(str(source)), Cell(str(species)), count(part["cells"].sum()),
                     *[count(lost.loc[source, r] if source in lost.index else 0) for r in reasons],
                     count(part.loc[part["type"] != "", "type"].nunique()), count(donors) if donors else Cell("–", 0)])  # fmt: skip
    head = ["Source", "Species", "Cells kept", *[f"Dropped: {reason(r)}" for r in reasons], "Cell types", "Donors"]
    return Grid("Cells by source.", head, rows)


def _plain(frame: pd.DataFrame, caption: str) -> Grid:
    """Any table as it stands, with shares as per cent."""
    rows = []
    for record in frame.to_dict("records"):
        row = []
        for name, value in record.items():
            if isinstance(value, (bool, str)) or value is None:
                row.append(Cell("" if value is None else str(value)))
            elif isinstance(value, (list, tuple, np.ndarray)):
                row.append(Cell(", ".join(str(v) for v in list(value)[:5])))
            elif any(word in str(name) for word in ("share", "fraction", "lost")):
                row.append(Cell("–" if not np.isfinite(value) else f"{value:.2%}", float(value)))
            else:
                row.append(count(float(value)))
        rows.append(row)
    return Grid(caption, [title_case(str(c)) for c in frame.columns], rows)


# training


CURVES = {
    "loss": "Total loss", "mlm": "Masked genes (MLM)", "contrast": "Contrast (SimCSE)", "simcsepp": "SimCSE++",
    "ortholog": "Orthologs", "lr": "Learning rate", "cells_per_s": "Cells per second", "tokens_per_s": "Tokens per second",
    "wait_share": "Share of time waiting for data", "mfu": "Share of peak FLOPs", "grad_norm": "Norm of the gradient",
    "alignment": "Alignment of two views", "uniformity": "Uniformity of the space", "memory_gb": "Memory (GB)",
}  # fmt: skip
"""Curves of the training history with a reader's name; others keep their own."""
LOSSES = ("loss", "mlm", "contrast", "simcsepp", "ortholog")


def curve(history: pd.DataFrame, name: str) -> pd.DataFrame:
    """One curve of the long history, by step; of a step that was run twice (after a restart) the last value."""
    part = history[(history["name"] == name) & np.isfinite(history["value"])]
    return part.drop_duplicates("step", keep="last").sort_values("step")[["step", "value"]]


def training(run: Run) -> Section:
    """Loss curves per term, throughput, and what was trained."""
    history, record = run.tables.get("history"), run.records.get("pretrain")
    if record is None:
        return missing("training", "Pretraining", "pretrain", run)
    if history is None or history.empty:
        text = "The weights were brought in (mixgf import-weights); nothing was trained here."
        return Section("training", "Pretraining", [Text(text), *_untrained(record)])
    present = [str(name) for name in history["name"].unique()]
    losses = [n for n in LOSSES if n in present] + [n for n in present if n not in LOSSES and "loss" in n]
    others = [n for n in CURVES if n in present and n not in losses] + [
        n for n in present if n not in CURVES and n not in losses
    ]
    blocks: list[Any] = [Text(_trained(record, history)), *_untrained(record)]
    ends = []
    for name in losses:
        first, last = loss_ends(history, name)
        ends.append(f"{findings.lower(CURVES.get(name, name))} {first:.3f} → {last:.3f}")
    if ends:
        blocks.append(Text("From the first tenth of the steps to the last tenth, on average: " + "; ".join(ends) + "."))
        blocks.append(
            Picture(
                figures.curves({CURVES.get(n, n): curve(history, n) for n in losses}, "losses"),
                "Training losses by optimizer step; thick line: running mean. They are measured on the training "
                "cells and are comparable between runs only at equal vocabulary and sentence length.",
            )
        )
    shown = {CURVES.get(n, title_case(n)): curve(history, n) for n in others[:9]}
    shown = {title: frame for title, frame in shown.items() if len(frame) > 1}
    if shown:
        blocks.append(
            Picture(
                figures.curves(shown, "throughput", zero=True),
                "Speed and state of training. Padding is never counted. Two views of a cell should lie near each other (low alignment) while "
                "cells spread over the space (low uniformity).",
            )
        )
    return Section("training", "Pretraining", blocks)


def _untrained(record: Record) -> list[Text]:
    num, size = len(checkpoint.untrained(record)), int(record.details.get("vocab_size", 0))
    if not num:
        return []
    text = (
        f"{num:,} of {size:,} token ids are untrained: no sentence that the model was trained on holds them. Their vectors are those of "
        "one-to-one orthologs, or random; `mixgf pretrain` with inputs.start trains them."
    )
    return [Text(text, "warn")]


def loss_ends(history: pd.DataFrame, name: str) -> tuple[float, float]:
    """Mean of a curve over the first and over the last tenth of its points."""
    values = curve(history, name)["value"]
    if values.empty:
        return float("nan"), float("nan")
    n = max(1, len(values) // 10)
    return float(values.head(n).mean()), float(values.tail(n).mean())


def _trained(record: Record, history: pd.DataFrame) -> str:
    model, objective = record.details.get("model", {}), record.details.get("objective", {})
    steps, epochs = int(history["step"].max()), int(history["epoch"].max())
    text = (f"An encoder of {model.get('num_layers', '?')} layers, width {model.get('dim', '?')} and "
            f"{model.get('num_heads', '?')} heads was trained from {'another checkpoint' if 'start' in record.parents else 'random weights'} "
            f"for {plural(steps, 'step')}")  # fmt: skip
    text += f" (epoch {epochs + 1})" if epochs >= 0 else ""
    terms = [f"{objective.get('mlm_weight', 1):g} × masked genes"]
    if objective.get("contrast_weight", 0):
        terms.append(f"{objective['contrast_weight']:g} × SimCSE contrast ({objective.get('view', 'dropout')} views)")
    if objective.get("ortholog_weight", 0):
        terms.append(f"{objective['ortholog_weight']:g} × orthologs")
    return f"{text} to minimise {' + '.join(terms)}."


# embedding


def embedding(run: Run) -> Section:
    """The joint map of the species, and how near corresponding types lie."""
    record, corpus_record = run.records.get("embed"), run.records.get("corpus")
    if record is not None and corpus_record is not None and record.parents.get("corpus") != corpus_record.fingerprint:
        text = "Not shown: these embeddings were made from another corpus than the one above (inputs.embeddings, inputs.corpus)."
        return Section("embedding", "One space for all species", [Text(text, "missing")])
    if run.vectors_ND is None or run.obs is None or len(run.vectors_ND) < 10:
        return missing("embedding", "One space for all species", "embed", run)
    species, types = run.obs["species"].to_numpy(str), run.obs["type"].to_numpy(str)
    drawn = (
        f"a keyed sample of {len(species):,} of {run.num_embedded:,}"
        if len(species) < run.num_embedded
        else f"all {len(species):,}"
    )
    xy, method = layouts.layout(run.vectors_ND, run.config.seed)
    blocks: list[Any] = [
        Picture(
            figures.maps(xy, species, types),
            f"{method} of {drawn} cells' frozen embeddings. The numbers on the right name the types below. Two dimensions bend "
            "distances: read neighbourhoods from them, not lengths; the distances that follow are in the original space.",
        )
    ]
    names = sorted(set(species))
    if len(names) > 1:
        seen, expected = findings.mixing(run.vectors_ND, species)
        blocks.insert(
            0,
            Text(
                f"Of a cell's 15 nearest neighbours, {seen:.1%} are of another species; if species played no part, it would be "
                f"{expected:.1%}. "
                + (
                    "The species lie largely apart."
                    if seen < 0.2 * expected
                    else "The species mix in part."
                    if seen < 0.8 * expected
                    else "The species mix."
                )
            ),
        )
    centres = findings.centroids(run.vectors_ND, species, types)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            blocks += _centroid_blocks(findings.centroid_table(centres, first, second), first, second)
    return Section("embedding", "One space for all species", blocks)


def _centroid_blocks(table: pd.DataFrame, first: str, second: str) -> list[Any]:
    if table.empty:
        return []
    matched, shared = findings.counterparts(table)
    table = table.iloc[:30, :30]
    text = [[f"{v:.2f}".lstrip("0") if v < 1 else f"{v:.1f}" for v in row] for row in table.to_numpy()]
    if float(table.to_numpy().max()) < 0.1:
        text = [[f"{1000 * v:.0f}" for v in row] for row in table.to_numpy()]
    unit = "Cosine distance, in thousandths," if float(table.to_numpy().max()) < 0.1 else "Cosine distance"
    guess = 1 / max(table.shape[1], 1)
    return [
        Text(
            f"{first} to {second}: for {matched} of {plural(shared, 'type')} found in both species, the nearest {second} centroid "
            f"is that of the same type (chance: {guess:.0%} of them).",
            "good" if shared and matched == shared else "plain",
        ),
        Picture(
            figures.heatmap(
                table, f"centroids-{first}-{second}", rows=first, columns=second, text=text, outline="smallest"
            ),
            f"{unit} between the mean embeddings of each {first} type (row) and each {second} type (column), types "
            f"with at least {findings.MIN_TYPE_CELLS} cells. The box marks each row's nearest type; shared types come first, so "
            "that perfect correspondence is boxes on the diagonal.",
        ),
    ]


# provenance


def provenance(run: Run, versions: dict[str, str]) -> Section:
    """What made what: fingerprints, code, versions, the config, and the commands that repeat the run."""
    rows = [
        [Cell(stage), Cell(record.kind), Cell(record.fingerprint[:16]), Cell(record.code), Cell(record.created),
         Cell(", ".join(f"{role} {parent[:8]}" for role, parent in sorted(record.parents.items())) or "–"), Cell(run.uris[stage])]
        for stage, record in run.records.items()
    ]  # fmt: skip
    blocks: list[Any] = []
    if rows:
        blocks.append(
            Grid(
                "Artifacts. Equal fingerprints mean equal inputs and settings.",
                ["Stage", "Kind", "Fingerprint", "Code", "Planned at (UTC)", "Made from", "Where"],
                rows,
            )
        )
    blocks.append(Text("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."))
    stages = "\n".join(
        f"mixgf {stage} --config config.json"
        for stage in ("prepare", "pretrain", "embed", "classify", "perturb", "report")
    )
    blocks.append(
        Fold(
            "Repeat this run",
            f"# save the configuration below as config.json, then\nmixgf run --config config.json\n"
            f"# or stage by stage\n{stages}",
        )
    )
    blocks.append(Fold("Configuration (JSON)", json.dumps(to_dict(run.config), indent=1)))
    return Section("provenance", "Provenance", blocks)
