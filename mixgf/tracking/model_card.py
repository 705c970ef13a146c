"""The model card of a registered model, as Markdown: data, recipe, scores, limits."""

from __future__ import annotations

import json
from typing import Any


def write(
    *,
    name: str,
    corpus: dict[str, Any],
    changes: dict[str, Any],
    scores: list[str],
    sentence: str,
    config: dict[str, Any],
    untrained: int = 0,
) -> str:
    """The model card, as Markdown.

    Args:
        name: Of the model.
        corpus: Counts and sources of the corpus.
        changes: Config fields that differ from the sweep's base, and their values.
        scores: One line per metric.
        sentence: What the sweep found.
        config: The model's whole config.
        untrained: Number of token ids that occur in no training sentence.
    """
    sources = ", ".join(corpus["sources"]) or "not recorded"
    changed = (
        "\n".join(f"- `{field}` = `{json.dumps(value)}`" for field, value in changes.items()) or "- none: the base"
    )
    shown = "\n".join(f"- {line}" for line in scores)
    left = f" {untrained:,} token ids are untrained: they occur in no training sentence." if untrained else ""
    o, m = config["objective"], config["model"]
    return f"""# {name}

Encoder of single cells ({corpus["species"]}): {m["num_layers"]} layers, width {m["dim"]}, sentences of up to {config["tokens"]["max_len"]} tokens.

## Data
{corpus["cells"]:,} cells ({corpus["species"]}) of {sources}. Corpus fingerprint `{corpus["fingerprint"][:16]}`.

## Recipe
Masked genes ({o["mlm_fraction"]:.0%}), contrast of weight {o["contrast_weight"]:g} (view {o["view"]}, temperature {o["temperature"]:g}). Against the sweep's base:
{changed}

## Scores
{shown}
The sweep: {sentence}.

## Limits
The model may have been pretrained on the sentences of the scored cells, but not on their labels. Intervals are over seeds:
other donors, tissues and protocols can differ by more. A model of a sweep is trained only for the sweep's number of steps.{left}
"""
