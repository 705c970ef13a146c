"""The commands that read one file (annotate, embed, audit) read, doubt and refuse it as `mixgf prepare` does, in their own spelling.

The model is the bundled one, so that the commands are those of a new user.
"""

import logging
import re

import numpy as np
import pandas as pd
import pytest

from mixgf import cli
from tests.field import make_cases
from tests.field import test_cases as cases_of
from tests.field import test_more_members as members

MODEL = "pancreas"
QUICK = {
    "dots-for-dashes/in.h5ad", "numbers-for-index/in.h5ad", "citeseq-h5ad/in.h5ad", "nullable-string-index/in.h5ad", "big-endian/in.h5ad",
    "not-the-file/anndata.h5", "mtx-transposed/in", "raw with antibodies", "features numbered", "csc unsorted",
}  # fmt: skip
"""Files that are tried outside of the slow tests, too: one of each kind."""
FORMS = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in (*cases_of.READ, *members.READ)
]
ONLY_PREPARE = {"text-in-latin1/in.h5ad", "a column of two dimensions", "a column of complex numbers", "no counts at all", "a single gene", "numbers above 2**63"}  # fmt: skip
"""Refused for columns of obs, which are not read here, or by quality control."""
REFUSED = {name: text for name, text in (cases_of.REFUSED | {n: t for n, (_, t) in members.REFUSED.items()}).items() if name not in ONLY_PREPARE}  # fmt: skip
DOUBTED = {
    # what: (file, what is said)
    "a third unknown": ("a-third-unknown/in.h5ad", r"111 are no known human gene, with 36\.3% of the counts \(XYZ135\.0_q, .*end with '_q'"),
    "normalised and rounded": ("rounded-per-10k/in.h5ad", r"all cells have the same sum of counts \(10,000\): normalised and rounded"),
    "binarised": ("true and false", r"every count above 0 is 1: binarised"),
    "one byte": ("uint8 cut at 255", r"stored as uint8, which ends at 255"),
    "no counts": ("no counts at all", r"every count is 0: no molecules"),
    "dates": ("dates for symbols", r"4 of them are dates or exponents"),
    "antibodies": ("citeseq-h5ad/in.h5ad", r"6 features are no genes and are left out: 6 Antibody Capture"),
    "other spellings": ("dots-for-dashes/in.h5ad", r"6 names are read in another spelling: with dashes for dots"),
    "another column": ("numbers-for-index/in.h5ad", r"read from var\['feature_id'\], because the index has 0 known ones"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _log_as_before():
    log = logging.getLogger("mixgf")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture
def command(capsys):
    """A command in this process: its exit code, and what it printed to stderr."""

    def run(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return code, capsys.readouterr().err

    return run


def path_of(name, cases, folder):
    """A file by its name, and the options that its reading needs."""
    if (cases / name).exists():
        return cases / name, []
    make_file, *rest = (members.READ | members.DOUBTED | members.REFUSED)[name]
    settings = rest[-1] if isinstance(rest[-1], dict) else {}
    (folder / "files").mkdir()
    return make_file(folder / "files"), [w for k, v in settings.items() for w in (k.replace("sources__", "--"), v)]


def labels(command, path, options, to):
    code, err = command("annotate", path, "--model", MODEL, "--output", to, *options)
    assert code == 0, err
    return pd.read_parquet(to).drop(columns="cell"), err


@pytest.fixture(scope="module")
def good(cases, tmp_path_factory):
    to = tmp_path_factory.mktemp("good") / "good.parquet"
    assert cli.main(["annotate", str(cases / "machine/in.h5ad"), "--model", MODEL, "--output", str(to)]) == 0
    return pd.read_parquet(to).drop(columns="cell")


@pytest.mark.parametrize("name", FORMS)
def test_the_labels_are_those_of_the_good_file_whatever_its_form(name, cases, good, command, tmp_path):
    path, options = path_of(name, cases, tmp_path)
    found, _ = labels(command, path, options, tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(found, good, check_exact=True)


def of_one_file(text):
    """A refusal of prepare as the commands of one file say it."""
    text = text.replace(r"--set sources\.round=true", r"round them in the file first \(numpy\.rint\)")
    return re.sub(r"--set sources\\\.(\w+)=", r"--\1 ", text)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("which", ["annotate", "audit"])
def test_what_prepare_refuses_is_refused_in_the_same_words(which, name, cases, command, tmp_path):
    path, _ = path_of(name, cases, tmp_path)
    to = tmp_path / "out.parquet"
    words = {
        "annotate": ["annotate", path, "--model", MODEL, "--output", to],
        "audit": ["audit", f"human={path}", MODEL],
    }
    code, err = command(*words[which])
    line = err.splitlines()[-1]
    assert code == 2, err
    assert not to.exists()
    assert line.startswith("mixgf: ")
    assert path.name in line
    assert re.search(of_one_file(REFUSED[name]), line), line
    assert "sources" not in line.replace(str(tmp_path), ""), "a setting of prepare, which is no option here"
    assert not re.search(r"KeyError|ArrowInvalid|CSV parse|TypeError|ValueError|Traceback", err), err


@pytest.mark.parametrize("what", DOUBTED)
@pytest.mark.parametrize("which", ["annotate", "audit", "embed"])
def test_what_prepare_says_of_a_file_is_said(which, what, cases, command, tmp_path):
    name, said = DOUBTED[what]
    path, _ = path_of(name, cases, tmp_path)
    to = tmp_path / "out.h5ad"
    words = {
        "annotate": ["annotate", path, "--model", MODEL, "--output", to], "audit": ["audit", f"human={path}", MODEL],
        "embed": ["embed", path, "--model", MODEL, "--output", to],
    }  # fmt: skip
    code, err = command(*words[which])
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith(f"{path}: ")]
    assert any(re.search(said, line) for line in lines), err


def test_nothing_is_said_of_a_good_file(cases, command, tmp_path):
    path = cases / "machine/in.h5ad"
    for words in (
        ["annotate", path, "--model", MODEL, "--output", tmp_path / "a.csv"], ["audit", f"human={path}", MODEL],
        ["embed", path, "--model", MODEL, "--output", tmp_path / "e.h5ad"],
    ):  # fmt: skip
        code, err = command(*words)
        assert (code, str(path) in err) == (0, False), err


@pytest.mark.parametrize("name", ["rat-ids/in.h5ad", "small-letters/in.h5ad"])
def test_an_audit_without_known_genes_finds_nothing_out(name, cases, command):
    code, err = command("audit", f"human={cases / name}", MODEL)
    assert code == 2
    assert "none of 300 genes is a known human gene; names are like" in err


def test_an_audit_of_half_the_counts_finds_nothing_out(command, tmp_path):
    """Cells are compared by their counts on known genes."""
    names = [f"{name}{'_q' * (k % 3 < 2)}" for k, name in enumerate(make_cases.genes()[1])]
    make_cases.renamed(make_cases.cells(), names).write_h5ad(tmp_path / "in.h5ad")
    code, err = command("audit", f"human={tmp_path / 'in.h5ad'}", MODEL)
    assert code == 2
    assert re.search(
        r"only 3\d\.\d% of the counts are on known human genes; commonest unknown: .*end with '_q'.*: its cells cannot be compared",
        err,
    )


def test_the_ways_out_of_a_refusal_are_options_of_every_command(cases, command, tmp_path):
    """The layer with the counts, and the column with the right names, as the line says them."""
    log, rows = cases / "log-in-x-counts-in-a-layer/in.h5ad", cases / "ids-of-other-rows/in.h5ad"
    code, err = command("embed", log, "--model", MODEL, "--output", tmp_path / "no.h5ad")
    assert (code, err.strip().endswith("holds counts: --layer counts")) == (2, True), err
    for path, option in ((log, ["--layer", "counts"]), (rows, ["--genes", "index"])):
        for words in (
            ["embed", path, "--model", MODEL, "--output", tmp_path / "e.h5ad"], ["audit", f"human={path}", MODEL],
            ["annotate", path, "--model", MODEL, "--output", tmp_path / "a.csv"],
        ):  # fmt: skip
            code, err = command(*words, *option)
            assert code == 0, err


def test_a_file_without_cells_or_genes_is_called_empty(command, tmp_path):
    for k, part in enumerate((np.s_[:0], np.s_[:, :0])):
        path = tmp_path / f"{k}.h5ad"
        make_cases.cells()[part].copy().write_h5ad(path)
        for words in (
            ["annotate", path, "--model", MODEL], ["embed", path, "--model", MODEL], ["audit", f"human={path}", MODEL]
        ):  # fmt: skip
            code, err = command(*words)
            assert code == 2
            assert re.search(r"empty \(\d+ cells x \d+ genes\); give a file with counts", err), err
