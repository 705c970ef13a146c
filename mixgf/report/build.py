"""From a run's artifacts to one self-contained HTML file, and to the short table that ends a run.

Layout: `report` loads and writes, `sections` and `scorecard` lay out, `findings` works out what may be said, `figures`
draws, `page` names what a page is made of. The file opens anywhere: no request leaves it.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import mixgf
from mixgf import console
from mixgf.config.parse import fingerprint, to_dict
from mixgf.config.run import Config
from mixgf.report.elements import Run, Section
from mixgf.report.load import load, uris
from mixgf.report.sections import (
    classification,
    classification_table,
    corpus,
    embedding,
    embedding_spaces,
    perturbation,
    provenance,
    species_comparison,
    summary,
    sweep_effects,
    training,
)
from mixgf.storage import artifacts, files

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


def write(config: Config, uri: str) -> str:
    """Write the report of a run as one HTML file at `uri`; does nothing when it is there, made of the same inputs.

    Returns:
        `uri`.
    """
    key = _key(config)
    if files.exists(uri) and f"{_KEY}{key}" in files.read_bytes(uri)[:4096].decode(errors="ignore"):
        console.say(f"report: {uri} is up to date")
        return uri
    files.write_bytes(uri, render(load(config), key).encode())
    return uri


def _key(config: Config) -> str:
    """Changes when the config, an artifact, a library or the report's own code changes."""
    code = hashlib.sha256()
    package = Path(mixgf.__file__).parent
    for name in sorted(
        p
        for part in ("report", "stats", "perturbation", "tuning", "resources")
        for p in (package / part).rglob("*.[pj][y2]*")
    ):
        code.update(name.read_bytes())
    found = {stage: record for stage, uri in uris(config).items() if (record := artifacts.find(uri)) is not None}
    return fingerprint({"config": to_dict(config), "code": code.hexdigest(), "versions": _versions(),
                        "inputs": {stage: [r.fingerprint, r.created] for stage, r in found.items()}})  # fmt: skip


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}


def all_sections(run: Run) -> list[Section]:
    """The report's sections in reading order."""
    made = [summary.brief(run), corpus.corpus(run), training.training(run), embedding.embedding(run), classification_table.section(run), embedding_spaces.section(run),
            classification.classification(run), species_comparison.section(run), perturbation.section(run), sweep_effects.section(run), provenance.provenance(run, _versions())]  # fmt: skip
    return [section for section in made if section.blocks]


def render(run: Run, key: str) -> str:
    """The page as HTML text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mixgf", "resources"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page: dict[str, Any] = {"sections": all_sections(run), "tiles": summary.tiles(run), "run": run, "key": key}
    return environment.get_template("report.html.j2").render(page)
