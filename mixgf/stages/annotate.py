"""`annotate`: a user's cells labelled by a kept classifier, one task per row range.

Parts lie beside the output until it is written, so a killed command continues.
"""

from __future__ import annotations

import os
from typing import Any

from mixgf.classification import annotate, kept_classifier
from mixgf.classification.annotate import Extras
from mixgf.config import parse
from mixgf.config.data import Source
from mixgf.config.run import Config
from mixgf.errors import UserError
from mixgf.execution import Executor, LocalExecutor, Task
from mixgf.stages.fan_out import fan_out, missing
from mixgf.storage import files, layout, tables

PART_CELLS = 2_000
FEW_CELLS = 10_000
"""Most cells that a classifier without an encoder labels in this process, in less time than Ray takes to start."""


def run(
    model: str, source: Source, to: str, settings: Config, *, extras: Extras | None = None, executor: Executor | None = None
) -> dict[str, Any]:  # fmt: skip
    """Label all cells of `source` and write `to`; returns what was found.

    `executor` runs the tasks; None = Ray, or this process for few cells (`FEW_CELLS`) where RAY_ADDRESS names no cluster.

    Raises:
        UserError: no such classifier or file, or a file that cannot be read.
    """
    if not to.endswith((".h5ad", ".parquet", ".csv")):
        msg = f"--output {to}: must end in .h5ad, .parquet or .csv"
        raise UserError(msg)
    if files.is_same(to, source.uri):
        msg = f"--output {to}: is the input itself, which stays as it is; name another file"
        raise UserError(msg)
    if files.exists(to) and not annotate.is_own(to):
        msg = f"--output {to}: is there and was not written by `mixgf annotate`; name another file, or move it away"
        raise UserError(msg)
    uri = kept_classifier.find(model)
    kept, vocabulary, record = kept_classifier.load(uri)
    extras = extras or Extras()
    ids = extras.ids(kept)
    file = annotate.look(source, kept, vocabulary)
    key = parse.fingerprint(
        [
            record.fingerprint,
            record.files,
            parse.to_dict(file.source),
            extras.majority,
            files.sha256(source.uri) if not files.is_folder(source.uri) else "",
        ]
    )
    work = f"{to}.parts-{key[:12]}"
    layout.require_own(work, layout.ANNOTATION)
    form = files.join(work, "form")
    first = Task(
        part=files.join(form, kept_classifier.LAST_FILE),
        function=annotate.write_form,
        args=(uri, file, form),
        kwargs={"axes": extras.majority},
        weight=1,
    )
    tasks = []
    for start in range(0, file.num_cells, PART_CELLS):
        stop, part = min(start + PART_CELLS, file.num_cells), files.join(work, f"{start:010d}.parquet")
        plan = annotate.LabelPlan(model=form, version=key, file=file, start=start, stop=stop, to=part)
        tasks.append(Task(part=part, function=annotate.label_cells, args=(plan,), weight=stop - start))
    if missing([first, *tasks]):
        executor = executor or _executor(settings, few=kept.encoder is None and file.num_cells <= FEW_CELLS)
        with executor.session():
            fan_out("annotate: alignment to the file", [first], executor.run)
            fan_out("annotate", tasks, executor.run, unit="cells")
    kept, _ = kept_classifier.read(form)
    table = extras.add(annotate.frame([tables.read_table(task.part) for task in tasks]), kept, ids)
    found = annotate.summary(uri, kept, file, table)
    annotate.write(to, file.source, table, kept.classes, annotate.facts(found))
    layout.remove_own(work, layout.ANNOTATION)
    return found | {"output": to}


def _executor(settings: Config, *, few: bool) -> Executor:
    """This process for few cells, if no cluster is named; else Ray, which takes seconds to import and to start."""
    if few and "RAY_ADDRESS" not in os.environ:
        return LocalExecutor()
    from mixgf.distributed.executor import RayExecutor

    return RayExecutor(settings)
