"""How every stage runs its tasks: those whose part is not there, with progress, metrics and refused sources.

A part that is there is not made again, so a stage killed at any moment goes on with the same command. Sources that a killed run
left out stay left out: parts are numbered without them, and the corpus is that of a run that was never killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from mixgf.console import Progress, debug, say, warn
from mixgf.distributed.metrics import Meter
from mixgf.errors import DamagedError, UserError
from mixgf.execution import Executor, Receipts, Task
from mixgf.storage import files, tables
from mixgf.storage.sealed import read_sealed, sealed_bytes
from mixgf.tracking.mlflow_runs import Pace, Run


def missing(tasks: Iterable[Task]) -> list[Task]:
    """Tasks whose files are not all there and whole, in order. Lists every folder of files once; removes what is damaged."""
    tasks = list(tasks)
    written = [(*task.also, task.part) for task in tasks]
    folders = {uri.rpartition("/")[0] for uris in written for uri in uris}
    there = {folder: set(files.list_dir(folder)) for folder in folders}
    return [task for task, uris in zip(tasks, written, strict=True) if not _is_done(uris, there)]


def _is_done(uris: Sequence[str], there: Mapping[str, set[str]]) -> bool:
    """Whether all files of a task are there and whole; if one is damaged, the part, which marks the task as done, is removed."""
    *also, part = uris
    folder, _, name = part.rpartition("/")
    if name not in there[folder]:
        return False
    for uri in (*also, part):
        folder, _, name = uri.rpartition("/")
        whole = name in there[folder] and tables.is_whole(uri)
        if not whole:
            warn(f"{uri}: {'damaged' if name in there[folder] else 'gone'}; it is made again")
            files.remove(part)
            return False
    return True


def raise_error(_: Task, error: str) -> None:
    """The error of a task ends the stage."""
    raise UserError(error)


def fan_out(
    what: str,
    tasks: Sequence[Task],
    run: Callable[[Sequence[Task]], Receipts],
    *,
    meter: Meter | None = None,
    tracked: Run | None = None,
    figures: Callable[[], dict[str, float]] = dict,
    unit: str = "core-s",
    counter: str = "",
    longest_first: bool = False,
    failed_before: int = 0,
    done: Callable[[Task, Any], None] = lambda *_: None,
    failed: Callable[[Task, str], None] = raise_error,
    leave_out: Callable[[Task, str], bool] = lambda *_: False,
    name: Callable[[Task], str] = lambda task: task.part,
) -> tuple[int, bool]:
    """Run the tasks whose part is not there.

    Args:
        what: name of the work in the progress.
        tasks: all tasks of the work; those that were done before count in the progress.
        run: `run` of an executor or of a pool.
        meter: records the numbers of tasks that wait, are done and failed.
        tracked: MLflow run that gets the progress, every ten seconds.
        figures: further figures for it, by name.
        unit: of the tasks' weights.
        counter: metric that counts the weights of finished tasks; empty = none.
        longest_first: order tasks by weight, then by part; else they stay in order.
        failed_before: tasks that failed in earlier work of the stage, for the meter.
        done: called in this process with every finished task and its result.
        failed: called with every task that has an error, and the error.
        leave_out: called with every task that was lost with its workers, and why; true = the stage goes on without it.
        name: what a task is called in an error.

    Returns:
        Number of tasks that finished now, and whether all parts are there now; not so if a task failed or `run` ended early.

    Raises:
        UserError: a task had an error, unless `failed` is given; or tasks were lost with their workers, after the others ended.
    """
    todo = missing(tasks)
    if longest_first:
        todo.sort(key=lambda task: (-task.weight, task.part))
    if not todo:
        return 0, True
    if len(todo) < len(tasks):
        say(f"{what}: {len(tasks) - len(todo):,} of {len(tasks):,} parts are there already")
    total = sum(task.weight for task in tasks)
    spent = total - sum(task.weight for task in todo)
    finished = failures = 0
    lost: list[str] = []
    pace = Pace(tracked, what.partition(": ")[2] or what, len(tasks), unit) if tracked is not None else None

    def tell(failing: int = 0) -> None:
        if meter is not None:
            number = failures + failing
            states = {"waiting": len(todo) - finished - number} | ({"done": finished} if finished else {})
            meter.units(**states, **({"failed": failed_before + number} if failed_before + number else {}))

    tell()
    with Progress(what, total, unit, done=spent) as progress, closing(run(todo)) as receipts:
        try:
            for receipt in receipts:
                task = todo[receipt.number]
                if receipt.error:
                    if receipt.lost and not leave_out(task, receipt.error):
                        lost.append(f"{name(task)}: {receipt.error}")
                    elif not receipt.lost:
                        failed(task, receipt.error)
                    failures += 1
                else:
                    done(task, receipt.result)
                    finished += 1
                    if meter is not None and counter:
                        meter.add(counter, task.weight)
                spent += task.weight
                progress.update(spent)
                tell()
                if pace is not None:
                    pace.update(len(tasks) - len(todo) + finished, spent, failures, figures)
        except Exception:
            tell(failing=1)
            raise
    if lost:
        msg = (
            f"{what}: {len(lost):,} of {len(todo):,} tasks were lost, for instance {lost[0]} (too little memory, or a library that crashes); "
            f"finished parts are kept, run it again"
        )
        raise UserError(msg)
    return finished, finished == len(todo)


@dataclass(kw_only=True)
class SourcePasses:
    """The passes of one stage over its sources. A source with an error is refused, and the others go on."""

    stage: str
    sources: Sequence[str]
    """URIs."""
    strict: bool
    """`prepare.strict`: the first source with an error stops the stage."""
    executor: Executor
    meter: Meter
    work: str
    """URI of the work folder, which keeps what runs have settled."""
    refused: dict[int, str] = field(default_factory=dict)
    """Error by source: the first in alphabetical order, so that records do not depend on the order of work."""
    settled: bool = False
    """Whether the refused sources are final; a later error of any source stops the stage."""
    _settled: dict[int, dict[int, str]] = field(default_factory=dict)
    """What the first run of the plan has left out, by step."""

    def run(
        self, what: str, tasks: Sequence[Task], unit: str = "cells", counter: str = "", *, step: int | None = None
    ) -> int:
        """Run the tasks of a pass whose part is not there.

        Args:
            what: name of the pass in the progress.
            tasks: of the pass.
            unit: of their weights.
            counter: metric that counts the weights.
            step: number of a pass that may leave out sources, on which later passes depend; ascending. What the first run of a
                plan has left out up to here stays left out. None = another pass.

        Returns:
            Number of tasks that finished now.
        """
        if step is not None:
            self._resume(step)
            tasks = [task for task in tasks if task.source not in self.refused]
        finished, _ = fan_out(
            f"{self.stage}: {what}", tasks, self.executor.run, meter=self.meter, unit=unit, counter=counter,
            failed_before=len(self.refused), failed=self._failed, leave_out=self._leave_out, name=self._name,
        )  # fmt: skip
        if step is not None:
            self._settle(step)
        return finished

    def _resume(self, step: int) -> None:
        """Leave out the sources that an earlier run has left out up to a step."""
        if not self._settled:
            self._settled = self._read_settled()
        again = {i: error for i, error in self._settled.get(step, {}).items() if i not in self.refused}
        for i, error in again.items():
            self.refuse(i, error)
        if again:
            say(
                f"{len(again):,} sources stay left out, as when {self.stage} was begun; remove the output to read them again"
            )

    def _read_settled(self) -> dict[int, dict[int, str]]:
        """What earlier runs have left out, by step. If it cannot be read, all parts are made again: they are numbered by it."""
        folder = files.join(self.work, "refused")
        names = files.list_dir(folder)
        try:
            found = {int(name.partition(".")[0]): read_sealed(files.join(folder, name)) for name in names}
        except DamagedError as error:
            warn(f"{error.args[0].partition(';')[0]}: all unfinished work is made again")
            files.remove(self.work)
            return {}
        return {step: {int(i): why for i, why in those.items()} for step, those in found.items()}

    def _settle(self, step: int) -> None:
        """Keep which sources are left out up to a step.

        Raises:
            UserError: this run has left out a source that the first one used.
        """
        if step not in self._settled:
            uri = files.join(self.work, "refused", f"{step:05d}.json")
            mine: dict[str, Any] = {str(i): error for i, error in self.refused.items()}
            found = mine if files.create_bytes(uri, sealed_bytes(mine)) else read_sealed(uri)
            self._settled[step] = {int(i): error for i, error in found.items()}
        for i, error in self.refused.items():
            if i not in self._settled[step]:
                raise UserError(error)
        self.refused = dict(self._settled[step])

    def _name(self, task: Task) -> str:
        return (
            task.part
            if task.source < 0
            else f"{self.sources[task.source]} (part {'/'.join(task.part.rsplit('/', 2)[-2:])})"
        )

    def _leave_out(self, task: Task, error: str) -> bool:
        """Refuse the source of a task that ended its worker each time: it may be damaged so that a library crashes."""
        if task.source < 0 or self.settled or self.strict:
            return False
        way = "damaged, or too large for the memory of compute.num_workers at a time; read it with anndata and write it again"
        self.refuse(task.source, f"{self.sources[task.source]}: {error}: {way}")
        return True

    def _failed(self, task: Task, error: str) -> None:
        line, _, trace = error.partition("\n")
        if trace:
            debug(trace)
        if task.source >= 0 and self.sources[task.source] not in line:
            line = f"{self.sources[task.source]}: {line}"
        if task.source < 0 or self.settled:
            if trace:  # what a source holds was checked before: an error of the program
                raise RuntimeError(line)
            # a task of no source reads only what mixgf wrote; the other parts stay
            raise DamagedError(line) if task.source < 0 else UserError(line)
        self.refuse(task.source, line)

    def refuse(self, index: int, error: str) -> None:
        """Leave a source out; a `UserError` if none is left, or if `strict`."""
        if self.strict:
            raise UserError(error)
        if index not in self.refused:
            warn(f"refused: {error}")
        self.refused[index] = min(self.refused.get(index, error), error)
        if len(self.refused) == len(self.sources):
            first = self.refused[min(self.refused)]
            several = f"all {len(self.refused)} sources are refused; the first: {first}"
            raise UserError(first if len(self.refused) == 1 else several)
