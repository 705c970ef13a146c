"""Corpora and sources as MLflow's data sets: what a run was made from, with digests."""

from __future__ import annotations

import json
from typing import Any

from mixgf.config.parse import fingerprint
from mixgf.redact import redact
from mixgf.storage import artifacts, files

DIGEST = 16
"""Characters of a digest."""
MOST_SOURCES = 50
"""Sources of one run that are logged; a corpus of more has the others in its record."""


def corpus(uri: str, context: str) -> dict[str, Any]:
    """A corpus, by its record.

    Args:
        uri: Of the corpus.
        context: What it is used for, such as `training`.

    Raises:
        UserError: There is no corpus.
    """
    record = artifacts.require(uri, "corpus")
    profile = {k: v for k, v in record.counts.items() if not isinstance(v, dict | list)}
    shape = {"num_rows": record.counts.get("kept"), "max_len": record.details.get("max_len")}
    parts = [part for part in uri.rstrip("/").split("/") if part]
    name = "/".join(parts[-2:]) if parts else uri
    return _entity(name, record.fingerprint[:DIGEST], uri, context=context, profile=profile | shape, columns=_SENTENCES)


def sources(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sources of a corpus, from the rows of its record."""
    return [
        _entity(
            str(row.get("name") or row["uri"].rsplit("/", 1)[-1]), fingerprint(row)[:DIGEST], row["uri"],
            context="source", profile=row, columns=[],
        )
        for row in rows[:MOST_SOURCES]
    ]  # fmt: skip


_SENTENCES = [
    {"name": "tokens", "type": "array", "items": {"type": "integer"}, "required": True},
    {"name": "length", "type": "integer", "required": True},
]


def _entity(
    name: str, digest: str, uri: str, *, context: str, profile: dict[str, Any], columns: list[dict[str, Any]]
) -> dict[str, Any]:
    """The fields of `mlflow.entities.Dataset`; the source is one that `mlflow.data.get_source` opens."""
    scheme = uri.partition("://")[0] if "://" in uri else "local"
    local = files.is_local(uri) or scheme == "local"
    return {
        "name": redact(name), "digest": digest, "source_type": "local" if local else scheme,
        "source": json.dumps({"uri": redact(uri)}), "context": context,
        "schema": json.dumps({"mlflow_colspec": columns}) if columns else None,
        "profile": redact(json.dumps({k: v for k, v in profile.items() if v is not None}, default=str))[:10000],
    }  # fmt: skip
