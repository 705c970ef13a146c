"""The list of sources that a user gave, expanded to one file each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from mixgf.config.data import Source
from mixgf.errors import UserError
from mixgf.storage import files


def expand_sources(sources: Iterable[Source]) -> tuple[Source, ...]:
    """One source per file: patterns (`*`, `?`, `[]`) are expanded, and every file gets a unique name.

    Raises:
        UserError: a pattern matches no file, two sources have one name, or there is no source.
    """
    out: list[Source] = []
    for i, source in enumerate(sources):
        uris = files.glob(source.uri) if re.search(r"[*?\[]", source.uri) else [source.uri]
        if not uris:
            msg = f"sources[{i}].uri = {source.uri!r}: matches no file; check the pattern"
            raise UserError(msg)
        for uri in uris:
            stem = re.sub(
                r"\.(h5ad|h5|hdf5|zarr|zarr\.zip|soma|arrow|dataset)$",
                "",
                uri.rstrip("/").rsplit("/", 1)[-1].removeprefix("resource:"),
            )
            name = source.name if source.name and len(uris) == 1 else "-".join(filter(None, (source.name, stem)))
            out.append(replace(source, uri=uri, name=name))
    if not out:
        msg = "sources = (): must name at least one file of counts with its species, for example: mixgf prepare human=cells.h5ad"
        raise UserError(msg)
    for name, times in Counter(s.name for s in out).items():
        if times > 1:
            msg = f"sources.name = {name!r}: used by {times} sources; give each a name of its own (sources[i].name)"
            raise UserError(msg)
    return tuple(out)
