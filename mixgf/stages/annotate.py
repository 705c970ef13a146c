"""`annotate`: a user's cells labelled by a kept classifier, row range by row range, over Ray tasks.

Parts lie beside the output until it is written, so a killed command continues. All arithmetic is in `mixgf.annotate`.
"""

from __future__ import annotations

from typing import Any

from mixgf.classification import annotate, classifier
from mixgf.config import parse
from mixgf.config.data import Source
from mixgf.config.run import Config
from mixgf.console import Progress
from mixgf.distributed.tasks import Spread, job, ray_tasks
from mixgf.errors import UserError
from mixgf.storage import files, tables

PART_CELLS = 2_000


def run(model: str, source: Source, to: str, settings: Config, *, spread: Spread | None = None) -> dict[str, Any]:
    """Label all cells of `source` and write `to`; returns what was found. `spread` replaces Ray (`dispatch.loop` in tests).

    Raises:
        UserError: no such classifier or file, or a file that cannot be read.
    """
    if not to.endswith((".h5ad", ".parquet", ".csv")):
        msg = f"--output {to}: must end in .h5ad, .parquet or .csv"
        raise UserError(msg)
    if to == source.uri:
        msg = f"--output {to}: is the input itself, which stays as it is; name another file"
        raise UserError(msg)
    uri = classifier.find(model)
    kept, vocabulary, record = classifier.load(uri)
    file = annotate.look(source, kept, vocabulary)
    key = parse.fingerprint(
        [
            record.fingerprint,
            record.files,
            parse.to_dict(file.source),
            files.sha256(source.uri) if not files.is_folder(source.uri) else "",
        ]
    )
    work = f"{to}.parts-{key[:12]}"
    starts = range(0, file.num_cells, PART_CELLS)
    parts = {start: files.join(work, f"{start:010d}.parquet") for start in starts}
    todo = [s for s in starts if not files.exists(parts[s])]
    jobs = [
        job(
            0,
            min(PART_CELLS, file.num_cells - s),
            annotate.label,
            uri,
            file,
            s,
            min(s + PART_CELLS, file.num_cells),
            parts[s],
        )
        for s in todo
    ]
    if spread is not None:
        _spread(jobs, file.num_cells, spread)
    elif jobs:
        from mixgf.distributed.session import session

        with session(settings):
            _spread(jobs, file.num_cells, ray_tasks(settings))
    table = annotate.frame([tables.read_table(parts[s]) for s in starts])
    found = annotate.summary(uri, kept, file, table)
    annotate.write(to, file.source, table, kept.classes, annotate.facts(found))
    files.remove(work)
    return found | {"output": to}


def _spread(jobs: list[Any], total: int, spread: Spread) -> None:
    done = total - sum(j.weight for j in jobs)
    with Progress("annotate", total, "cells", done=done) as progress:
        for i, why in spread(jobs):
            if why:
                raise UserError(why)
            done += jobs[i].weight
            progress.update(done)
