"""The list of sources that a user gave, expanded to one file each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from mixgf.cells.tenx import PLAIN_MATRICES, mtx_matrices
from mixgf.config.data import Source
from mixgf.errors import UserError
from mixgf.storage import files


def expand_sources(sources: Iterable[Source]) -> tuple[Source, ...]:
    """One source per file: patterns (`*`, `?`, `[]`) are expanded, and every file gets a unique name.

    A file is named after itself, without its ending. Files of one name, such as those of several samples, are named after the
    parts of their paths that differ.

    Raises:
        UserError: a pattern matches no file, a file is given twice, two sources are given one name, or there is no source.
    """
    out: list[Source] = []
    free: list[int] = []
    for i, source in enumerate(sources):
        uris = files.glob(source.uri) if re.search(r"[*?\[]", source.uri) else [source.uri]
        if not uris:
            msg = f"sources[{i}].uri = {source.uri!r}: matches no file; check the pattern"
            raise UserError(msg)
        for uri in uris:
            if source.name and len(uris) == 1:
                out.append(source)
                continue
            free.append(len(out))
            stem = _sample_in(uri) or _stem(uri)
            out.append(replace(source, uri=uri, name="-".join(filter(None, (source.name, stem)))))
    if not out:
        msg = "sources = (): must name at least one file of counts with its species, for example: mixgf prepare human=cells.h5ad"
        raise UserError(msg)
    _name_by_path(out, free)
    for name, times in Counter(s.name for s in out).items():
        if times > 1:
            uris = sorted({s.uri for s in out if s.name == name})
            way = (
                f"given {times} times"
                if len(uris) == 1
                else "give each a name of its own: SPECIES=NAME=URI (sources[i].name)"
            )
            msg = f"sources.name = {name!r}: used by {times} sources ({', '.join(uris[:2])}); {way}"
            raise UserError(msg)
    return tuple(out)


def _sample_in(uri: str) -> str:
    """Name of the only sample of a local folder whose files begin with it; empty if there is none."""
    if not files.is_local(uri) or not files.is_folder(uri):
        return ""
    found = {name.removesuffix(".gz") for name in mtx_matrices(files.list_dir(uri))}
    return _stem(found.pop()) if len(found) == 1 and not found & set(PLAIN_MATRICES) else ""


def _stem(uri: str) -> str:
    """Name of a file without its ending; of a matrix of a sample, without the name that all of them have."""
    name = uri.rstrip("/").rsplit("/", 1)[-1].removeprefix("resource:")
    return (
        re.sub(r"[._-]?(matrix\.mtx)?(\.gz)?$|\.(h5ad|h5|hdf5|zarr|zarr\.zip|soma|arrow|dataset)$", "", name, count=1)
        or name
    )


def _name_by_path(sources: list[Source], free: list[int]) -> None:
    """Name the sources `free` that share a name after the parts of their paths that differ; changes `sources`."""
    groups: dict[str, list[int]] = {}
    for i in free:
        groups.setdefault(sources[i].name, []).append(i)
    taken = Counter(s.name for s in sources)
    for name, mine in groups.items():
        paths = [sources[i].uri.rstrip("/").split("/") for i in mine]
        if len(mine) < 2 or len({tuple(path) for path in paths}) < len(paths):
            continue
        depth = max(map(len, paths))
        aligned = [[""] * (depth - len(path)) + path for path in paths]  # by their ends
        differ = [k for k in range(depth) if len({path[k] for path in aligned}) > 1]
        short = ["-".join(filter(None, (path[k] for k in differ))) for path in aligned]
        clash = len(set(short)) < len(short) or any(taken[one] for one in short)
        for i, one in zip(mine, short, strict=True):
            sources[i] = replace(sources[i], name=f"{one}-{name}" if clash else one)
