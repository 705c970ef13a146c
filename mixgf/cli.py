"""The command line: `mixgf COMMAND`, one command per stage.

Nothing heavy is imported before a command runs. Exit codes:

| code | meaning |
|---|---|
| 0 | done |
| 1 | failed: an error of the program or of the machine |
| 2 | the input cannot be used; one line says why and what to do |
| 3 | done, but some sources were rejected |
| 130 | stopped with Ctrl-C |
| 143 | stopped by SIGTERM |
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from mixgf import console, termination
from mixgf.config import recipes
from mixgf.config.checks import did_you_mean, split_named
from mixgf.config.data import Source
from mixgf.config.fields import absolute, sections_of, with_absolute_paths
from mixgf.config.parse import from_dict, meanings, override, read_json, to_dict
from mixgf.config.run import Compute, Config
from mixgf.errors import AccessError, UserError, machine_fault
from mixgf.redact import redact

STAGES = {
    "prepare": "raw counts to a corpus: quality control, gene vocabulary, one ranked gene sentence per cell",
    "pretrain": "corpus to an encoder: masked genes and a contrastive loss",
    "embed": "a vector per cell, also as AnnData .obsm",
    "classify": "cell types: fine-tuning, frozen heads, transfer between species, and baselines",
    "perturb": "in silico perturbation: genes ranked by how they move cells towards a goal state",
    "report": "one HTML file of all stages that are done",
}
"""The stages of a run, in order, and what each does."""
_GROUPS = {
    "stages of a run, in order": STAGES,
    "all stages at once": {
        "demo": "on bundled human and mouse pancreas cells, in minutes",
        "run": "on your own config",
    },
    "further analyses": {
        "finetune": "one classifier of all labelled cells, trained by a group of workers, for `mixgf annotate`",
        "compare": "species side by side: label transfer both ways, matching shifts, conserved responses",
        "tune": "a sweep: settings and seeds pretrained, scored on the way and compared (ablations, data ladders)",
    },
    "models and corpora from elsewhere": {
        "import": "a corpus from tokenised Arrow data sets (Genecorpus-30M, Mouse-Genecorpus-20M)",
        "import-weights": "an encoder from a published BERT checkpoint (Geneformer, Mouse-Geneformer), or from mixgf",
        "export": "the run's encoder as a folder that transformers loads as BertForMaskedLM",
    },
    "your own files": {
        "inspect": "what is in a corpus",
        "annotate": "cell types of your own cells, with a warning where they are doubtful",
        "audit": "how much of an evaluation set was in a pretraining corpus",
    },
    "models with a name": {
        "push": "publish a run's encoder and classifiers under a name: to this machine, a folder, s3:// or MLflow's registry",
        "pull": "fetch a published model, checksums verified; `annotate --model NAME` and mg.load(NAME) then find it",
    },
}
COMMANDS = {name: text for group in _GROUPS.values() for name, text in group.items()}
"""Every command and what it does."""
_NEXT = {
    "prepare": "pretrain",
    "import": "pretrain",
    "import-weights": "embed, classify or perturb",
    "pretrain": "embed, classify or perturb",
    "embed": "report",
    "classify": "report",
    "perturb": "report",
    "finetune": "report",
    "compare": "report",
    "tune": "report",
}
"""What usually comes after a command."""
_EPILOG = """examples:
  mixgf annotate resource:pancreas_human_baron.h5ad --model pancreas --output labels.csv
  mixgf demo
  mixgf prepare human=pbmc.h5ad mouse=spleen.h5ad --recipe laptop --output runs/mine
  mixgf pretrain --recipe laptop --output runs/mine
  mixgf classify --output runs/mine --set classify.label=cell_type --set classify.seeds=5
  mixgf perturb  --output runs/mine --set "perturb.start=cell_type == 'alpha cell'" --set "perturb.goal=cell_type == 'beta cell'"
  mixgf report   --output runs/mine

A command reads its inputs under --output, or from --set inputs.corpus=URI and the like. A finished command does nothing when it is
given again; a stopped one continues. `mixgf COMMAND --help` lists the command's settings.
RAY_ADDRESS names a cluster, s3:// object storage, and MLFLOW_TRACKING_URI a tracking server; none of them is needed."""
_EXAMPLES = {
    "annotate": """examples:
  mixgf annotate resource:pancreas_human_baron.h5ad --model pancreas --output labels.csv
  mixgf annotate my.h5ad --model runs/mine/classify/classifiers/pancreas --majority
  mixgf annotate mouse=my.h5ad --model runs/mine/classify/classifiers/pancreas --layer counts

Columns of the output: mixgf_label, mixgf_probability, mixgf_second, mixgf_trusted, mixgf_doubt (why a label is doubted) and others. A
doubted cell keeps its label. Where many cells are doubted, the file may be of another tissue, protocol or state than the training cells.
A model knows only the types of its training cells: `pancreas` is for pancreas. `mixgf classify` makes one of your own labelled cells.""",
    "classify": """example, after `mixgf prepare` and `mixgf pretrain` with the same --output:
  mixgf classify --output runs/mine --set classify.label=cell_type --dry-run
  mixgf classify --output runs/mine --set classify.label=cell_type
  mixgf annotate new.h5ad --model runs/mine

Every model is scored on the same splits. The best one by validation is kept for `mixgf annotate`, with an encoder or without.
To keep one in minutes, leave out the slow ones: --set classify.models=genes_vote,genes_logreg,pca_knn,joint_pca""",
    "perturb": """example, after `mixgf prepare` and `mixgf pretrain` with the same --output:
  mixgf perturb --output runs/mine --set "perturb.start=cell_type == 'alpha cell'" \\
    --set "perturb.goal=cell_type == 'beta cell'" --set perturb.genes=ARX,PAX4,MAFA --dry-run

Cells are named by expressions over the columns of obs; `mixgf inspect runs/mine/corpus` lists them. Without perturb.genes all
genes are tested, which is slow: perturb.screen=200 scores only those that a cheap estimate selects. A hit must repeat over donors.""",
}
"""What a newcomer types, before the settings of a command."""
_COUNTS = "raw counts with their species, for example human=pbmc.h5ad: .h5ad, .zarr, 10x .h5, a 10x folder, a pattern, or s3://"
_ARROW = "tokenised data with their species: a folder that save_to_disk wrote, .arrow files, a pattern, or s3://"


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that looks up the settings of a command when help is asked for."""

    def format_help(self) -> str:
        """The help of a command, with its examples and settings."""
        command = self.prog.split()[-1]
        texts = (_EXAMPLES.get(command, ""), _settings_text(command))
        self.epilog = self.epilog or "\n\n".join(filter(None, texts))
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        if message.startswith("unrecognized arguments"):
            message += "; settings are changed with --set section.field=value"
        self.exit(2, f"mixgf: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    groups = "\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:<16}{text}" for name, text in group.items())])
        for title, group in _GROUPS.items()
    )
    parser = _Parser(
        prog="mixgf",
        usage="mixgf COMMAND [options]",
        description=f"One encoder for human and mouse single cells.\n\n{groups}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, prog="mixgf", help=argparse.SUPPRESS
    )
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name, description=f"mixgf {name}: {text}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in _OWN_ARGUMENTS:
            _OWN_ARGUMENTS[name](command)
        else:
            _stage_arguments(command, name)
        command.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return parser


def _stage_arguments(command: argparse.ArgumentParser, name: str) -> None:
    """Arguments of the commands that work on a config."""
    if name in ("prepare", "run", "import", "tune"):
        wanted = _ARROW if name == "import" else _COUNTS
        command.add_argument("sources", nargs="*", metavar="SPECIES=[NAME=]URI", help=wanted)
    if name == "embed":
        command.add_argument(
            "file", nargs="?", default="", metavar="[SPECIES=]FILE",
            help="instead of a run's corpus: a file of raw counts, whose vectors --model gives (one process); --output names the copy",
        )  # fmt: skip
        command.add_argument(
            "--model",
            default="",
            metavar="URI",
            help="with FILE: a published model by name (pancreas comes with the package), a run or a checkpoint",
        )
        command.add_argument("--layer", default="X", help="with FILE: where the counts are: X, raw, or a layer's name")
        command.add_argument(
            "--genes", default="", metavar="COLUMN", help="with FILE: column of var with Ensembl ids or symbols"
        )
    if name == "import-weights":
        command.add_argument(
            "folder",
            metavar="FOLDER",
            help="a Hugging Face folder (config.json with model.safetensors or pytorch_model.bin), or a mixgf checkpoint whose "
            "vocabulary the corpus extends",
        )
    if name != "demo":
        command.add_argument("--recipe", default="", help=f"a named config: {', '.join(recipes.RECIPES)}")
    command.add_argument("--config", default="", metavar="FILE", help="a JSON config, as --print-config prints it")
    command.add_argument("--output", default="", metavar="URI", help="folder of the run (default: the recipe's)")
    command.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="change one setting; may be repeated (list below)"
    )
    command.add_argument("--print-config", action="store_true", help="print the whole config as JSON and stop")
    if name in ("classify", "perturb"):
        printed = "sentences, FLOP, time and cost" if name == "perturb" else "splits, predictions and time"
        command.add_argument("--dry-run", action="store_true", help=f"print the expected {printed}, and stop")


def _inspect_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("uri", metavar="URI", help="a corpus, for example runs/demo/corpus or s3://bucket/run/corpus")
    command.add_argument("--json", action="store_true", help="print one JSON object with every number")
    command.add_argument("--plot", default="", metavar="FILE", help="also draw it: FILE.png, FILE.svg or FILE.pdf")


def _annotate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "file",
        metavar="[SPECIES=]FILE",
        help="raw counts: .h5ad, .zarr, 10x .h5 or a 10x folder; it is not changed. The species is found by gene names if not given",
    )
    command.add_argument(
        "--model",
        required=True,
        metavar="URI",
        help="a published model by name (pancreas comes with the package), a classifier, or the run or classification that kept one",
    )
    command.add_argument(
        "--output", default="", metavar="FILE", help=".h5ad, .parquet or .csv (default: NAME.annotated.h5ad)"
    )
    command.add_argument("--layer", default="X", help="where the counts are: X, raw, or a layer's name (default: X)")
    command.add_argument("--genes", default="", metavar="COLUMN", help="column of var with Ensembl ids or symbols")
    command.add_argument(
        "--majority", action="store_true", help="also label small clusters of cells by the majority of their cells"
    )
    command.add_argument(
        "--ontology",
        default="",
        metavar="names|TABLE",
        help="also give ids of the Cell Ontology, and for doubted cells the term that covers the plausible labels: ids of the terms "
        "with the labels' names, or of a table (.csv, .tsv, .parquet) with the columns label and id",
    )
    command.add_argument("--workers", type=int, default=2, metavar="N", help="Ray tasks at a time (default: 2)")
    command.add_argument("--json", action="store_true", help="print one JSON object with every number")


def _audit_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("evaluation", metavar="EVAL", help="a corpus, or SPECIES=FILE of raw counts")
    command.add_argument(
        "corpus",
        metavar="CORPUS",
        help="a corpus, a checkpoint beside its corpus, or a published model by name or folder",
    )
    command.add_argument("--layer", default="X", help="with FILE: where the counts are: X, raw, or a layer's name")
    command.add_argument(
        "--genes", default="", metavar="COLUMN", help="with FILE: column of var with Ensembl ids or symbols"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object with every number")


_PLACE = "a folder or s3:// prefix that holds models by name, an MLflow tracker (http://..., sqlite:///...), or `mlflow` for that of MLFLOW_TRACKING_URI"


def _push_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="name of the model, for example islets-2026")
    command.add_argument(
        "--from", dest="run", required=True, metavar="URI", help="a run, or a classifier that `mixgf classify` kept"
    )
    command.add_argument(
        "--licence", required=True, metavar="ID", help="licence of the weights, for example MIT or CC-BY-4.0"
    )
    command.add_argument("--to", default="", metavar="PLACE", help=f"{_PLACE} (default: the models of this machine)")
    command.add_argument("--note", default="", metavar="TEXT", help="what the model is for and what not, for its card")
    command.add_argument("--half", action="store_true", help="store weights in half precision")
    command.add_argument(
        "--cells",
        type=int,
        default=None,
        metavar="N",
        help="most training cells, with their raw counts, that a classifier carries for files of other studies and species "
        "(default: as it was kept, at most 5,000; 0: none, and files of other species are labelled less well)",
    )
    command.add_argument("--huggingface", action="store_true", help="add the encoder as transformers reads it")


def _pull_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "name", metavar="NAME[@VERSION]", help="name of the model; versions are those of MLflow's registry"
    )
    command.add_argument("--from", dest="place", required=True, metavar="PLACE", help=_PLACE)
    command.add_argument(
        "--to", default="", metavar="FOLDER", help="folder of models (default: MIXGF_MODELS, or ~/.cache/mixgf/models)"
    )


_OWN_ARGUMENTS = {
    "inspect": _inspect_arguments,
    "annotate": _annotate_arguments,
    "audit": _audit_arguments,
    "push": _push_arguments,
    "pull": _pull_arguments,
}
"""Commands that work on files, not on a config."""


def _settings_text(command: str) -> str:
    """The settings that a command reads: default and meaning."""
    used = sections_of(Config, command)
    if not used:
        return ""
    data, meaning = to_dict(Config()), meanings()
    lines = ["settings for --set, and their defaults:"]
    for section in (*used, "compute", "tracking"):
        for name, value in data[section].items():
            lines.append(f"  {section}.{name} = {json.dumps(value)}")
            lines += textwrap.wrap(meaning[section, name], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


# Configs


def _config(args: argparse.Namespace) -> Config:
    """The config of a command: recipe or file, then --output, sources and --set."""
    recipe = "demo" if args.command == "demo" else args.recipe
    if not args.config:
        config = recipes.get(recipe or "default")
    elif recipe and args.command != "demo":
        msg = f"--config {args.config}: cannot be given together with --recipe {recipe}; choose one and use --set for changes"
        raise UserError(msg)
    else:
        config = _read_config(args.config, args.command)
    sources = [_source(text) for text in getattr(args, "sources", [])]
    changes = [*([f"sources={json.dumps(sources)}"] if sources else []), *args.set]
    if args.output:
        changes.append(f"output={args.output}")
    return override(config, changes)


def _read_config(file: str, command: str) -> Config:
    path = Path(file)
    if path.is_fifo() and not file.startswith(("/dev/fd/", "/proc/")):  # those are <(...) of a shell
        msg = f"--config {file}: a pipe, not a file; give a file, or <(COMMAND)"
        raise UserError(msg)
    if not (path.is_file() or path.is_fifo()):
        msg = f"--config {file}: no such file; write one with `mixgf {command} --print-config > my.json`"
        raise UserError(msg)
    try:
        data = read_json(path.read_text())
    except ValueError as error:
        msg = f"--config {file}: not a usable JSON file ({error}); write one with --print-config"
        raise UserError(msg) from None
    if not isinstance(data, dict):
        msg = f"--config {file}: must be a JSON object, as --print-config prints it"
        raise UserError(msg)
    return from_dict(Config, data)


def _source(text: str) -> dict[str, str]:
    species, eq, uri = text.partition("=")
    if not (eq and species and uri):
        msg = f"{text[:500]}: must look like SPECIES=URI, for example human={text[:500] if not eq else 'cells.h5ad'}"
        raise UserError(msg)
    name, path = split_named(uri)
    if not name or any(Path().glob(uri)):  # a path may have = in it
        return {"species": species, "uri": uri}
    return {"species": species, "uri": path, "name": name}


# Commands


def _run_stage(name: str, config: Config) -> str:
    """Run one stage and return the URI of what it made."""
    if name == "report":
        from mixgf.report import build
        from mixgf.storage import files

        return build.build_report(config, files.join(config.output, "report.html"))
    if name == "export":
        from mixgf.stages import export

        return export.export(config)
    driver = importlib.import_module(f"mixgf.stages.{'import_corpus' if name == 'import' else name}")
    return str(driver.run(config))


def _rejected_sources(uri: str) -> int:
    """Print the sources that a corpus was made without; returns the exit code."""
    from mixgf.storage import artifacts

    record = artifacts.find(uri)
    rejected = record.details.get("refused", []) if record is not None else []
    for source in rejected:
        console.warn(f"rejected: {source['error']}")
    return 3 if rejected else 0


def _run_all(config: Config) -> int:
    """All stages of a run, then the short summary."""
    from mixgf.distributed.session import session
    from mixgf.report import run_text
    from mixgf.storage import files
    from mixgf.tracking import mlflow_runs

    start = time.monotonic()
    with session(config):
        for i, name in enumerate(STAGES, 1):
            began = time.monotonic()
            console.say(f"[{i}/{len(STAGES)}] {name}: {STAGES[name]}")
            uri = _run_stage(name, config)
            console.say(f"      {uri}  ({console.duration(time.monotonic() - began)})")
    print(f"\n{run_text.summary(config)}\n")
    print(f"report   {redact(uri)}")
    for title, line in zip(("mlflow", ""), mlflow_runs.how_to_look(config), strict=False):
        print(f"{title:<8} {line}")
    print(f"time     {console.duration(time.monotonic() - start)}")
    return _rejected_sources(files.join(config.output, "corpus"))


def _inspect(args: argparse.Namespace) -> int:
    from mixgf.corpus import summary
    from mixgf.report import corpus_text
    from mixgf.report.figures import corpus_inspection

    if args.plot:
        corpus_inspection.check_plot(args.plot, args.uri)  # an unusable file name is found before the counting
    found = summary.summarise_corpus(args.uri)
    print(json.dumps(found, allow_nan=False) if args.json else corpus_text.text(found))
    if args.plot:
        corpus_inspection.save(found, args.plot)
        console.say(f"figure: {args.plot}")
    elif not args.json:
        print(f"\nas a figure: mixgf inspect {args.uri} --plot corpus.png")
    return 0


def _annotate(args: argparse.Namespace) -> int:
    from mixgf.classification.annotate import NAMES, Extras
    from mixgf.stages import annotate

    species, uri, to = _file_and_copy(args, "annotated")
    source = Source(uri=uri, species=species, layer=args.layer, genes=args.genes, name="mine")
    settings = replace(Config(), compute=Compute(num_workers=args.workers))
    table = args.ontology if args.ontology in ("", NAMES) else absolute(args.ontology)
    found = annotate.run(
        _model(args.model), source, to, settings, extras=Extras(majority=args.majority, ontology=table)
    )
    if args.json:
        print(json.dumps(found))
        return 0
    for line in _annotation_lines(found):
        print(line)
    for text in found["verdicts"]:
        console.warn(f"do not trust without a check: {text}")
    print(f"annotate: {found['output']}")
    return 0


def _file_and_copy(args: argparse.Namespace, what: str) -> tuple[str, str, str]:
    """Species and URI of the file that a command reads, and the URI that it writes: --output, or FILE.`what`.h5ad.

    The copy of a bundled file (`resource:`) is written where the command runs, not into the package.
    """
    species, uri = split_named(args.file)
    stem = uri.rstrip("/").removeprefix("resource:").removesuffix(".h5ad").removesuffix(".h5")
    return species, absolute(uri), absolute(args.output or f"{stem}.{what}.h5ad")


def _annotation_lines(found: dict[str, Any]) -> list[str]:
    """What `annotate` found, for people."""
    doubted, test = found["cells"] - found["trusted"], found["test"]
    width = max((len(name) for name in found["labels"]), default=0)
    return [
        (
            f"{found['cells']:,} {found['species']} cells by the {found['kind']} of {found['group']}: "
            f"{found['trusted']:,} labels trusted, {doubted:,} doubted"
        ),
        f"chosen of {len(found['candidates'])} models: {found['why']}",
        *(
            [
                (
                    f"{found['form']} to this file, as {found['form_model']}: expression is read relative to the shift between "
                    "its cells and the training cells"
                )
            ]
            if found["form"] != "as trained"
            else []
        ),
        f"{found['genes']:,} of the model's genes measured, {found['coverage']:.1%} of the tokens of training sentences",
        *(f"  {name:<{width}}  {num:>7,}  {ok:>7,} trusted" for name, (num, ok) in found["labels"].items()),
        *(f"  doubted: {name:<{width}}  {num:,}" for name, num in found["doubts"].items()),
        (
            f"on the model's test cells: accuracy {test['accuracy']:.3f}, calibration error {test['ece']:.3f}, "
            f"{test['doubted']:.1%} doubted"
        ),
    ]


def _audit(args: argparse.Namespace) -> int:
    from mixgf.corpus import overlap

    theirs = overlap.training_cells(_model(args.corpus))
    species, uri = split_named(args.evaluation)
    mine = overlap.evaluation_cells(
        f"{species}={absolute(uri)}" if species else absolute(uri), Config().species, layer=args.layer, genes=args.genes
    )
    found = overlap.compare_cells(mine, theirs)
    print(json.dumps(found.json()) if args.json else f"audit: {found.line}")
    return 0


def _model(text: str) -> str:
    """The folder of a published model, given its name; else an absolute URI."""
    from mixgf.storage import model_store

    return absolute(model_store.resolve(text))


def _place(text: str) -> str:
    """A place of models, absolute if it is a folder."""
    return text if text == "mlflow" else absolute(text)


def _push(args: argparse.Namespace) -> int:
    from mixgf.stages import publish

    asked = publish.Push(
        run=absolute(args.run), name=args.name, licence=args.licence, half=args.half, cells=args.cells,
        huggingface=args.huggingface, note=args.note,
    )  # fmt: skip
    print(redact(f"push: {publish.push(asked, _place(args.to))}"))
    if not args.to:
        print(f"next: mixgf annotate my.h5ad --model {args.name}")
    return 0


def _pull(args: argparse.Namespace) -> int:
    from mixgf.stages import publish

    print(f"pull: {publish.pull(args.name, _place(args.place), _place(args.to))}")
    return 0


_OWN_COMMANDS = {"inspect": _inspect, "annotate": _annotate, "audit": _audit, "push": _push, "pull": _pull}


def _check_tracker(config: Config) -> None:
    """Refuse a tracker that MLflow does not have, before any work."""
    from mixgf.tracking import mlflow_runs

    mlflow_runs.uri(config)


def _embed_file(args: argparse.Namespace) -> int:
    """Vectors of the cells of one file, by an encoder that is there already."""
    from mixgf import api
    from mixgf.cells.open import open_source
    from mixgf.cells.reader import FILE_OPTION
    from mixgf.corpus import h5ad
    from mixgf.storage import files

    if not (args.file and args.model):
        msg = "embed: FILE and --model go together, for example mixgf embed my.h5ad --model runs/mine"
        raise UserError(msg)
    species, uri, to = _file_and_copy(args, "embedded")
    source = Source(uri=uri, species=species, layer=args.layer, genes=args.genes, name="mine")
    if files.is_same(to, source.uri):
        msg = f"--output {to}: is the input itself, which stays as it is; name another file"
        raise UserError(msg)
    encoder = api.load(_model(args.model))
    with open_source(source, option=FILE_OPTION) as reader:
        vectors = api.embed_reader(encoder, reader, species=species, genes=source.genes)
        names = [str(name) for name in reader.cell_names(0, reader.num_rows)]
    h5ad.write_copy(source, to, names, obsm={api.EMBEDDING: vectors}, uns={"mixgf_embed": {"model": encoder.uri}})
    print(f"embed: {to}: obsm[{api.EMBEDDING!r}], {vectors.shape[0]:,} cells x {vectors.shape[1]}")
    return 0


def _dispatch(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.command in _OWN_COMMANDS:
        return _OWN_COMMANDS[args.command](args)
    if args.command == "embed" and (args.file or args.model) and not args.print_config:
        return _embed_file(args)
    config = _config(args)
    if args.print_config:
        print(redact(json.dumps(to_dict(config), indent=1)))
        return 0
    work = with_absolute_paths(config)
    if config.tracking.uri or "MLFLOW_TRACKING_URI" in os.environ:
        _check_tracker(work)
    if args.command in ("demo", "run"):
        return _run_all(work)
    if getattr(args, "dry_run", False):
        print(importlib.import_module(f"mixgf.stages.{args.command}").dry_run(work))
        return 0
    if args.command == "import-weights":
        from mixgf.stages import import_weights

        uri = import_weights.bring(work, args.folder)
    else:
        uri = _run_stage(args.command, work)
    print(redact(f"{args.command}: {uri}"))
    if args.command in _NEXT:
        print(f"next: mixgf {_NEXT[args.command]} --output {config.output}")
    return _rejected_sources(uri) if args.command in ("prepare", "import") else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not words:
        parser.print_help()
        return 0
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        print(f"mixgf: {words[0]}: no such command; {did_you_mean(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    args = parser.parse_args(words)
    console.setup(debug=args.debug)
    try:
        with termination.installed():
            return _dispatch(args)
    except KeyboardInterrupt as stop:
        by, code = (" by SIGTERM", termination.EXIT_CODE) if isinstance(stop, termination.Terminated) else ("", 130)
        print(f"mixgf: stopped{by}; the same command continues where it stopped", file=sys.stderr)
        return code
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 (each becomes one line, or a traceback without secrets)
        code, told = _explain(error)
        if args.debug:
            told = f"{traceback.format_exc()}{told}"
        print(redact(told), file=sys.stderr)
        return code
    finally:
        if "mixgf.storage.lease" in sys.modules:  # else nothing is held, and the import takes longer than many commands
            sys.modules["mixgf.storage.lease"].release_all()


def _short(text: str) -> str:
    """A message with long words cut: a value of 60,000 characters hides what the message says."""
    return re.sub(r"\S{600,}", lambda word: f"{word.group()[:80]}... ({len(word.group()):,} characters)", text)[:8_000]


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and one line for an error."""
    if isinstance(error, UserError):
        return 2, f"mixgf: {_short(str(error))}"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return (
            2,
            f"mixgf: {_short(str(error.filename))}: a path of {len(str(error.filename)):,} characters, longer than this machine takes",
        )
    error = getattr(error, "cause", None) or error  # an error of a Ray worker holds the original one
    first = (str(error).strip() or repr(error)).split("\n")[0]
    if told := machine_fault(error):
        return 1, f"mixgf: {told}"
    if isinstance(error, AccessError):
        return 2, f"mixgf: {first}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("mixgf"):
        package = error.name.partition(".")[0]
        return 2, f"mixgf: needs the package {package}, which is not installed; run: pip install mixgf"
    return 1, f"mixgf: failed: {type(error).__name__}: {first[:500]} (the same command with --debug shows where)"
