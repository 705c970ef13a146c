"""The kinds of faults: flipped bits in artifacts, wrong settings and arguments, wrong files as sources."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import anndata
import numpy as np
from invented import untrained_checkpoint
from scipy import sparse

from mixgf import cli
from mixgf.classification import kept_classifier
from mixgf.config.classification import Classify
from mixgf.config.data import Source, Tokens
from mixgf.config.run import Config, Tracking
from mixgf.config.training import Model, Train
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.genes.vocabulary import Vocabulary
from mixgf.stages import classify, embed, prepare
from mixgf.storage import artifacts, files
from tests.faults.campaign import LOST, SURVIVED, Kind, ending_of
from tests.faults.chain import write_cells

SMALL = Model(num_layers=1, dim=32, num_heads=2, ffn_dim=32, max_positions=48)


def make_run(folder: Path) -> Config:
    """A run with one artifact of most kinds, of bundled cells, without Ray and MLflow."""
    run = Config(
        output=str(folder / "run"), model=SMALL, tokens=Tokens(max_len=48), train=Train(micro_tokens=2048),
        tracking=Tracking(uri="off"),
        sources=write_cells(folder),
        classify=Classify(group="source", splits=("random",), models=("probe", "majority"), epochs=1),
    )  # fmt: skip
    prepare.run(run, executor=LocalExecutor())
    untrained_checkpoint(run, SMALL)
    embed.run(run, executor=LocalExecutor())
    classify.run(run, executor=LocalExecutor())
    return run


def _corpus(uri: str) -> Any:
    found = Corpus(uri)
    tokens, offsets = found.tokens(np.arange(found.num_cells))
    record = found.record
    return [tokens.tolist(), offsets.tolist(), found.obs().astype(str).to_numpy().tolist(), found.species_N.tolist(),
            found.vocabulary.table.to_pydict(), record.counts, record.details, record.fingerprint,
            artifacts.read_artifact_table(uri, "hashes").to_pydict()]  # fmt: skip


def _weights(uri: str) -> Any:
    encoder, record = checkpoint.load_encoder(uri)
    return [record.details, record.fingerprint, *(p.detach().numpy().tobytes() for p in encoder.parameters())]


def _classifier(uri: str) -> Any:
    kept, vocabulary, record = kept_classifier.load(uri)
    heads = [np.asarray(getattr(m.head, f.name)).tobytes() for m in kept.classifier.members for f in fields(m.head)]
    return [kept.classes, kept.genes.tolist(), kept.about, vocabulary.hash, record.details, heads]


def _tables(uri: str) -> Any:
    names = [name.removesuffix(".parquet") for name in artifacts.require(uri, "classification").files]
    return [artifacts.read_artifact_table(uri, name).to_pylist() for name in sorted(names)]


READERS: dict[str, Callable[[str], Any]] = {
    "corpus": _corpus,
    "vocabulary": lambda uri: Vocabulary.load(uri).table.to_pydict(),
    "pretrain": _weights,
    "embed": lambda uri: embed.load(uri).tobytes(),
    "classify/classifiers/human": _classifier,
    "classify": _tables,
}
"""Artifacts, and how the stages that use them read them."""
UNREAD = ("cells.h5ad", "mapping.parquet", "dropped.parquet", "doublets.parquet")
"""Files for people, which no stage reads."""


def bit_flips(run: Config, wanted: int) -> Kind:
    """One bit of one file of an artifact, flipped; sometimes the file is cut off, emptied, or longer."""
    places = []
    for name in READERS:
        for uri, size in files.find(f"{run.output}/{name}").items():
            inside = uri.removeprefix(f"{run.output}/{name}/")
            if (
                size
                and "/cost/" not in uri
                and not uri.endswith(UNREAD)
                and not inside.startswith(("parts/", "classifiers/"))
            ):
                places.append((name, uri))
    before: dict[str, Any] = {}

    def attempt(number: int) -> tuple[str, str]:
        draw = random.Random(number)
        name, uri = places[number % len(places)]
        folder, path = f"{run.output}/{name}", Path(uri)
        if name not in before:
            before[name] = READERS[name](folder)
        data = path.read_bytes()
        how = draw.choice(["flip"] * 8 + ["cut", "empty", "longer"])
        at = draw.randrange(8 * len(data))
        if how == "flip" and draw.random() < 0.3:  # near the end, where footers are
            at = 8 * len(data) - 1 - draw.randrange(min(8 * len(data), 8 * 2_000))
        other = bytearray(data)
        other[at // 8] ^= 1 << (at % 8)
        path.write_bytes({"flip": bytes(other), "cut": data[: at // 8], "empty": b"", "longer": data + b"\0\0"}[how])
        try:
            same = READERS[name](folder) == before[name]
        except UserError as error:
            ending = ending_of(str(error))
            return ending if path.name in ending[1] or folder in ending[1] else (LOST, f"no file named: {ending[1]}")
        except Exception as error:  # noqa: BLE001 (whatever is raised is counted)
            return LOST, f"{uri} {how} {at}: {type(error).__name__}: {error}"
        finally:
            path.write_bytes(data)
        return (SURVIVED, "") if same else (LOST, f"{uri} {how} {at}: other values")

    return Kind("bit flips", wanted, attempt)


VALUES = (
    "-1", "0", "1.5", "NaN", "Infinity", "-Infinity", str(2**70), "1e999", "[]", "{}", "null", "true", "''", '"x"', "x" * 60_000,
    "[" * 9_000, "__import__('os').system('true')", "{\"a\": 1, \"a\": 2}", "..", "\u65e5\u672c", "a\nb", "%s", "cell_type.to_csv('x')",
)  # fmt: skip
STAGES = (
    "prepare",
    "pretrain",
    "embed",
    "classify",
    "finetune",
    "perturb",
    "compare",
    "tune",
    "report",
    "export",
    "import",
)


def wrong_arguments(folder: Path, wanted: int) -> Kind:
    """A setting with a value that it may not have, or inputs that are not there, on every command."""
    hints = get_type_hints(Config)
    settings = [
        f"{section}.{field.name}" for section, hint in hints.items() if is_dataclass(hint) for field in fields(hint)
    ] + ["seed", "output", "recipe", "species", "sources", "no.such", "train", "train."]
    user = folder / "user"
    user.mkdir(exist_ok=True)
    (user / "notes.txt").write_text("of a user")

    def attempt(number: int) -> tuple[str, str]:
        draw = random.Random(number)
        command = STAGES[number % len(STAGES)]
        setting, value = draw.choice(settings), draw.choice(VALUES)
        words = [command, "--output", str(user / "run"), "--set", f"{setting}={value}", "--print-config"]
        ray = bool(draw.randrange(2)) and command not in {"prepare", "tune", "import", "report"}
        if ray:  # without --print-config the command looks for its inputs, which are not there
            words.pop()
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(words)
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException as error:  # noqa: BLE001 (whatever is raised is counted)
            return LOST, f"{words}: {type(error).__name__}: {error}"[:300]
        if sorted(p.name for p in user.rglob("*") if p.is_file()) != ["notes.txt"]:
            shutil.rmtree(user / "run", ignore_errors=True)
            return LOST, f"{words}: left files"[:300]
        told = "\n".join(line for line in err.getvalue().splitlines() if line.startswith("mixgf"))
        if code == 0:
            return SURVIVED, ""
        return ending_of(told) if code == 2 else (LOST, f"{words}: exit {code}: {told}"[:300])

    return Kind("wrong arguments", wanted, attempt)


def wrong_sources(run: Config, folder: Path, wanted: int) -> Kind:
    """A source that is cut off, has flipped bits, is of another kind, or holds other things than counts; beside a good one."""
    good = Path(run.sources[0].uri).read_bytes()
    matrix = anndata.read_h5ad(run.sources[1].uri)

    def spoil(draw: random.Random, path: Path) -> str:
        how = draw.choice(["bytes", "cut", "flips", "text", "empty", "folder", "gone", "values", "json"])
        if how == "bytes":
            path.write_bytes(draw.randbytes(draw.randrange(1, 5_000)))
        elif how == "cut":
            path.write_bytes(good[: draw.randrange(len(good))])
        elif how == "flips":
            other = bytearray(good)
            for _ in range(draw.randrange(1, 40)):
                at = draw.randrange(min(len(other), 40_000) if draw.random() < 0.7 else len(other))
                other[at] ^= 1 << draw.randrange(8)
            path.write_bytes(other)
        elif how in {"text", "json"}:
            path.write_text("barcode,gene\nx,1\n" if how == "text" else json.dumps({"obs": 1}))
        elif how == "empty":
            path.touch()
        elif how == "folder":
            path.mkdir()
        elif how == "values":
            other = matrix.copy()
            dense = other.X.toarray().astype(np.float32)
            dense[draw.randrange(len(dense)), draw.randrange(dense.shape[1])] = draw.choice(
                [-1, 0.5, np.nan, np.inf, 1e30]
            )
            other.X = sparse.csr_matrix(dense)
            other.write_h5ad(path)
        return how

    def attempt(number: int) -> tuple[str, str]:
        draw, place = random.Random(number), folder / f"source-{number}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        bad = place / "bad.h5ad"
        how = spoil(draw, bad)
        sources = (run.sources[1], Source(uri=str(bad), species=draw.choice(["human", "mouse"]), name="bad"))
        config = replace(run, output=str(place / "run"), sources=sources)
        try:
            uri = prepare.run(config, executor=LocalExecutor())
        except BaseException as error:  # noqa: BLE001 (the good source must not be lost)
            return LOST, f"{how}: {type(error).__name__}: {error}"[:300]
        record = artifacts.require(uri, "corpus")
        kept = {one["name"] for one in record.details["sources"]}
        if "mouse" not in kept:
            return LOST, f"{how}: the good source is gone"
        refused = record.details["refused"]
        shutil.rmtree(place, ignore_errors=True)
        if not refused:  # flipped bits in what is not read, or a bit of a count
            return SURVIVED, how
        line = refused[0]["error"]
        return ending_of(line) if "bad.h5ad" in line else (LOST, f"{how}: no file named: {line}"[:300])

    return Kind("wrong sources", wanted, attempt)
