"""`mixgf prepare` on one or more files in this process: its exit code, what it printed, and its corpus."""

import logging
from dataclasses import dataclass, field

import pandas as pd

from mixgf import cli
from mixgf.config.fields import with_absolute_paths
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import tables

SETTINGS = {"qc.method": "none", "qc.drop_duplicates": "false", "qc.doublets": "off", "tracking.uri": "off"}


@dataclass
class Outcome:
    code: int
    lines: list[str]
    obs: pd.DataFrame = field(default_factory=pd.DataFrame)
    mapping: list[dict] = field(default_factory=list)
    sentences: list[list[str]] = field(default_factory=list)

    @property
    def error(self):
        return next((line for line in self.lines if line.startswith(("refused: ", "mixgf: "))), "")

    @property
    def sums(self):
        o = self.obs
        return (len(o), int(o["n_counts"].sum()), int(o["n_genes"].sum()), round(float(o["mito_fraction"].mean()), 4),
                sum(row["mapped"] for row in self.mapping))  # fmt: skip


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def run_prepare(output, *sources, **settings):
    """The outcome of `mixgf prepare SOURCES`, with a double underscore for the dot in names of settings."""
    chosen = SETTINGS | {name.replace("__", "."): str(value) for name, value in settings.items()}
    words = ["prepare", *sources, "--recipe", "laptop", "--output", str(output)]
    args = cli._parser().parse_args([*words, *(w for k, v in chosen.items() for w in ("--set", f"{k}={v}"))])
    handler, log = _Lines(), logging.getLogger("mixgf")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        uri = prepare.run(with_absolute_paths(cli._config(args)), executor=LocalExecutor())
        code = cli._rejected_sources(uri)
    except UserError as error:
        return Outcome(2, [*handler.lines, f"mixgf: {error}"])
    finally:
        log.removeHandler(handler)
    corpus = Corpus(uri)
    symbols = corpus.vocabulary.symbols()
    rows = [
        row
        for i in range(len(corpus.shards))
        for row in tables.read_table(corpus.shard_uri(i), ["tokens"])["tokens"].to_pylist()
    ]
    mapping = tables.read_table(f"{uri}/mapping.parquet").to_pylist()
    return Outcome(code, handler.lines, corpus.obs(), mapping, [[symbols[t] for t in row] for row in rows])
