"""`mixgf STAGE --recipe|--config --set a.b=c`: one command per stage, and `mixgf demo` for all of them on bundled cells.

Nothing heavy is imported before a stage runs. Exit codes: 0 done, 1 failed (a fault of ours or of the machine),
2 something that was given cannot be used, 3 done without the sources that were refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from mixgf import console
from mixgf.config import recipes
from mixgf.config.checks import split_named
from mixgf.config.fields import absolute, sections_of, with_absolute_paths
from mixgf.config.parse import from_dict, meanings, override, to_dict
from mixgf.config.run import Config
from mixgf.errors import AccessError, UserError

STAGES = {
    "prepare": "raw counts -> cell sentences: checks, QC, vocabulary, rank value encoding",
    "pretrain": "cell sentences -> encoder: masked genes + SimCSE contrast",
    "embed": "encoder -> a vector per cell (AnnData .obsm)",
    "classify": "cell types: fine-tuning, frozen probes, transfer between species, baselines",
    "perturb": "in silico perturbation: genes ranked by how they move cells to a goal state",
    "report": "one HTML file from whatever stages are done",
}
IMPORT = "tokenised Arrow data sets (Genecorpus-30M, Mouse-Genecorpus-20M) -> the corpus that prepare makes"
IMPORT_WEIGHTS = (
    "a published BERT checkpoint (Geneformer, Mouse-Geneformer), or one of mixgf -> the run's encoder, for its corpus"
)
TUNE = "a sweep: arms x seeds of pretrainings, judged zero-shot as they go (ablations, data ladders)"
COMPARE = "across species: one space, transfer both ways, which shift of one species is like which of the other"
EXPORT = "the run's encoder -> a folder that transformers loads as BertForMaskedLM"
_NEXT = {
    "import-weights": "embed, classify or perturb",
    "prepare": "pretrain",
    "import": "pretrain",
    "pretrain": "embed, classify or perturb",
    "embed": "report",
    "classify": "report",
    "compare": "report",
    "tune": "report",
    "perturb": "report",
}
_EPILOG = """examples:
  mixgf demo                                            every stage on bundled human and mouse pancreas cells
  mixgf prepare human=pbmc.h5ad mouse=spleen.h5ad --recipe laptop --output runs/mine
  mixgf import human=human.dataset mouse=mouse.dataset --output runs/mine \
      --set imports.dictionaries=human=tokens_h.pkl,mouse=tokens_m.pkl --set imports.medians=human=medians_h.pkl,mouse=medians_m.pkl
  mixgf pretrain --recipe laptop --output runs/mine
  mixgf import-weights Geneformer --output runs/mine --set imports.dictionaries=token_dictionary.pkl
  mixgf classify --output runs/mine --set classify.label=cell_type --set classify.seeds=5
  mixgf tune human=pbmc.h5ad mouse=spleen.h5ad --recipe cl_ablation --output runs/sweep
  mixgf compare  --output runs/mine
  mixgf perturb  --output runs/mine --set "perturb.start=cell_type == 'alpha cell'" --set "perturb.goal=cell_type == 'beta cell'"
  mixgf pretrain --recipe paper --print-config > mine.json; mixgf pretrain --config mine.json

A stage finds its inputs under --output (or --set inputs.corpus=URI ...), and does nothing twice.
With RAY_ADDRESS it runs on that cluster, with s3:// in object storage, with MLFLOW_TRACKING_URI it is tracked there."""


class _Stage(argparse.ArgumentParser):
    """The parser of a command; what its fields mean is looked up when it is asked for help, not at every start."""

    def format_help(self) -> str:
        """The help, with the fields."""
        self.epilog = _fields(self.prog.split()[-1])
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixgf",
        description="One encoder for human and mouse single cells: corpus, pretraining, classification, perturbation.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Stage)
    for name, text in {
        "demo": "all stages on bundled real cells, in minutes",
        "run": "all stages on your own config",
        **STAGES,
        "compare": COMPARE,
        "tune": TUNE,
        "import": IMPORT,
        "import-weights": IMPORT_WEIGHTS,
        "export": EXPORT,
    }.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"mixgf {name}: {text}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in ("prepare", "run", "import", "tune"):
            counts = "raw counts: .h5ad, 10x .h5 or 10x folder; path, glob or s3://"
            arrow = "a folder that save_to_disk wrote, a folder of .arrow files, or one of them; path, glob or s3://"
            wanted = arrow if name == "import" else counts
            command.add_argument("sources", nargs="*", metavar="SPECIES=URI", help=wanted)
        if name == "import-weights":
            command.add_argument(
                "folder",
                metavar="FOLDER",
                help="config.json and model.safetensors or pytorch_model.bin; or a checkpoint whose vocabulary the corpus' was grown from",
            )
        if name != "demo":
            command.add_argument("--recipe", default="", help=f"a named config: {', '.join(recipes.RECIPES)}")
        command.add_argument("--config", default="", metavar="FILE", help="a JSON config, as --print-config prints it")
        command.add_argument(
            "--output", default="", metavar="URI", help="folder of the run's artifacts (default: the recipe's)"
        )
        command.add_argument(
            "--set", action="append", default=[], metavar="a.b=c", help="change one field; may be repeated"
        )
        command.add_argument("--print-config", action="store_true", help="print the whole config as JSON and stop")
        if name in ("classify", "perturb"):
            told = "sentences, FLOP, time and cost" if name == "perturb" else "splits, predictions and time"
            command.add_argument("--dry-run", action="store_true", help=f"print {told}, and stop")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    inspect = commands.add_parser(
        "inspect",
        help="what is in a corpus",
        description="mixgf inspect: cells by species, source and type, why cells were dropped, lengths, vocabulary",
    )
    inspect.add_argument("uri", metavar="URI", help="a corpus, for example runs/demo/corpus or s3://bucket/run/corpus")
    inspect.add_argument("--json", action="store_true", help="one JSON object with every figure")
    inspect.add_argument("--plot", default="", metavar="FILE", help="draw it as well: FILE.png, FILE.svg or FILE.pdf")
    inspect.add_argument("--debug", action="store_true", help="show tracebacks")
    _more(commands)
    return parser


def _more(commands: Any) -> None:
    """The commands on files of a user's own: annotate, audit."""
    annotate = commands.add_parser(
        "annotate",
        help="cell types of your own cells, and when not to trust them",
        description="mixgf annotate: labels cells of either species with a classifier that `mixgf classify` kept; the input stays as it is",
    )
    annotate.add_argument(
        "file",
        metavar="[SPECIES=]FILE",
        help="raw counts: .h5ad, 10x .h5 or 10x folder; the species is found by gene names",
    )
    annotate.add_argument(
        "--model", required=True, metavar="URI", help="a classifier, or the run or classification that kept one"
    )
    annotate.add_argument(
        "--output", default="", metavar="FILE", help=".h5ad, .parquet or .csv (default: FILE.annotated.h5ad)"
    )
    annotate.add_argument("--layer", default="X", help="where the counts are: X, raw, or a layer's name")
    annotate.add_argument("--genes", default="", metavar="COLUMN", help="column of var with Ensembl ids or symbols")
    annotate.add_argument("--workers", type=int, default=2, metavar="N", help="Ray tasks at a time (default: 2)")
    annotate.add_argument("--json", action="store_true", help="one JSON object with every figure")
    annotate.add_argument("--debug", action="store_true", help="show tracebacks")
    audit = commands.add_parser(
        "audit",
        help="how much of an evaluation was in a pretraining corpus",
        description="mixgf audit: cells (by hash of their counts), donors and data sets of an evaluation that the model was pretrained on",
    )
    audit.add_argument("evaluation", metavar="EVAL", help="a corpus, or SPECIES=FILE of raw counts")
    audit.add_argument("corpus", metavar="CORPUS", help="a corpus, or a checkpoint beside its corpus")
    audit.add_argument("--json", action="store_true", help="one JSON object with every figure")
    audit.add_argument("--debug", action="store_true", help="show tracebacks")


def _fields(stage: str) -> str:
    """The config fields that a stage reads: default, and what it means, from the docstring behind it in `mixgf.config`."""
    used = sections_of(Config, stage)
    if not used:
        return ""
    data, meaning = to_dict(Config()), meanings()
    lines = ["fields for --set, and their defaults:"]
    for section in (*used, "compute", "tracking"):
        for name, value in data[section].items():
            lines.append(f"  {section}.{name} = {json.dumps(value)}")
            lines += textwrap.wrap(meaning[section, name], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _config(args: argparse.Namespace) -> Config:
    recipe = "demo" if args.command == "demo" else args.recipe
    if args.config:
        if recipe and args.command != "demo":
            msg = f"--config {args.config}: cannot be given together with --recipe {recipe}; choose one and use --set for changes"
            raise UserError(msg)
        path = Path(args.config)
        if not path.is_file():
            msg = (
                f"--config {args.config}: no such file; write one with `mixgf {args.command} --print-config > my.json`"
            )
            raise UserError(msg)
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            msg = f"--config {args.config}: not JSON ({error}); write one with --print-config"
            raise UserError(msg) from None
        if not isinstance(data, dict):
            msg = f"--config {args.config}: must be a JSON object, as --print-config prints it"
            raise UserError(msg)
        config = from_dict(Config, data)
    else:
        config = recipes.get(recipe or "default")
    changes = list(args.set)
    if args.output:
        changes.append(f"output={args.output}")
    sources = []
    for text in getattr(args, "sources", []):
        species, eq, uri = text.partition("=")
        if not eq:
            msg = f"{text}: must look like SPECIES=URI, for example human={text}"
            raise UserError(msg)
        sources.append({"species": species, "uri": uri})
    if sources:
        changes.append(f"sources={json.dumps(sources)}")
    return override(config, changes)


def _run_stage(name: str, config: Config) -> str:
    """Run one stage and return the URI of what it made."""
    if name == "report":
        from mixgf.report import build
        from mixgf.storage import files

        return build.build_report(config, files.join(config.output, "report.html"))
    if name == "export":
        from mixgf.stages import export

        return export.export(config)
    import importlib

    driver = importlib.import_module(f"mixgf.stages.{'import_corpus' if name == 'import' else name}")
    return str(driver.run(config))


def _refused(uri: str) -> int:
    """Name the sources that a corpus was made without; returns the exit code."""
    from mixgf.storage import artifacts

    record = artifacts.find(uri)
    refused = record.details.get("refused", []) if record is not None else []
    for source in refused:
        console.warn(f"refused: {source['error']}")
    return 3 if refused else 0


def _run_all(config: Config) -> int:
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
    print()
    print(run_text.summary(config))
    print()
    print(f"report   {uri}")
    if mlflow_runs.uri(config) != mlflow_runs.OFF:
        print(f"mlflow   {mlflow_runs.ui_command(config)}")
        print(f"         then open {mlflow_runs.page(config)}")
    print(f"time     {console.duration(time.monotonic() - start)}")
    return _refused(files.join(config.output, "corpus"))


def _inspect(args: argparse.Namespace) -> int:
    from mixgf.corpus import summary
    from mixgf.report import corpus_text
    from mixgf.report.figures import corpus_inspection

    if args.plot:
        corpus_inspection.check_plot(args.plot, args.uri)  # before the counting, not after it
    found = summary.summarise_corpus(args.uri)
    print(json.dumps(found, allow_nan=False) if args.json else corpus_text.text(found))
    if args.plot:
        corpus_inspection.save(found, args.plot)
        console.say(f"figure: {args.plot}")
    elif not args.json:
        print(f"\nas a figure: mixgf inspect {args.uri} --plot corpus.png")
    return 0


def _annotate(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from mixgf.config.data import Source
    from mixgf.config.run import Compute
    from mixgf.stages import annotate

    species, uri = split_named(args.file)
    stem = uri.rstrip("/").removesuffix(".h5ad").removesuffix(".h5")
    to = absolute(args.output or f"{stem}.annotated.h5ad")
    source = Source(uri=absolute(uri), species=species, layer=args.layer, genes=args.genes, name="mine")
    settings = replace(Config(), compute=Compute(num_workers=args.workers))
    found = annotate.run(absolute(args.model), source, to, settings)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{found['cells']:,} {found['species']} cells by the {found['kind']} of {found['group']}: {found['trusted']:,} labels trusted, "
          f"{found['cells'] - found['trusted']:,} doubted")  # fmt: skip
    print(
        f"{found['genes']:,} of the model's genes measured, {found['coverage']:.1%} of what training sentences are made of"
    )
    width = max((len(name) for name in found["labels"]), default=0)
    for name, (number, trusted) in found["labels"].items():
        print(f"  {name:<{width}}  {number:>7,}  {trusted:>7,} trusted")
    for name, number in found["doubts"].items():
        print(f"  doubted: {name:<{width}}  {number:,}")
    test = found["test"]
    print(
        f"on its own test cells: accuracy {test['accuracy']:.3f}, calibration error {test['ece']:.3f}, {test['doubted']:.1%} doubted"
    )
    for text in found["verdicts"]:
        console.warn(f"do not trust without a check: {text}")
    print(f"annotate: {found['output']}")
    return 0


def _audit(args: argparse.Namespace) -> int:
    from mixgf.corpus import overlap

    theirs = overlap.corpus_cells(overlap.training_corpus(absolute(args.corpus)))
    species, uri = split_named(args.evaluation)
    mine = overlap.evaluation_cells(f"{species}={absolute(uri)}" if species else absolute(uri), Config().species)
    found = overlap.compare_cells(mine, theirs)
    print(json.dumps(found.json()) if args.json else f"audit: {found.line}")
    return 0


def _dispatch(args: argparse.Namespace) -> int:
    if args.command == "inspect":
        return _inspect(args)
    if args.command == "annotate":
        return _annotate(args)
    if args.command == "audit":
        return _audit(args)
    config = _config(args)
    if args.print_config:
        print(json.dumps(to_dict(config), indent=1))
    elif args.command in ("demo", "run"):
        return _run_all(with_absolute_paths(config))
    elif getattr(args, "dry_run", False):
        import importlib

        print(importlib.import_module(f"mixgf.stages.{args.command}").dry_run(with_absolute_paths(config)))
    else:
        if args.command == "import-weights":
            from mixgf.stages import import_weights

            uri = import_weights.bring(with_absolute_paths(config), args.folder)
        else:
            uri = _run_stage(args.command, with_absolute_paths(config))
        print(f"{args.command}: {uri}")
        if args.command in _NEXT:
            print(f"next: mixgf {_NEXT[args.command]} --output {config.output}")
        if args.command in ("prepare", "import"):
            return _refused(uri)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    console.setup(debug=args.debug)
    try:
        return _dispatch(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"mixgf: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mixgf: stopped; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        error = getattr(error, "cause", None) or error  # what a Ray worker raised
        first = (str(error).strip() or repr(error)).split("\n")[0]
        if isinstance(error, AccessError):
            code, told = 2, first
        elif isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("mixgf"):
            package = error.name.partition(".")[0]
            code, told = 2, f"needs the package {package}, which is not installed; run: pip install mixgf"
        else:
            code, told = 1, f"failed: {type(error).__name__}: {first[:500]} (the same command with --debug shows where)"
        print(f"mixgf: {told}", file=sys.stderr)
        return code
