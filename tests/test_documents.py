"""Documents tell what is there: their commands parse, their settings, files and links exist, and their sizes are bounded."""

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import mixgf
from mixgf import cli
from mixgf.config import parse
from mixgf.config.fields import facts_of
from mixgf.config.run import Config

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "jobs/README.md",
    "jobs/RESULTS.md",
    "cluster/README.md",
    "dashboards/README.md",
    "mixgf/README.md",
)
JOBS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs").glob("*.py"))
MADE = {
    "cluster/mixgf.env",
    "cluster/my-aws.yaml",
    "cluster/secrets/ray_token",
    "cluster/secrets/grafana_password",
    "jobs/NAME.py",
}
"""Paths that a reader makes."""
FIELDS = {section: set(facts_of(getattr(Config(), section))) for section in parse.sections()}
WITHOUT_CONFIG = ("inspect", "annotate", "audit", "push", "pull")

RECORDER = r"""
command_not_found_handle() { printf '%s\0' "$@" $'\n'; }
"""
"""With nothing on its PATH, bash hands every command that is not its own to this function, after all its quoting. One write
for each command: those behind `&` write at the same time."""


def text_of(path):
    """A document, or the docstring of a script."""
    text = (ROOT / path).read_text()
    return text if path.endswith(".md") else ast.get_docstring(ast.parse(text)) or ""


def blocks(path, language):
    """Code blocks of a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text_of(path), re.MULTILINE | re.DOTALL)


def examples(path):
    """Bash code of a document: its bash blocks, or the indented lines of a docstring that submit a job."""
    if path.endswith(".md"):
        return blocks(path, "bash")
    return re.findall(r"^ +(?:ray job submit|python jobs/).*\n(?: {8,}.*\n)*", text_of(path) + "\n", re.MULTILINE)


def commands(code, folder):
    """The words of each command that bash would run, with `mixgf` as first word where a job is submitted."""
    code = re.sub(r"\.venv/bin/", "", code)
    done = subprocess.run(
        ["/bin/bash", "-c", RECORDER + code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": "/none"},
        check=False,
    )
    assert "syntax error" not in done.stderr, done.stderr
    assert "unexpected" not in done.stderr, done.stderr
    for found in done.stdout.split("\n\0"):
        words = found.split("\0")[:-1]
        job = next((i for i, word in enumerate(words) if re.search(r"(^|/)jobs/\w+\.py$", word)), None)
        if words[:1] == ["mixgf"]:
            yield words
        elif job is not None and words[job - 1] == "python":
            script = ROOT / "jobs" / Path(words[job]).name
            assert script.exists(), words
            stage = re.search(r'main\(\["([\w-]+)"', script.read_text())
            if stage:
                yield ["mixgf", stage.group(1), *words[job + 1 :]]


def write_configs(folder):
    """The config files that the documents tell their reader to write."""
    guide = text_of("jobs/README.md")
    (mine,) = blocks("jobs/README.md", "json")
    (folder / "mine.json").write_text(mine)
    rat = parse.to_dict(Config())
    rat["species"].append(json.loads(re.search(r'\{"name": "rat".*?\}', guide, re.DOTALL).group()))
    (folder / "rat.json").write_text(json.dumps(rat))
    (folder / "screen.json").write_text("{}")
    best = folder / "runs" / "sweep" / "tune"
    best.mkdir(parents=True)
    (best / "best.json").write_text(json.dumps(parse.to_dict(Config())))


ALL_EXAMPLES = [
    pytest.param(code, id=f"{path}-{number}")
    for path in (*DOCUMENTS, *JOBS)
    for number, code in enumerate(examples(path))
    if "mixgf" in code or "jobs/" in code
]


@pytest.mark.parametrize("code", ALL_EXAMPLES)
def test_commands_of_documents_parse(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_configs(tmp_path)
    for _, name, *words in commands(code, tmp_path):
        if "--help" in words:
            assert name in cli.COMMANDS
        elif name in WITHOUT_CONFIG:
            cli._parser().parse_args([name, *words])
        else:
            assert cli.main([name, *words, "--print-config"]) == 0, capsys.readouterr().err
            assert json.loads(capsys.readouterr().out)


def test_examples_are_found():
    """Most examples lie in the guide, every stage's job has one, and a job's command is read with its quotes."""
    assert len(ALL_EXAMPLES) > 30
    jobs = {param.id.partition("-")[0] for param in ALL_EXAMPLES}
    assert {f"jobs/{name}.py" for name in ("prepare", "import_corpus", "pretrain", "tune", "report")} <= jobs
    code = "ray job submit --working-dir . -- \\\n  python jobs/embed.py --set 'a.b=c d'\ncp one two  # three\n"
    assert list(commands(code, ROOT)) == [["mixgf", "embed", "--set", "a.b=c d"]]


@pytest.mark.parametrize("path", ["README.md", "jobs/README.md"])
def test_python_names_of_documents_exist(path):
    """`mg.NAME` is public, and methods are those of the two classes."""
    for code in blocks(path, "python"):
        ast.parse(code)
    text = text_of(path)
    named = set(re.findall(r"\bmg\.(\w+)", text))
    assert {"load", "prepare"} <= named <= set(mixgf.__all__)
    for name, kind in (("encoder", mixgf.CellEncoder), ("classifier", mixgf.CellClassifier)):
        for method in re.findall(rf"\b{name}\.(\w+)\(", text):
            assert callable(getattr(kind, method)), f"{path}: {name}.{method}"


def code_words(path):
    """Inline code of a document, outside of its blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("path", [p for p in (*DOCUMENTS, *JOBS) if p != "CHANGELOG.md"])
def test_settings_named_in_documents_exist(path):
    text = " ".join(code_words(path)) if path.endswith(".md") else text_of(path)
    endings = r"(?!(?:py|md|json|parquet|png|yaml|h5ad|tsv|safetensors)\b)"
    for section, field in re.findall(rf"(?<![\w./-])({'|'.join(FIELDS)})\.{endings}(\w+)", text):
        assert field in FIELDS[section], f"{path}: {section}.{field}"


def test_settings_of_the_changelog_exist():
    """The last column of the table of renamed fields names present ones."""
    rows = re.findall(
        r"^\| `(\w+)(?:\[\])?\.(\w+)`(?:, `\w+\.\w+`)? \| .* \| (.*) \|$", text_of("CHANGELOG.md"), re.MULTILINE
    )
    assert len(rows) > 15
    for section, field, now in rows:
        renamed = re.match(r"`(\w+)\.(\w+)`", now)
        part, name = renamed.groups() if renamed else (section, field)
        assert part == "sources" or name in FIELDS[part], f"{part}.{name}"


@pytest.mark.parametrize("path", ["README.md", "jobs/README.md", *JOBS])
def test_files_named_as_outputs_are_written(path):
    """A file that a document names as an output stands in the code, or is a table of a name in the code."""
    code = "".join(p.read_text() for p in (ROOT / "mixgf").rglob("*.py")) + (ROOT / "cluster/sizes.py").read_text()
    given = {"rat_genes.parquet", "rat_mouse.parquet", "mine.json", "rat.json", "screen.json"}
    text = " ".join(code_words(path)) if path.endswith(".md") else text_of(path)
    for name in set(re.findall(r"(?<![\w./*-])(\w+\.(?:parquet|json|safetensors))\b", text)) - given:
        stem = name.rpartition(".")[0]
        assert f'{name}"' in code or f'"{stem}"' in code, f"{path}: {name}"


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(path)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (ROOT / path).parent / name if name else ROOT / path
        assert there.exists(), f"{path}: {target}"
        if anchor:
            assert anchor in anchors(there.resolve().relative_to(ROOT)), f"{path}: {target}"


@pytest.mark.parametrize("path", [*DOCUMENTS, *JOBS])
def test_paths_named_in_documents_exist(path):
    folders = "cluster|dashboards|jobs|tests|mixgf"
    found = re.findall(
        rf"(?<![\w./-])((?:{folders})/[\w./-]*\w\.(?:yaml|py|sh|json|md|example|txt|ipynb))\b", text_of(path)
    )
    for name in set(found) - MADE:
        assert (ROOT / name).exists(), f"{path}: {name}"


def test_modules_named_for_developers_exist():
    text = text_of("mixgf/README.md")
    named = {name for name in re.findall(r"`((?:\w+/)+\w+\.py)", text) if "NAME" not in name and "PACKAGE" not in name}
    assert len(named) > 5
    for name in named:
        assert (ROOT / "mixgf" / name).exists() or (ROOT / name).exists(), name


def test_the_tree_names_every_package():
    text = (ROOT / "mixgf" / "README.md").read_text()
    tree = text.partition("```\n")[2].partition("```")[0]
    listed = {
        word.rstrip("/") for line in tree.splitlines() for word in re.match(r"\S+(?: \S+\.py)*", line).group().split()
    }
    inside = {p.name for p in (ROOT / "mixgf").iterdir() if p.is_dir() and p.name != "__pycache__"}
    inside |= {p.name for p in (ROOT / "mixgf").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert listed == inside


def test_the_layers_in_the_readme_are_those_that_are_checked():
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"`{' > '.join(contract['layers'])}`" in (ROOT / "mixgf" / "README.md").read_text()


@pytest.mark.parametrize(("path", "most"), [("README.md", 150), ("mixgf/README.md", 200)])
def test_documents_stay_short(path, most):
    assert len((ROOT / path).read_text().splitlines()) <= most
