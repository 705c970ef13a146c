"""Model cards, as Markdown: data, recipe, scores, limits, use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mixgf.storage.artifacts import Record

_USE = """## Use
```python
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model("{uri}")
model.predict(pd.DataFrame({{"path": ["cells.h5ad"]}}))  # {returns}
```
`path` names files of raw counts: `.h5ad`, 10x `.h5` or a 10x folder, local or `s3://`. Parameters: `layer`, `genes` (column of
var with Ensembl ids or symbols), `species` (empty: found by gene names)."""


def _species(names: list[str]) -> str:
    return " and ".join(names) or "species not recorded"


def encoder(trained: Record, corpus: Record, final: Mapping[str, float]) -> str:
    """The model card of a checkpoint.

    Args:
        trained: Record of the checkpoint.
        corpus: Record of its corpus.
        final: Figures of its last logged step, by name.
    """
    m, o = trained.details["model"], trained.details.get("objective")
    sources = ", ".join(s["name"] for s in corpus.config.get("sources", [])[:30]) or "not recorded"
    species = _species(list(corpus.details.get("species", [])))
    masked = f"masked genes ({o['mlm_fraction']:.0%}), " if o and o["mlm_weight"] else ""
    recipe = "Imported weights." if o is None else (
        f"Trained by {masked}contrast of weight {o['contrast_weight']:g} (view {o['view']}, temperature "
        f"{o['temperature']:g}), {trained.counts.get('steps', 0):,} steps."
    )  # fmt: skip
    figures = "\n".join(f"- {name}: {value:.4g}" for name, value in final.items()) or "- none"
    untrained = sum(stop - start for start, stop in trained.details.get("untrained", []))
    left = f"\n{untrained:,} of {trained.details['vocab_size']:,} token ids are untrained." if untrained else ""
    return f"""# Encoder of single cells ({species})
Layers: {m["num_layers"]}, width: {m["dim"]}, sentences of up to {m["max_positions"]} tokens, {trained.details["vocab_size"]:,} token ids. Checkpoint
fingerprint `{trained.fingerprint[:16]}`, made by mixgf {trained.code}.

## Data
{corpus.counts.get("kept", 0):,} cells ({species}) of {sources}. Corpus fingerprint `{corpus.fingerprint[:16]}`.

## Training
{recipe} Last logged figures:
{figures}

## Limits
Vectors of species, tissues and protocols that are not among the data have not been tested. Test labels that a later analysis uses
may belong to cells of this corpus: `mixgf audit EVAL CORPUS` counts them.{left}

{_USE.format(uri="models:/NAME/VERSION", returns="path, cell, vector: one row per cell")}
"""


def classifier(facts: Mapping[str, Any]) -> str:
    """The model card of a kept classifier, from its plain facts (`kept_classifier.facts`)."""
    about, classes = facts["about"], facts["classes"]
    test = about.get("test", {})
    names = {
        "accuracy": "accuracy", "macro_f1": "macro F1", "balanced_accuracy": "balanced accuracy", "ece": "calibration error",
        "doubted": "share of doubted cells", "accuracy_trusted": "accuracy of trusted labels",
        "accuracy_doubted": "accuracy of doubted labels",
    }  # fmt: skip
    scores = "\n".join(f"- {title}: {test[name]:.3f}" for name, title in names.items() if name in test)
    return f"""# Cell types of {about["group"]}
{about["model"]}, {len(classes)} types of {_species(list(about["species"]))} cells: {", ".join(classes)}.

## Data
{about["training_cells"]:,} training cells of {", ".join(about["sources"][:30])}, labels of `{about["label"]}`.

## Scores
On {test.get("cells", 0):,} test cells of the split `{about["split"]}`, seed {about["seed"]}:
{scores}

## Limits
Types that are not listed cannot be predicted. `trusted` is false where the probability is low, the cell lies far from the cells of
its type, or few genes were detected; `doubt` says which.

{_USE.format(uri="models:/NAME/VERSION", returns="path, cell, label, probability, ..., trusted, doubt: one row per cell")}
"""


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
