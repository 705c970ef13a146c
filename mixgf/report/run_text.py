"""The short summary that `mixgf run` prints at its end."""

from __future__ import annotations

import textwrap

from mixgf.config.run import Config
from mixgf.perturbation import hits
from mixgf.report import answers, wording
from mixgf.report.load import load_results
from mixgf.report.results import RunResults
from mixgf.report.sections import pretraining


def summary(config: Config) -> str:
    """What the run allows to do, what the encoder adds, then cells, losses, scores of all models and the largest shifts, as text."""
    results = load_results(config, light=True)
    lines = []
    if told := answers.answers(results):
        lines += ["what you can do now", *_listed(told), *_annotate(results), ""]
    if told := answers.encoder_adds(results):
        lines += [told[0][1], *_listed(told[1:]), ""]
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
    if (scores := results.tables.get("scores")) is not None and len(scores):
        rows = answers.score_matrix(scores)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += ["", *("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows), ""]
    if (genes := results.tables.get("genes")) is not None and len(genes):
        for operation, part in genes.groupby("operation", sort=False):
            top = " ".join(part.sort_values(["shift", "gene"], ascending=[False, True]).head(8)["symbol"])
            lines.append(f"{operation:<10} {top}  ({hits.control_sentence(part)[1].rstrip('.')})")
        if left := results.records["perturb"].counts.get("not_scored", 0):
            lines.append(f"{'':<10} not complete: the budget was spent before {left:,} genes were scored")
    return "\n".join(lines) if lines else "no stage has been run yet"


def _annotate(results: RunResults) -> list[str]:
    """The command that labels other cells, for each kept classifier; not wrapped, so that it can be copied."""
    commands = answers.commands(results)
    return ["    your own cells:", *(f"    {command}" for command in commands)] * bool(commands)


def _listed(told: list[tuple[str, str]]) -> list[str]:
    """Sentences as a list, wrapped."""
    return [textwrap.fill(text, 118, initial_indent="  - ", subsequent_indent="    ") for _, text in told]
