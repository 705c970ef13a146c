"""Build the report: load the results of a run, lay out the sections, render one HTML file."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mixgf
from mixgf import console
from mixgf.config.parse import fingerprint, to_dict
from mixgf.config.run import Config
from mixgf.errors import UserError
from mixgf.redact import redact
from mixgf.report.elements import Figure, Section, Table
from mixgf.report.load import artifact_uris, load_results
from mixgf.report.results import RunResults
from mixgf.report.sections import (
    classification_models,
    classification_tasks,
    corpus,
    embedding_map,
    embedding_spaces,
    finetuned_classifier,
    perturbation,
    pretraining,
    provenance,
    published_accuracy,
    species_comparison,
    summary,
    sweep_effects,
)
from mixgf.storage import artifacts, files
from mixgf.tracking import mlflow_runs

_KEY = '<meta name="mixgf-inputs" content="'

SECTIONS: tuple[Callable[[RunResults], Section], ...] = (
    summary.section,
    corpus.section,
    pretraining.section,
    embedding_map.section,
    classification_models.section,
    classification_tasks.section,
    published_accuracy.section,
    finetuned_classifier.section,
    embedding_spaces.section,
    species_comparison.section,
    perturbation.section,
    sweep_effects.section,
    provenance.section,
)
"""The sections of the page, in reading order."""


def build_report(config: Config, uri: str) -> str:
    """Write the report of a run to `uri` as one HTML file. A report made from the same inputs is left as it is.

    Returns:
        `uri`.
    """
    key = input_key(config)
    if files.exists(uri):
        head = "" if files.is_folder(uri) else files.read_bytes(uri)[:4096].decode(errors="ignore")
        if f"{_KEY}{key}" in head:
            console.say(f"report: {uri} is up to date")
            return uri
        if _KEY not in head:
            msg = f"{uri}: is no report of mixgf; move it away, or choose another output (--output)"
            raise UserError(msg)
    results = load_results(config)
    sections = make_sections(results)
    files.write_bytes(uri, redact(render(results, key, sections)).encode())
    mlflow_runs.publish_report(config, uri, figures_of(sections), tables_of(sections))
    return uri


def input_key(config: Config) -> str:
    """Fingerprint of all that a report depends on: config, artifacts, library versions, and the code of mixgf."""
    records = {
        stage: record for stage, uri in artifact_uris(config).items() if (record := artifacts.find(uri)) is not None
    }
    return fingerprint({
        "config": to_dict(config),
        "code": source_digest(Path(mixgf.__file__).parent),
        "versions": provenance.library_versions(),
        "inputs": {stage: [record.fingerprint, record.created] for stage, record in records.items()},
    })  # fmt: skip


def source_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of the files of a package, its templates and tables included."""
    digest = hashlib.sha256()
    paths = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def make_sections(results: RunResults) -> list[Section]:
    """The sections of the page that have anything to show."""
    return [made for section in SECTIONS if (made := section(results)).blocks]


def figures_of(sections: Sequence[Section]) -> dict[str, str]:
    """SVG files of the figures, by the section's name and the number in it."""
    return {
        f"{section.id}-{number}": block.svg
        for section in sections
        for number, block in enumerate((b for b in section.blocks if isinstance(b, Figure)), 1)
    }


def tables_of(sections: Sequence[Section]) -> dict[str, str]:
    """CSV files of the tables, by the section's name and the number in it; cells as the page shows them."""
    found = {}
    for section in sections:
        for number, block in enumerate((b for b in section.blocks if isinstance(b, Table)), 1):
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(block.head)
            writer.writerows([cell.text for cell in row] for row in block.rows)
            found[f"{section.id}-{number}"] = text.getvalue()
    return found


def render(results: RunResults, key: str, sections: Sequence[Section] | None = None) -> str:
    """The page as HTML text; `key` (see `input_key`) is written into its head. `sections` are made if not given."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mixgf", "resources"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: dict[str, Any] = {
        "sections": make_sections(results) if sections is None else sections,
        "tiles": summary.tiles(results),
        "results": results,
        "key": key,
    }
    return environment.get_template("report.html.j2").render(page)
