"""Which files in the folder of an artifact are mixgf's own, by their names.

mixgf removes and replaces only its own files. A folder with any other file is refused before work begins, so that files of a user
are not mixed with them. Files that systems put into folders (`_SYSTEM`) are neither refused nor removed.
"""

from __future__ import annotations

import re
from functools import cache

from mixgf.console import warn
from mixgf.errors import UserError
from mixgf.storage import files

ANNOTATION = "annotation"
"""Parts of `mixgf annotate`, which lie beside its output until that is written."""
_HEX = "[0-9a-f]"
_EVERY = (r"(record|plan)\.json", r"[a-z_]+\.parquet", r"cost/[^/]+\.json", r"lease/\d{8}\.json")
_CLASSIFIER = r"(model\.safetensors|[a-z_]+\.parquet|classifier\.json)"
_STEPS = (r"steps/\d{8}/(model|optimizer)\.safetensors", r"steps/\d{8}/state\.json", r"history\.parquet")
_WORK = (
    r"work/[a-z_]+(-[^/]+)?/\d{5,10}(-\d{5,10})?\.(parquet|arrow|json)",
    r"work/genes/[^/]+\.parquet",
    r"work/near_kept\.parquet",
)
SCRATCH = {
    "corpus": _WORK,
    "classification": (
        r"parts/counts/[^/]*-[0-9a-f]{8}\.parquet",
        r"parts/vectors/[^/]+/\d{5}\.parquet",
        rf"parts/classifiers/[^/]*-[0-9a-f]{{8}}/{_CLASSIFIER}",
    ),
    "classifier": _STEPS[:2],
    "embeddings": (),
}
"""Patterns of the files that are removed when the artifact is finished, by kind; temporary files of killed workers go with them."""
_CLASSIFICATION = (
    *SCRATCH["classification"],
    r"parts/predictions/[^/]*-[0-9a-f]{10}\.parquet",
    r"parts/validation/[^/]*-[0-9a-f]{8}\.parquet(\.json)?",
    r"parts/integration/[^/]+-\d+\.parquet",
    rf"classifiers/[^/]+/({_CLASSIFIER}|(record|plan)\.json|lease/\d{{8}}\.json)",
    r"(scores|comparisons|confusion|efficiency|epochs|per_class|predictions|rejection|splits|added)\.parquet",
    r"(integration|maps|centroids)\.parquet",
    r"cells\.h5ad",
)
_FILES = {
    "vocabulary": (r"vocabulary\.parquet",),
    "corpus": (
        *_WORK,
        r"(shards|near_hashes)/\d{5}\.parquet",
        r"(index|mapping|dropped|doublets|hashes|vocabulary|imported)\.parquet",
    ),
    "checkpoint": (*_STEPS, r"(model|start)\.safetensors"),
    "gene_vectors": (r"work(-[^/]+)?/(state-\d+|pass-\d+/\d{5})\.safetensors", r"vectors\.parquet"),
    "neighbours": (r"shards/\d{5}\.parquet", r"groups\.parquet"),
    "embeddings": (r"shards/\d{5}\.parquet", r"cells\.h5ad"),
    "classification": _CLASSIFICATION,
    "classifier": (*_STEPS, _CLASSIFIER),
    "perturbation": (
        rf"parts/{_HEX}{{16}}/(cost/[^/]+\.json|(responses/)?[a-z]+-[^/]+\.parquet)",
        r"(genes|states|calibration|not_scored|responses)\.parquet",
    ),
    "comparison": (
        r"encoders/[^/]+/.+",
        *SCRATCH["classification"],
        *(rf"classify/(?:{one})" for one in (*_EVERY, *_CLASSIFICATION)),
        r"(transfer|failures|integration|maps|corresponding|pairs|shifts|together|conserved|conserved_summary|networks)\.parquet",
    ),
    "sweep": (
        r"(corpora|trials|arms|best|inputs)/.+",
        r"(trials|arms|effects|interactions|final)\.parquet",
        r"best\.json",
    ),
    ANNOTATION: (rf"form/{_CLASSIFIER}", r"\d{10}\.parquet"),
    "bert": (r"model\.safetensors", r"token_dictionary\.json", r"config\.json"),
}
"""Patterns of all further files, by kind of artifact."""
_PARTS = re.compile(r"(work|parts)(-[^/]+)?/.+\.(parquet|arrow|json|safetensors)")
"""Data files among parts, of this version or an earlier one."""
_SYSTEM = re.compile(r"(.*/)?(\.DS_Store|\._[^/]*|Thumbs\.db|desktop\.ini|\.directory|\.nfs[0-9a-f]+|\.gitkeep)")


@cache
def _pattern(kind: str) -> re.Pattern[str]:
    return _any_of(*_EVERY, *_FILES[kind.removeprefix("partial ")])


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{one})" for one in patterns))


def foreign_files(uri: str, kind: str) -> list[str]:
    """Names, relative to the folder, of the files that no artifact of this kind has; sorted.

    Data files among parts count as mixgf's here, whatever their names: earlier versions had others. They are not removed.
    """
    own = (_pattern(kind), _PARTS, _SYSTEM)
    return [name for name in files.names_in(uri) if not any(pattern.fullmatch(name) for pattern in own)]


def require_own(uri: str, kind: str) -> None:
    """Raise a `UserError` if a folder that an artifact is to be made in holds files of somebody else."""
    if files.exists(uri) and not files.is_folder(uri):
        msg = f"{uri}: is a file, and a {kind} is a folder; move it away, or choose another output (--set output=...)"
        raise UserError(msg)
    foreign = foreign_files(uri, kind)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        msg = (
            f"{uri}: holds files that mixgf did not make ({', '.join(foreign[:3])}{more}); "
            "move them away, or choose another output (--set output=...)"
        )
        raise UserError(msg)


def remove_own(uri: str, kind: str, *, scratch: bool = False) -> None:
    """Remove the files of an artifact from its folder, and folders that are then empty. Other files stay, and are named.

    Args:
        uri: The artifact's folder.
        kind: Of artifact.
        scratch: Remove only the files that a finished artifact does not need.
    """
    pattern = _any_of(*SCRATCH[kind]) if scratch else _pattern(kind)
    # the plan goes last: until then the folder is known to be mixgf's
    left = files.remove_matching(uri, pattern, last="plan.json")
    inside = [name for name in left if not _SYSTEM.fullmatch(name)]
    if inside and not scratch:
        warn(f"{uri}: left as they are, mixgf did not make them: {', '.join(inside[:3])}")
