"""Laws of the command line: instant help, one-line refusals with exit code 2, printed configs that repeat the run."""

import json
import resource
import shlex
import subprocess
import sys

import pytest

from mixgf import cli
from mixgf.config import recipes
from mixgf.config.parse import from_dict, meanings, to_dict
from mixgf.config.run import Config


def mixgf(*argv):
    return subprocess.run(
        [sys.executable, "-m", "mixgf", *argv], capture_output=True, text=True, timeout=120, check=False
    )


def test_help_names_every_stage_and_imports_fast():
    mixgf("--help")  # warm the page cache
    seconds = []
    for _ in range(3):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = mixgf("--help")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    assert min(seconds) < 0.4  # of a processor: other work on the machine does not count


@pytest.mark.parametrize("stage", list(cli.STAGES))
def test_stage_help_lists_its_fields(stage):
    done = mixgf(stage, "--help")
    assert done.returncode == 0
    section = {
        "prepare": "qc.min_genes",
        "pretrain": "train.lr",
        "embed": "embed.pooling",
        "classify": "classify.label",
        "perturb": "perturb.goal",
    }
    assert section.get(stage, "--output") in done.stdout


def test_help_says_what_every_field_means():
    sections = {name: part for name, part in to_dict(Config()).items() if isinstance(part, dict)}
    assert set(meanings()) == {(name, field) for name, part in sections.items() for field in part}
    said = " ".join(mixgf("perturb", "--help").stdout.split())
    assert "perturb.rank_share = 0.25 How far inhibit and activate move a gene, as a share of the sentence." in said


@pytest.mark.parametrize("command", ["mixgf", *cli._EXAMPLES])
def test_every_example_of_the_help_is_a_command_with_settings_that_exist(command):
    text = cli._EPILOG if command == "mixgf" else cli._EXAMPLES[command]
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip().startswith("mixgf ")]
    assert lines
    for line in lines:
        args = cli._parser().parse_args(shlex.split(line)[1:])
        if args.command not in cli._OWN_ARGUMENTS:
            cli._config(args)
    assert text in mixgf(*[command] * (command != "mixgf"), "--help").stdout


def test_printed_config_is_the_run_again(tmp_path, capsys):
    assert (
        cli.main(["pretrain", "--recipe", "demo", "--set", "train.lr=0.002", "--output", "runs/a", "--print-config"])
        == 0
    )
    path = tmp_path / "mine.json"
    path.write_text(capsys.readouterr().out)
    config = from_dict(Config, json.loads(path.read_text()))
    assert (config.train.lr, config.output, config.model) == (0.002, "runs/a", recipes.get("demo").model)
    assert cli.main(["pretrain", "--config", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == path.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare", "--recipe", "nope"], "--recipe nope: no such recipe; there are default, demo"),
        (["prepare", "cells.h5ad"], "cells.h5ad: must look like SPECIES=URI, for example human=cells.h5ad"),
        (["prepare", "rat=cells.h5ad"], "sources[0].species = 'rat': must be one of 'human', 'mouse'"),
        (["pretrain", "--config", "missing.json"], "--config missing.json: no such file"),
        (["prepare", "human="], "human=: must look like SPECIES=URI, for example human=cells.h5ad"),
        (["pretrain", "--recipe", "tabl"], "--recipe tabl: no such recipe; did you mean 'table'? there are default"),
        (["pretrain", "--set", "trian.lr=1"], "no section 'trian'; did you mean 'train'? sections: qc"),
        (["pretrain", "--set", "train.lr=high"], "train.lr = 'high': must be a number"),
        (["pretrain", "--config", "x.json", "--recipe", "demo"], "cannot be given together with --recipe demo"),
        (["inspect", "nowhere"], "nowhere: no finished corpus (not there); run `mixgf prepare` first"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["pretrain", "--learning-rate", "1"],
            "unrecognized arguments: --learning-rate 1; settings are changed with --set",
        ),
        (["inspect"], "the following arguments are required: URI; see `mixgf inspect --help`"),
        (["prepar"], "prepar: no such command; did you mean 'prepare'? there are prepare, pretrain"),
    ],
)
def test_a_wrong_command_or_option_is_one_line(argv, message):
    done = mixgf(*argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_embed_keeps_its_input_under_every_name(tmp_path, capsys):
    (tmp_path / "cells.h5ad").write_bytes(b"counts")
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "cells.h5ad")
    for name in ("cells.h5ad", "link.h5ad"):
        argv = ["embed", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path), "--output", str(tmp_path / name)]
        assert cli.main(argv) == 2
        assert "is the input itself" in capsys.readouterr().err
    assert (tmp_path / "link.h5ad").read_bytes() == b"counts"


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out == mixgf("--help").stdout
