"""Expressions over obs: they choose the cells that they name, run no code, and what cannot be meant is refused in one line."""

import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mixgf
from mixgf.config import parse, recipes
from mixgf.config.expressions import parse_expression
from mixgf.corpus import obs_query
from mixgf.errors import UserError

OBS = pd.DataFrame(
    {
        "cell_type": ["alpha", "beta", "alpha", None, "ductal"],
        "donor": pd.Categorical(["d1", "d1", "d2", "d2", "d3"]),
        "n_counts": [100, 200, 300, 400, 500],
        "mito": np.array([0.1, 0.2, np.nan, 0.4, 0.5], dtype=np.float32),
        "leiden": ["0", "1", "1", "10", None],
        "primary": [True, False, True, None, False],
        "Cell Type": ["a b", "it's", 'say "x"', "`", "日本"],
        "class": ["x", "y", "x", "y", "x"],
        "percent.mt": [1, 2, 3, 4, 5],
        "Zell-Typ β": ["p", "q", "p", "q", "p"],
        "a`b": [1, 1, 2, 2, 3],
        "mixed": ["1", 2, None, 3.5, "x"],
    }
)


@pytest.mark.parametrize(
    ("expression", "cells"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("cell_type == 'alpha'", [0, 2]),
        ("'alpha' == cell_type", [0, 2]),
        ("cell_type == 'alpha' and donor != 'd1'", [2]),
        ("(cell_type == 'alpha') & ~(donor == 'd1')", [2]),
        ("cell_type == 'alpha' & donor == 'd1' | donor == 'd3'", [0, 4]),
        ("cell_type in ['beta', 'ductal'] or n_counts > 350", [1, 3, 4]),
        ("cell_type == ('beta', 'ductal',)", [1, 4]),
        ("cell_type not in ['alpha']", [1, 3, 4]),
        ("cell_type != 'alpha'", [1, 3, 4]),
        ("not (donor == 'd1')", [2, 3, 4]),
        ("not not donor == 'd1'", [0, 1]),
        ("100 < n_counts <= 300", [1, 2]),
        ("200.0 == n_counts or n_counts > 499.5", [1, 4]),
        ("n_counts > -1", [0, 1, 2, 3, 4]),
        ("n_counts < 36893488147419103232", [0, 1, 2, 3, 4]),
        ("n_counts >= 1e30 or donor == 'd3'", [4]),
        ("mito == 0.1", [0]),
        ("mito >= 0.4", [3, 4]),
        ("not mito >= 0.4", [0, 1, 2]),
        ("mito == mito", [0, 1, 3, 4]),
        ("mito != mito", [2]),
        ("mito < n_counts", [0, 1, 3, 4]),
        ("leiden == '1'", [1, 2]),
        ("leiden < '10'", [0, 1, 2]),
        ("primary", [0, 2]),
        ("not primary", [1, 3, 4]),
        ("primary == False", [1, 4]),
        ("primary == 1", [0, 2]),
        ("`Cell Type` == 'a b'", [0]),
        ("`Cell Type` in [\"it's\", 'say \"x\"', '`']", [1, 2, 3]),
        ("`Cell Type` == '\\u65e5本'", [4]),
        ("`class` == 'x' and class == 'x'", [0, 2, 4]),
        ("`percent.mt` > 3", [3, 4]),
        ("`Zell-Typ β` == 'q'", [1, 3]),
        ("`a``b` == 2", [2, 3]),
        ("mixed in ['1', '2']", [0, 1]),
    ],
)
def test_expressions_choose_the_cells_that_they_name(expression, cells):
    assert obs_query.select_cells(OBS, expression, "perturb.start").tolist() == cells


def test_expressions_of_plain_names_choose_what_pandas_chooses(capsys):
    """Random expressions of depth 3 over columns with and without missing values, against `DataFrame.eval`."""
    draw = np.random.default_rng(7)
    n = 60
    obs = pd.DataFrame(
        {
            "kind": draw.choice(np.array(["a", "b", "c", None], dtype=object), n),
            "batch": pd.Categorical(draw.choice(["x", "y"], n)),
            "num": draw.integers(0, 5, n),
            "share": np.where(draw.random(n) < 0.2, np.nan, draw.integers(0, 4, n) / 4).astype(np.float32),
        }
    )

    def term():
        which = draw.integers(0, 6)
        if which == 0:
            return f"kind {draw.choice(['==', '!='])} '{draw.choice(['a', 'b', 'c'])}'"
        if which == 1:
            return f"kind {draw.choice(['in', 'not in'])} ['a', '{draw.choice(['b', 'c'])}']"
        if which == 2:
            return f"batch == '{draw.choice(['x', 'y'])}'"
        if which == 3:
            return f"{draw.integers(0, 3)} {draw.choice(['<', '<='])} num < {draw.integers(2, 5)}"
        name, value = ("num", draw.integers(0, 5)) if which == 4 else ("share", draw.integers(0, 4) / 4)
        return f"{name} {draw.choice(['==', '!=', '<', '<=', '>', '>='])} {value}"

    def any_of(depth):
        if not depth or draw.random() < 0.2:
            return term()
        if draw.random() < 0.25:
            return f"{draw.choice(['not ', '~'])}({any_of(depth - 1)})"
        sign = draw.choice(["and", "or", "&", "|"])
        return f"({any_of(depth - 1)}) {sign} ({any_of(depth - 1)})"

    chosen = 0
    for _ in range(300):
        expression = any_of(3)
        expected = np.flatnonzero(obs.eval(expression, engine="python").to_numpy()).tolist()
        if expected:
            assert obs_query.select_cells(obs, expression, "f").tolist() == expected, expression
            chosen += 1
    assert chosen > 200


@pytest.mark.parametrize(
    "expression",
    [
        "cell_type.__class__.__mro__[1].__subclasses__()",
        "cell_type.str.contains('alpha')",
        "cell_type.map(lambda x: x)",
        "@pd.eval('1')",
        "@__builtins__",
        "__import__('os').system('touch PWNED') == 0",
        "open('PWNED', 'w')",
        "cell_type.to_csv('PWNED')",
        "`cell_type`.to_csv('PWNED')",
        "(cell_type).to_csv('PWNED')",
        "('x').format(cell_type)",
        "cell_type == 'a'.upper()",
        "cell_type[0] == 'alpha'",
        "cell_type['x'] == 1",
        "[c for c in cell_type]",
        "(lambda: 1)()",
        "(x := 1) == 1",
        "f'{cell_type}' == 'a'",
        "b'a' == cell_type",
        "n_counts + 1 > 2",
        "n_counts ** 9 ** 9 ** 9 > 1",
        "n_counts.values.tofile('PWNED')",
        "cell_type if primary else donor",
        "primary; import os",
        "primary\nimport os",
        "cell_type == 'alpha' #",
        "cell_type == 'alpha",
        "`cell_type == 'alpha'",
        "``==1",
        "cell_type = 'alpha'",
        "cell_type === 'alpha'",
        "cell_type ==",
        "== 'alpha'",
        "'alpha'",
        "1 == 1",
        "True",
        "cell_type in 'alpha'",
        "'alpha' in cell_type",
        "cell_type in []",
        "cell_type in [donor]",
        "cell_type in ['alpha' 'beta']",
        "cell_type < ['alpha']",
        "Cell Type == 'a b'",
        "percent.mt > 3",
        "cell_type == 'alpha' and",
        "(cell_type == 'alpha'",
        "cell_type == 'alpha')",
        "n_counts > 1__0e",
        "n_counts > 0x10",
        "cell_type is None",
        "cell_type == None",
        "cell_type <> 'alpha'",
        "cell_type == 'alpha' && primary",
        "!primary",
        "cell_type == '\\N{nonsense}'",
        "\0",
        "(" * 5000 + "primary" + ")" * 5000,
        "not " * 60_000,
        "~" * 60_000 + "(" * 60_000,
        "x" * 60_000,
        "cell_type == '" + "x" * 60_000 + "'",
        "9" * 60_000 + " == n_counts",
        "x" * 200_000,
        "n_counts",
        "cell_type",
        "cell_type == 1",
        "cell_type != 1",
        "cell_type > 3",
        "n_counts == '100'",
        "n_counts < 'b'",
        "primary == 'True'",
        "primary == 2",
        "n_counts == cell_type",
    ],
)
def test_what_is_no_expression_is_refused_in_one_short_line_and_runs_nothing(expression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^perturb\.start") as refusal:
        obs_query.select_cells(OBS, expression, "perturb.start")
    line = str(refusal.value)
    assert "\n" not in line
    assert len(line) < 600, line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("tissue == 'x'", r"no column tissue; columns: cell_type, donor, n_counts"),
        ("celltype == 'alpha'", r"no column celltype; did you mean cell_type"),
        ("`cell type` == 'alpha'", r"did you mean .*`Cell Type`"),
        ("cell_type == 'alfa'", r"cell_type has no value 'alfa'; did you mean one of alpha"),
        ("cell_type != 'alfa'", r"cell_type has no value 'alfa'"),
        ("cell_type not in ['alpha', 'bta']", r"cell_type has no value 'bta'; did you mean one of .*beta"),
        ("cell_type in ['alpha', 'bta']", r"cell_type has no value 'bta'; did you mean one of .*beta"),
        ("`Cell Type` != 'a  b'", r"`Cell Type` has no value 'a  b'; did you mean one of a b"),
        ("cell_type == 'beta' and donor == 'd3'", r"no cell of the corpus fits"),
        ("leiden == 1", r"leiden holds text, write leiden == '1'"),
        ("leiden in [1, 10]", r"leiden holds text, write leiden in \['1'\]"),
        ("n_counts == '100'", r"n_counts holds numbers, write n_counts == 100"),
        ("cell_type = 'alpha'", r"write == for equal"),
        ("Cell Type == 'a b'", r"stands in backticks, for example `cell type`"),
        ("percent.mt > 3", r"stands in backticks, for example `cell type` or `percent.mt`"),
        ("cell_type.isin(['alpha'])", r"methods cannot be used"),
        ("len(cell_type) == 1", r"functions and subscripts cannot be used"),
        ("n_counts + 1", r"arithmetic \(\+\) cannot be used"),
        ("n_counts", r"n_counts must be true or false for each cell"),
    ],
)
def test_a_refusal_names_the_way_out(expression, message):
    with pytest.raises(UserError, match=message):
        obs_query.select_cells(OBS, expression, "perturb.start")


def test_a_number_that_no_cell_has_is_said(caplog):
    assert obs_query.select_cells(OBS, "n_counts != 7", "perturb.start").tolist() == [0, 1, 2, 3, 4]
    assert "perturb.start: no cell has n_counts == 7" in caplog.text


@pytest.mark.parametrize("column", OBS.columns)
def test_every_value_of_every_column_can_be_chosen_by_its_text(column):
    for text in OBS[column].dropna().astype(str).unique():
        chosen = obs_query.select_cells(OBS, obs_query.equals(OBS, column, text), "f")
        assert (OBS[column].astype(str)[chosen] == text).all()
        assert len(chosen) == (OBS[column].astype(str) == text).sum()


@pytest.mark.parametrize(
    "setting",
    [
        "perturb.start={}",
        "perturb.goal={}",
        'perturb.alternatives=["{}"]',
        "classify.cells={}",
        'compare.shifts=[{{"name": "s", "before": "{}", "after": null}}]',
        'compare.shifts=[{{"name": "s", "before": "a == 1", "after": "{}"}}]',
    ],
)
def test_a_setting_that_is_no_expression_is_refused_with_the_config(setting):
    name = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{name}.*cannot be used"):
        parse.override(recipes.get("laptop"), [setting.format("cell_type.to_csv('PWNED')")])
    parse.override(recipes.get("laptop"), [setting.format("`cell type` in ['a']")])


def test_no_module_evaluates_text():
    """Calls of eval, exec and DataFrame.eval with arguments (`Module.eval()` takes none)."""
    for path in sorted(Path(mixgf.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (node.args or node.keywords):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert called not in {"eval", "exec"}, f"{path}:{node.lineno}"


def test_parsed_expressions_are_equal_however_they_are_spelled():
    spellings = [
        "a == 1 and not b == 'x'",
        "a==1&~(b=='x')",
        '(`a` == 1) and (not (`b` == "x"))',
    ]
    assert len({parse_expression(text, "f") for text in spellings}) == 1
