"""Mutation testing: change one place of a module, run its tests, and see that one fails.

    python tests/mutants.py run --ledger mutants.jsonl --minutes 30   # goes on where the last run ended
    python tests/mutants.py report --ledger mutants.jsonl             # tried, killed, and every survivor with its line

A mutant differs from the module in one operator, comparison, constant, condition or argument. It is put in the module's place in
a forked process, so no file of the package changes. The program imports packages and modules once, and every mutant runs
only the tests in `TARGETS` (no Ray, no slow tests), until one fails. Mutants come in an order drawn from their hash, so
those tried first are a sample of all. A survivor is tried again after its tests have changed. Tests that failed for earlier
mutants of a module run first, then quick ones before slow ones.

`EQUIVALENT` lists mutants that no test can tell apart, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = {
    "stats/donors": ("stats/test_donors", "perturbation/test_gene_table"),
    "stats/intervals": ("stats/test_intervals", "classification/test_metrics", "perturbation/test_reference_genes"),
    "stats/rank_adjustment": ("stats/test_rank_adjustment", "stats/test_donors", "perturbation/test_gene_table"),
    "cells/qc": ("cells/test_qc", "stages/test_prepare_qc"),
    "cells/doublets": ("cells/test_qc", "stages/test_prepare_qc"),
    "training/losses": ("training/test_pretraining", "training/test_views", "training/test_parity"),
    "training/views": ("training/test_views", "training/test_neighbours", "training/test_pretraining"),
    "training/batch_plan": ("training/test_batch_plan", "training/test_neighbours", "corpus/test_reader"),
    "classification/splits": ("classification/test_splits", "classification/test_workspace"),
    "classification/metrics": ("classification/test_metrics",),
    "perturbation/operations": ("perturbation/test_operations", "perturbation/test_shift"),
    "perturbation/screen": ("perturbation/test_screen",),
    "perturbation/screen_selection": ("perturbation/test_screen_selection",),
    "perturbation/shift": ("perturbation/test_shift", "perturbation/test_gene_responses"),
}
"""Tests of each module; the file that fails most often comes first."""
HEAVY = (
    "numpy", "scipy.stats", "scipy.sparse", "scipy.special", "sklearn.linear_model", "torch", "polars", "pandas", "pyarrow.parquet",
    "anndata", "numba", "pytest", "pytest_timeout", "pandas.testing", "statsmodels.stats.multitest",
)  # fmt: skip
"""Third-party packages that are imported once, before the forks."""
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or,
    ast.Or: ast.And, ast.USub: ast.UAdd, ast.MatMult: ast.Mult,
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum", "argmin": "argmax",
    "argmax": "argmin", "floor": "ceil", "ceil": "floor", "sum": "mean", "mean": "sum", "std": "var", "var": "std",
}  # fmt: skip
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "stats/rank_adjustment",
        "num = max(2, min(num_matched, int((candidate_G & np.isfinite(column)).sum()) - 1))",
    ): "with so few genes there is no score",
    (
        "training/batch_plan",
        "body = body.reshape(num_batches, b)[generator.permutation(num_batches)].reshape(-2)",
    ): "NumPy takes any negative number for the rest",
    (
        "perturbation/shift",
        "sum_BD = torch.segment_reduce(hidden_TD.double(), 'sum', lengths=lengths_B, unsafe=True)",
    ): "0 is the default",
    (
        "perturbation/shift",
        "sum_BD = torch.segment_reduce(hidden_TD.double(), 'sum', lengths=lengths_B, axis=0, unsafe=False)",
    ): "the lengths are checked once more",
    (
        "perturbation/shift",
        "sum_BD = torch.segment_reduce(hidden_TD.double(), 'sum', lengths=lengths_B, axis=0)",
    ): "the lengths are checked once more",
    ("perturbation/screen", "_PROBE_ELEMENTS = 2 << 19"): "the number only bounds memory",
    ("perturbation/screen", "_PROBE_ELEMENTS = 1 << 20"): "the number only bounds memory",
    (
        "cells/qc",
        "return np.abs(values - mean) >= times * sd * (1 + 1e-12) + 1e-15",
    ): "no distance equals the bound, which has a margin for rounding",
    ("cells/qc", "bits = max(1, kept // SORTED_CELLS).bit_length()"): "the groups only bound memory",
    (
        "classification/metrics",
        "return ['unknown' if not np.isfinite(p) else 'tie' if p > SIGNIFICANT else 'win' if difference >= 0 else 'loss' for difference, p in zip(difference_T, p_T, strict=True)]",
    ): "a difference of 0 is not significant",
    ("perturbation/operations", "NO_GENE = -2"): "any negative number is no token",
    (
        "perturbation/screen",
        "return F.normalize(x_KD.double(), eps=1e-300) @ goal_D",
    ): "1 is the default",
    (
        "stats/rank_adjustment",
        "if not np.isfinite(size_G[own_G]).all():",
    ): "the fit has a value for every gene, or for none",
    (
        "training/batch_plan",
        "num_shards, num_species = (len(self.starts) - 1, int(species.max(initial=1)) + 1)",
    ): "a species without cells gets no visits and no share",
    (
        "training/views",
        "inputs, at, number = (tokens_T.copy(), np.empty(len(tokens_T) + 2, dtype=np.int32), np.int64(0))",
    ): "places behind the last one are not read",
    (
        "training/views",
        "keep = (out_T > 0) | ~np.repeat(found, np.diff(offsets))",
    ): "no sentence holds the padding, token 0",
    ("training/views", "if action <= 0.8:"): "no draw equals 0.8",
    ("training/views", "if action <= 0.9:"): "no draw equals 0.9",
    (
        "training/losses",
        "return (F.normalize(a_BD.float()) - F.normalize(b_BD.float(), dim=1)).square().sum(1).mean()",
    ): "1 is the default",
    (
        "training/losses",
        "return (F.normalize(a_BD.float(), dim=1) - F.normalize(b_BD.float())).square().sum(1).mean()",
    ): "1 is the default",
    ("training/losses", "z = F.normalize(torch.cat([a_BD, b_BD]).float())"): "1 is the default",
    ("training/losses", "z = F.normalize(a_BD.float())"): "1 is the default",
    (
        "cells/doublets",
        "detectable = float((result['doublet_scores_sim'] >= result['threshold']).mean())",
    ): "no score equals the threshold",
    ("cells/qc", "shift = np.uint64(65 - bits)"): "the groups only bound memory",
    ("stats/donors", "size = int(code_P.max(initial=0)) + 2"): "the number only keeps keys apart",
    ("stats/donors", "low, high = (0.0, 16.0)"): "the bisection ends within .02 of the same effect",
    (
        "stats/donors",
        "return float(a @ b) / size if size > 1 else float('nan')",
    ): "five ranks that differ have a size above 1",
    ("stats/donors", "block = max(1, 20000001 // len(signs_RC))"): "the size of a block only bounds memory",
    ("stats/intervals", "return np.asarray((contents.T * drawn.T).T, dtype=np.int64)"): "* of a sparse matrix is @",
    ("stats/intervals", "below = 1 + (ranks[m:] - scipy_stats.rankdata(negative)) / m"): "only its variance is read",
    (
        "stats/rank_adjustment",
        "near = np.abs(dx) / np.where(far > 0, far * (1 + 2e-09), 1.0)",
    ): "the farthest gene has almost no weight",
    (
        "stats/rank_adjustment",
        "near = np.abs(dx) / np.where(far > 0, far * (1 + 1e-09), 2.0)",
    ): "0 divided by any number is 0",
    (
        "perturbation/shift",
        "after_SD, before_SD = (after_SD / after_S[:, None], before_SD * before_S[:, None])",
    ): "a cosine does not depend on the length of a vector",
    (
        "perturbation/shift",
        "after_SD, before_SD = (after_SD * after_S[:, None], before_SD / before_S[:, None])",
    ): "a cosine does not depend on the length of a vector",
    (
        "perturbation/shift",
        "lengths = (torch.diff(original.offsets_B1)[cells_S] - genes_SM.shape[1]).tolist()",
    ): "the lengths only bound the tokens of a pass",
    (
        "perturbation/shift",
        "return (sum_SD * (count_S > 0)[:, None], count_S.clamp(min=2))",
    ): "a cosine does not depend on the length of a vector",
    (
        "classification/metrics",
        "return {name: (of_model[name] - of_baseline[name]).mean(+1) for name in ('accuracy', 'macro_f1')}",
    ): "axis 1 is the last axis",
    ("stats/rank_adjustment", "rows = slice(start, start + 4097)"): "one row is computed twice, with the same result",
    ("cells/doublets", "called = score >= result['threshold']"): "no score equals the threshold",
    ("cells/qc", "bits = min(0, kept // SORTED_CELLS).bit_length()"): "the groups only bound memory",
    ("perturbation/screen", "none_moves = num_genes - 1 if step <= 0 else 0"): "a step is 1 or -1",
    ("perturbation/screen", "none_moves = num_genes - 1 if step < 1 else 0"): "a step is 1 or -1",
    (
        "training/views",
        "if i <= len(at_K) and at_K[i] == place:",
    ): "the value behind the end is the place by chance only",
    ("stats/rank_adjustment", "with np.errstate():"): "NumPy does not warn of comparisons with NaN",
    (
        "training/batch_plan",
        "rows = np.where(cut >= 0, lengths[cut], 0).reshape(-2, batch_cells)",
    ): "NumPy takes any negative number for the rest",
    (
        "training/views",
        "self.maps = {pair: table for pair, table in maps.items() if (table >= 1).any()}",
    ): "token 0 is no gene",
}
"""(module, line of the mutant) -> why it behaves as the module does."""

Mutant = tuple[str, str, int, str, str]
"""Id, kind, line, the line as it is and as it becomes."""


def mutants(source: str) -> Iterator[tuple[Mutant, Callable[[], str]]]:
    """Every mutant of a module, and a function that makes its source."""
    tree = ast.parse(source)
    for number, statement in enumerate(_statements(tree)):
        before, place = ast.unparse(statement), statement.lineno - _first(tree, statement)
        for k, node in enumerate(_nodes(statement)):
            for kind, change in _changes(node):
                twin = copy.deepcopy(statement)
                change(list(_nodes(twin))[k])
                after = ast.unparse(twin)
                if line := _differs(before, after):
                    digest = hashlib.sha256(f"{place}{before}{after}".encode()).hexdigest()[:12]
                    yield (digest, kind, node.lineno, *line), partial(_mutated, source, number, k, change)


def _mutated(source: str, number: int, k: int, change: Callable[[Any], None]) -> str:
    """A module with a change at node `k` of statement `number`."""
    tree = ast.parse(source)
    change(list(_nodes(_statements(tree)[number]))[k])
    return ast.unparse(tree)


def _first(tree: ast.Module, statement: ast.stmt) -> int:
    """First line of the function or class at the top level that holds a statement: moved code keeps its ids."""
    return max(top.lineno for top in tree.body if top.lineno <= statement.lineno)


def _differs(before: str, after: str) -> tuple[str, str] | None:
    """The first line that differs, before and after; None if none does."""
    old, new = before.splitlines(), after.splitlines()
    return next(((a.strip(), b.strip()) for a, b in zip(old, new, strict=False) if a != b), None)


def _statements(tree: ast.AST) -> list[ast.stmt]:
    """Statements that compute something: no docstrings, imports, assertions, or errors for users."""
    skipped = (ast.Import, ast.ImportFrom, ast.Assert, ast.Raise, ast.FunctionDef, ast.ClassDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not isinstance(node, skipped):
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            if not text and not types and names not in (["msg"], ["__all__"]):
                found.append(node)
    return found


def _nodes(statement: ast.stmt) -> Iterator[ast.expr | ast.stmt]:
    """The statement and its expressions, without annotations, texts and the statements inside of it."""
    yield statement
    rest: list[ast.AST] = [
        child
        for name, value in ast.iter_fields(statement)
        if name not in {"annotation", "type_comment"}
        for child in (value if isinstance(value, list) else [value])
        if isinstance(child, ast.AST) and not isinstance(child, ast.stmt)
    ]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.JoinedStr | ast.ExceptHandler | ast.Lambda):
            continue
        if isinstance(node, ast.expr):
            yield node
        rest.extend(ast.iter_child_nodes(node))


def _changes(node: Any) -> Iterator[tuple[str, Any]]:
    """Kinds of change at a node, and the function that makes each in a copy of it."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield "comparison", lambda n: setattr(n, "ops", [SWAPS[type(n.ops[0])]()])
        if isinstance(node.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE):
            turned = ast.Gt if isinstance(node.ops[0], ast.Lt | ast.LtE) else ast.Lt
            yield "comparison turned", lambda n: setattr(n, "ops", [turned()])
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp | ast.UnaryOp) and type(node.op) in SWAPS:
        yield "operator", lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", lambda n: setattr(n, "value", n.value + 1 if isinstance(n.value, int) else n.value * 2 or 1.0)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
        yield "name", lambda n: setattr(n, "id", NAMES[n.id])
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield "name", lambda n: setattr(n, "attr", NAMES[n.attr])
    if isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            if keyword.arg and keyword.arg not in {"dtype", "strict", "kind", "device"}:  # tests have the CPU only
                yield "argument", lambda n, i=i: n.keywords.pop(i)
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "statement", _replace_by_pass


def _replace_by_pass(node: Any) -> None:
    """Make a statement do nothing, in place."""
    node.__class__ = ast.Pass
    for name in ("value", "target", "op"):
        with contextlib.suppress(AttributeError):
            delattr(node, name)


@dataclass
class Order:
    """Pytest plugin: runs tests in a given order, and writes how long each took."""

    first: list[str]
    """Ids of tests that run before the others."""
    seconds: dict[str, float]
    """How long tests take; those that take less run earlier."""
    out: Path
    """JSON file for what each test took."""
    took: Counter[str] = field(default_factory=Counter)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests."""
        place = {name: i for i, name in enumerate(self.first)}
        items.sort(key=lambda item: (place.get(item.nodeid, len(place)), self.seconds.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up setup, call and teardown."""
        self.took[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self.out.write_text(json.dumps(self.took))


def run_tests(
    module: str, code: str, limit: float, first: list[str], seconds: dict[str, float]
) -> tuple[str, str, dict[str, float]]:
    """Run the tests of a module in a forked process, with other code in its place.

    Args:
        module: Key of `TARGETS`.
        code: Source that takes the module's place.
        limit: Seconds until the process is ended.
        first: Ids of tests that run before the others.
        seconds: How long each test takes, as far as known.

    Returns:
        `passed`, `failed` or `timeout`; the first failing test; and how long each test took.
    """
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        log, took = Path(folder) / "log", Path(folder) / "took.json"
        child = os.fork()
        if child == 0:
            _child(module, code, Path(folder), log, Order(first, seconds, took))
        end = time.monotonic() + limit
        outcome = "timeout"
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                outcome = "passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what the tests started
        if outcome == "timeout":
            os.waitpid(child, 0)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        durations = json.loads(took.read_text()) if took.exists() else {}
    failing = next((line for line in lines if line.startswith(("FAILED ", "ERROR "))), "")
    by = failing.removeprefix("FAILED ").split(" - ")[0] or ("" if outcome == "passed" else " ".join(lines[-1:]))
    return outcome, by, durations


def _child(module: str, code: str, folder: Path, log: Path, order: Order) -> None:
    """The forked process: never returns."""
    os.setsid()
    os.chdir(ROOT)
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    path = folder / "mutant.py"  # numba keeps compiled code by path
    path.write_text(code)
    _put_in_place(f"mixgf.{module.replace('/', '.')}", compile(code, str(path), "exec"))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins and rewritten assertions take longer than most tests
    options = [
        "-x", "-m", "not ray and not slow and not gpu", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--assert=plain", "--tb=no",
        f"--basetemp={folder / 'tmp'}",
    ]  # fmt: skip
    tests, status = [f"tests/{name}.py" for name in TARGETS[module]], 3
    with contextlib.suppress(BaseException):
        for part in filter(None, (tests[:1], tests[1:])):  # other files are imported only if the first finds nothing
            status = int(pytest.main([*part, *options], plugins=[order]))
            if status:
                break
    os._exit(status)


def _put_in_place(name: str, code: CodeType) -> None:
    """Run other code in a module, and give its functions and constants to the modules that imported the old ones."""
    module = sys.modules[name]
    old = dict(vars(module))
    exec(code, vars(module))
    new = vars(module)
    own = {id(value): key for key, value in old.items() if getattr(value, "__module__", None) == name}
    for other in list(sys.modules.values()):
        if other is module or not (getattr(other, "__name__", "") or "").startswith("mixgf"):
            continue
        for key, value in list(vars(other).items()):
            of = own.get(id(value), key)  # under its own name, or another
            if of in old and value is old[of]:
                setattr(other, key, new[of])


def preload(modules: Iterable[str]) -> None:
    """Import the tested modules, and the others that their tests import, before the forks."""
    names = {f"mixgf.{module.replace('/', '.')}" for module in modules}
    for file in {f"tests/{name}.py" for module in modules for name in TARGETS[module]}:
        for node in ast.parse((ROOT / file).read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mixgf"):
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in sorted(names):
        if not name.startswith(("mixgf.distributed", "mixgf.tracking")):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def tests_digest(module: str) -> str:
    """Hash of the tests of a module."""
    files = [ROOT / "tests" / f"{name}.py" for name in TARGETS[module]]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def read(ledger: Path) -> dict[str, dict[str, Any]]:
    """The last result of every mutant."""
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return {entry["id"]: entry for entry in map(json.loads, lines)}


def all_mutants(only: list[str]) -> list[tuple[str, Mutant, Callable[[], str]]]:
    """Module, mutant and the maker of its code, in the order in which they are tried."""
    found = [
        (module, mutant, code)
        for module in TARGETS
        if not only or module in only
        for mutant, code in mutants((ROOT / "mixgf" / f"{module}.py").read_text())
    ]
    return sorted(found, key=lambda one: one[1][0])


def durations(module: str, where: Path) -> dict[str, float]:
    """Seconds of each test of a module, which run once with its own code put in place; all must pass.

    Args:
        module: Key of `TARGETS`.
        where: JSON file in which they are kept, so that they are not measured again before a test or the module changes.
    """
    known = json.loads(where.read_text()) if where.exists() else {}
    source = (ROOT / "mixgf" / f"{module}.py").read_bytes()
    digest = tests_digest(module) + hashlib.sha256(source).hexdigest()[:12]
    if module not in known or known[module]["of"] != digest:
        old = known.get(module, {"seconds": {}})["seconds"]
        outcome, failing, seconds = run_tests(module, source.decode(), 600, [], old)
        assert outcome == "passed", f"{module}: without a mutant the tests fail: {failing}"
        known[module] = {"of": digest, "seconds": seconds}
        where.write_text(json.dumps(known))
    return known[module]["seconds"]


def run(ledger: Path, minutes: float, only: list[str]) -> None:
    """Try mutants that have no result yet, until the time is up."""
    for name in HEAVY:
        importlib.import_module(name)
    preload(only or TARGETS)
    end, done = time.monotonic() + minutes * 60, read(ledger)
    seconds: dict[str, dict[str, float]] = {}
    killers = {module: Counter[str]() for module in TARGETS}
    for ident, entry in done.items():
        if "::" in entry["by"]:
            killers[ident.split(":")[0]][entry["by"]] += 1
    for module, (ident, kind, line, before, after), code in all_mutants(only):
        old = done.get(f"{module}:{ident}")
        known = (module, after) in EQUIVALENT or (old is not None and old["tests"] == tests_digest(module))
        if old is not None and (old["outcome"] != "passed" or known):
            continue
        if time.monotonic() > end:
            break
        if module not in seconds:
            seconds[module] = durations(module, ledger.with_suffix(".seconds.json"))
        start = time.monotonic()
        limit = 3 * sum(seconds[module].values()) + 30
        first = [name for name, _ in killers[module].most_common(6)]
        outcome, failing, _ = run_tests(module, code(), limit, first, seconds[module])
        entry = {
            "id": f"{module}:{ident}", "outcome": outcome, "kind": kind, "line": line, "before": before, "after": after, "by": failing,
            "seconds": round(time.monotonic() - start, 1), "tests": tests_digest(module),
        }  # fmt: skip
        if "::" in failing:
            killers[module][failing] += 1
        with ledger.open("a") as out:
            out.write(json.dumps(entry) + "\n")
        print(f"{outcome:8s} {module}:{line}: {before}  ->  {after}", flush=True)


def report(ledger: Path) -> None:
    """Print how many mutants were tried and killed, by module, and the survivors."""
    known = {f"{module}:{mutant[0]}": module for module, mutant, _ in all_mutants([])}
    found = {ident: entry for ident, entry in read(ledger).items() if ident in known}  # of the code as it is
    tried, lived = Counter(known[i] for i in found), Counter[str]()
    for ident, entry in sorted(found.items(), key=lambda one: (known[one[0]], one[1]["line"])):
        if entry["outcome"] == "passed":
            why = EQUIVALENT.get((known[ident], entry["after"]))
            lived[known[ident]] += why is None
            print(
                f"{known[ident]}:{entry['line']}: {entry['before']}  ->  {entry['after']}"
                + (f"  [{why}]" if why else "")
            )
    total = Counter(known.values())
    for module in TARGETS:
        print(f"{module:34s} {tried[module]:4d} of {total[module]:4d} tried, {lived[module]:3d} survived")
    number, alive = sum(tried.values()), sum(lived.values())
    print(
        f"{number} of {len(known)} tried, {number - alive} killed or equivalent ({1 - alive / max(number, 1):.1%}), {alive} survived"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--ledger", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", nargs="*", default=[], help="modules, such as stats/donors")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if options.command == "run":
        run(options.ledger, options.minutes, options.only)
    else:
        report(options.ledger)


if __name__ == "__main__":
    main()
