"""mixgf: one encoder for human and mouse single cells, from raw counts to perturbation screens, on Ray.

`mixgf --help` lists the commands; `mixgf demo` runs every stage on bundled real cells. From Python:

    import mixgf as mg
    encoder = mg.load("runs/mine")
    adata.obsm["X_mixgf"] = encoder.embed(adata)

Names are imported when they are first used, so `import mixgf` itself is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixgf import datasets
    from mixgf.api import (
        CellClassifier,
        CellEncoder,
        classify,
        load,
        load_classifier,
        prepare,
        pretrain,
        pull,
        push,
        score_perturbations,
        write_report,
    )
    from mixgf.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "CellClassifier",
    "CellEncoder",
    "UserError",
    "classify",
    "datasets",
    "load",
    "load_classifier",
    "prepare",
    "pretrain",
    "pull",
    "push",
    "score_perturbations",
    "write_report",
]

_HOMES = dict.fromkeys(__all__, "mixgf.api") | {"UserError": "mixgf.errors", "datasets": "mixgf.datasets"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        msg = f"module 'mixgf' has no attribute {name!r}"
        raise AttributeError(msg)
    home = importlib.import_module(_HOMES[name])
    value = home if name == "datasets" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted({*globals(), *__all__})
