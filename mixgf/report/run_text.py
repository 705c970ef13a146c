"""The short summary that `mixgf run` prints at its end."""

from __future__ import annotations

from mixgf.classification import registry
from mixgf.config.run import Config
from mixgf.perturbation import hits
from mixgf.report import score_tables, verdicts, wording
from mixgf.report.load import load_results
from mixgf.report.results import RunResults
from mixgf.report.sections import pretraining


def summary_rows(results: RunResults) -> list[tuple[str, ...]]:
    """Rows of (task, model, accuracy, macro F1, best baseline, its accuracy, its macro F1, verdict), one per task and own model."""
    scores = results.tables.get("scores")
    if scores is None or scores.empty:
        return []
    found = verdicts.paired_comparisons(score_tables.mean_scores(scores), results.tables.get("comparisons"))
    rows: list[tuple[str, ...]] = []
    for key in dict.fromkeys((d.split, d.group, d.direction, d.model) for d in sorted(found, key=_order)):
        pair = {d.metric: d for d in found if (d.split, d.group, d.direction, d.model) == key}
        if len(pair) < 2:
            continue
        comparison, accuracy = pair["macro_f1"], pair["accuracy"]
        verdict = {
            "ahead": "better",
            "behind": "WORSE",
            "unknown": "too few donors to say",
            "level": "lower, within error" if comparison.lower else "higher, within error",
        }[comparison.verdict]
        rows.append((
            f"{wording.SPLIT_NAMES.get(comparison.split, comparison.split)}: {wording.task_label(*key[:3])}", registry.label(comparison.model),
            wording.score_text(accuracy.score[0]), wording.score_text(comparison.score[0]), registry.label(comparison.baseline),
            wording.score_text(accuracy.baseline_score[0]), wording.score_text(comparison.baseline_score[0]), verdict,
        ))  # fmt: skip
    return rows


def _order(comparison: verdicts.PairedComparison) -> tuple[int, str, str, int]:
    splits = list(wording.SPLITS)
    return (
        splits.index(comparison.split) if comparison.split in splits else len(splits),
        comparison.group,
        comparison.direction,
        registry.OWN.index(comparison.model),
    )


def summary(config: Config) -> str:
    """Cells, training losses, scores beside the best baseline, and the genes with the largest shifts, as text."""
    results = load_results(config, light=True)
    lines = []
    if "corpus" in results.records:
        counts = results.records["corpus"].counts
        lines.append(f"cells      {counts.get('kept', 0):,} kept of {counts.get('read', 0):,}")
    if (history := results.tables.get("history")) is not None and len(history):
        ends = {
            name: pretraining.loss_ends(history, name) for name in pretraining.LOSSES if name in set(history["name"])
        }
        said = [
            f"{wording.lower_first(pretraining.CURVES[name])} {first:.3f} -> {last:.3f}"
            for name, (first, last) in ends.items()
        ]
        lines.append(f"training   {'; '.join(said)}")
    if "classify" in results.records and (seen := results.records["classify"].details.get("audit")):
        lines.append(f"audit      {seen['line']}")
    if rows := summary_rows(results):
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
    if (genes := results.tables.get("genes")) is not None and len(genes):
        for operation, part in genes.groupby("operation", sort=False):
            top = " ".join(part.sort_values(["shift", "gene"], ascending=[False, True]).head(8)["symbol"])
            lines.append(
                f"{operation:<10} {top}  ({len(hits.call_hits(part))} of {len(part):,} genes are hits: a donor-level FDR of 5 %, and unusual for their rank)"
            )
        if left := results.records["perturb"].counts.get("not_scored", 0):
            lines.append(f"{'':<10} not complete: the budget was spent before {left:,} genes were scored")
    return "\n".join(lines) if lines else "no stage has been run yet"
