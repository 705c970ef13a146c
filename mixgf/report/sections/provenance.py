"""Provenance: artifacts with their fingerprints, library versions, the configuration, and commands to repeat the run."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

from mixgf.config.parse import to_dict
from mixgf.report.elements import Cell, Fold, Section, Table, Text
from mixgf.report.results import RunResults

LIBRARIES = (
    "anndata",
    "jinja2",
    "matplotlib",
    "numpy",
    "pandas",
    "polars",
    "pyarrow",
    "ray",
    "scikit-learn",
    "scipy",
    "torch",
    "umap-learn",
)


def library_versions() -> dict[str, str]:
    """Installed version of each of `LIBRARIES`."""
    return {name: metadata.version(name) for name in LIBRARIES}


def section(results: RunResults) -> Section:
    """Artifacts and what they were made from, library versions, commands to repeat the run, and the configuration."""
    rows = [
        [Cell(stage), Cell(record.kind), Cell(record.fingerprint[:16]), Cell(record.code), Cell(record.created),
         Cell(", ".join(f"{role} {parent[:8]}" for role, parent in sorted(record.parents.items())) or "–"), Cell(results.uris[stage])]
        for stage, record in results.records.items()
    ]  # fmt: skip
    blocks: list[Any] = []
    if rows:
        blocks.append(
            Table(
                "Artifacts. Two artifacts with one fingerprint have the same inputs and settings.",
                ["Stage", "Kind", "Fingerprint", "Code", "Started at (UTC)", "Made from", "URI"],
                rows,
            )
        )
    blocks.append(
        Text("Versions: " + ", ".join(f"{name} {version}" for name, version in library_versions().items()) + ".")
    )
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
    blocks.append(Fold("Configuration (JSON)", json.dumps(to_dict(results.config), indent=1)))
    return Section("provenance", "Provenance", blocks)
