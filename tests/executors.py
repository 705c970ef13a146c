"""Executors that note, reorder or stop the tasks of a stage."""

from mixgf.execution import LocalExecutor, attempt


class Through(LocalExecutor):
    """A local executor whose `run` is the given function of tasks, which gives receipts."""

    def __init__(self, run):
        self.run = run


def backwards(tasks):
    """Run tasks from the last to the first."""
    for number in reversed(range(len(tasks))):
        yield attempt(number, tasks[number])


def refusing(tasks):
    """Fail if there is anything to run."""
    raise AssertionError(tasks)


def dying(after, calls):
    """An executor that notes the names of the functions it ran in `calls`, and dies when there are so many."""

    def run(tasks):
        for number, task in enumerate(tasks):
            if len(calls) >= after:
                raise KeyboardInterrupt
            calls.append(task.function.__name__)
            yield attempt(number, task)

    return Through(run)
