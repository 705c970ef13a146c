"""All stages on a few real cells, each of them a command in a process of its own that can be disturbed and given again.

A stage starts from the artifacts before it, which are linked into its output. What it makes is compared with what it makes
undisturbed, byte by byte. Run as a program, this file is the server that the processes come from: it imports everything once and
forks one process for each line of JSON on its input.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from processes import die_with_us
from scipy import sparse

from mixgf.config import parse
from mixgf.config.classification import Classify
from mixgf.config.comparison import Compare, ShiftSpec
from mixgf.config.data import HUMAN, QC, Imports, Prepare, Source, Tokens, Vocab
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Compute, Config, Tracking
from mixgf.config.training import Model, Objective, Train
from mixgf.config.tuning import Tune
from mixgf.genes.species import gene_table
from mixgf.storage import files

PATIENCE = 600
"""Seconds that a command may take on a busy machine."""
TYPES = ("beta cell", "alpha cell", "ductal cell")
SMALL = Model(num_layers=1, dim=16, num_heads=2, ffn_dim=32, max_positions=48)
UNTRACKED = Tracking(uri="off")
LOSSES = ("loss", "mlm", "contrast", "grad_norm", "lr", "alignment", "uniformity", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Stage:
    """A command, the artifacts that it starts from, and those that it makes."""

    command: str
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the config, by section."""


_TRAINED = ("corpus", "vocabulary", "pretrain")
STAGES = {
    "prepare": Stage("prepare", (), ("corpus", "vocabulary")),
    "pretrain": Stage("pretrain", ("corpus", "vocabulary"), ("pretrain",)),
    "pretrain on neighbours": Stage(
        "pretrain", ("corpus", "vocabulary"), ("pretrain", "neighbours", "gene_vectors"),
        {"model": replace(SMALL, num_layers=0, start="svd"), "objective": Objective(mlm_weight=0.0, view="neighbour", pooling="ranked")},
    ),
    "embed": Stage("embed", _TRAINED, ("embed",)),
    "classify": Stage("classify", (*_TRAINED, "embed"), ("classify",)),
    "finetune": Stage("finetune", _TRAINED, ("finetune",)),
    "perturb": Stage("perturb", _TRAINED, ("perturb",)),
    "compare": Stage("compare", (*_TRAINED, "embed"), ("compare",)),
    "tune": Stage("tune", ("corpus", "vocabulary"), ("tune",)),
    "import": Stage("import", (), ("corpus", "vocabulary")),
    "annotate": Stage("annotate", ("classify",), ("annotated.h5ad",)),
    "report": Stage("report", (*_TRAINED, "embed", "classify", "perturb"), ("report.html",)),
    "export": Stage("export", _TRAINED, ("bert",)),
}  # fmt: skip
"""In the order in which the artifacts come to be."""


def write_cells(folder: Path, each: int = 30, genes: int = 3_000) -> tuple[Source, ...]:
    """`each` human and mouse cells of three types, of three donors each, as files of counts of the genes that most cells have."""
    sources = tuple(Source(uri=str(folder / f"{name}.h5ad"), species=name, name=name) for name in ("human", "mouse"))
    for name in (one.name for one in sources if not Path(one.uri).exists()):
        data = anndata.read_h5ad(files.local_path(f"resource:pancreas_{name}_baron.h5ad"))
        labels = data.obs["cell_type"].astype(str).to_numpy()
        rows = np.concatenate([np.flatnonzero(labels == kind)[:each] for kind in TYPES])
        x = sparse.csr_matrix(data.X[rows]).astype(np.int32)
        columns = np.sort(np.argsort(-x.getnnz(axis=0), kind="stable")[:genes])
        obs, var = data.obs.iloc[rows][["cell_type", "organ"]].astype(str), data.var[["ensembl_id"]].iloc[columns]
        obs["donor"] = [f"{name}{i % 3}" for i in range(len(rows))]
        anndata.AnnData(x[:, columns], obs=obs, var=var).write_h5ad(folder / f"{name}.h5ad")
    return sources


def write_tokens(folder: Path) -> tuple[Source, Imports]:
    """Sixty invented sentences as a tokenised data set, with its dictionary."""
    place, dictionary = folder / "tokens.dataset", folder / "tokens.tsv"
    made = Source(uri=str(place), species="human", name="tokens"), Imports(dictionaries={"human": str(dictionary)})
    if dictionary.exists():
        return made
    genes = gene_table(HUMAN)["gene"].to_pylist()[:60]
    rng = np.random.default_rng(0)
    place.mkdir(exist_ok=True)
    ids = [(rng.permutation(60)[: rng.integers(20, 50)] + 2).tolist() for _ in range(60)]
    table = pa.table({"input_ids": pa.array(ids, pa.list_(pa.int16())), "length": [len(one) for one in ids]})
    names = [f"data-{i:05d}-of-00003.arrow" for i in range(3)]
    for i, name in enumerate(names):
        with pa.OSFile(str(place / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(20 * i, 20), max_chunksize=5)
    (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (place / "dataset_info.json").write_text(json.dumps({"features": {}}))
    rows = "".join(f"{gene}\t{2 + i}\t{1 + i / 8}\n" for i, gene in enumerate(genes))
    dictionary.write_text("gene\ttoken\tmedian\n<pad>\t0\t\n<mask>\t1\t\n" + rows)
    return made


def make_config(folder: Path) -> Config:
    """The config of all stages; `of_stage` changes it for one."""
    return Config(
        output=str(folder / "run"), sources=write_cells(folder), model=SMALL, tokens=Tokens(max_len=48), vocab=Vocab(sharing="ortholog"),
        prepare=Prepare(shard_cells=60, block_cells=60), tracking=UNTRACKED, compute=Compute(num_workers=1),
        train=Train(max_steps=40, batch_cells=16, micro_tokens=2048, lr=1e-3, warmup_steps=2, checkpoint_steps=4, log_steps=1),
        classify=Classify(
            group="source", splits=("random", "species"), models=("finetune", "probe", "knn", "majority", "hvg_logreg"), epochs=2,
            batch_cells=16, lr=1e-3, warmup_steps=2,
        ),
        perturb=Perturb(
            start="cell_type == 'alpha cell' and species == 'human'", goal="cell_type == 'beta cell' and species == 'human'",
            max_cells=12, max_genes=20, block_cells=4, block_genes=10, num_permutations=100,
        ),
        compare=Compare(
            cells=100, num_permutations=19, min_cells=5, models=("knn",), controls=("majority", "pca_knn"), within=(), shifts=tuple(
                ShiftSpec(
                    name=f"types of {name}", tag="types", before=f"species == '{name}' and cell_type == 'alpha cell'",
                    after=f"species == '{name}' and cell_type == 'beta cell'",
                ) for name in ("human", "mouse")
            ),
        ),
        tune=Tune(space=({"objective.contrast_weight": (0.0,)}, {"objective.view": ("mask",)}), seeds=1, rungs=(0.5, 1.0), cells=120),
    )  # fmt: skip


def hash_of(name: str, data: bytes) -> Any:
    """What a file of an artifact holds, without times and places."""
    if name.endswith("record.json"):
        record = json.loads(data)
        return record["fingerprint"], record["counts"]
    if name.endswith("history.parquet"):
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
        return [(row["step"], row["name"], row["value"]) for row in rows if row["name"] in LOSSES]
    if "/parts/predictions/" in name:
        table = pq.read_table(pa.BufferReader(data))
        facts = json.loads(table.schema.metadata[b"mixgf"])
        assert facts.pop("seconds") > 0
        return facts, table.to_pylist()
    if name.endswith(".json"):  # its seal covers places, too; a config names the tracker
        return {key: value for key, value in json.loads(data).items() if key not in ("seal", "tracking")}
    if name.endswith("report.html"):
        return data.rstrip().endswith(b"</html>")
    return hashlib.sha256(data).hexdigest()


def contents(output: str) -> dict[str, Any]:
    """By name: what the files of an output hold, but the costs of the work and the tracker's own."""
    found = {}
    for name in files.names_in(output):
        parts = name.split("/")
        if not {"cost", "tracking", "lease"} & set(parts) and not parts[0].startswith("mlflow"):
            data, place = files.read_bytes(files.join(output, name)), output.encode()
            if name.endswith(".h5ad"):  # where things lie in the file depends on the length of the texts
                found[name] = _parts_of(data, place)
            else:
                found[name] = hash_of(name, data.replace(place, b"OUTPUT"))
    return found


def _parts_of(data: bytes, output: bytes) -> dict[str, str]:
    """Hashes of the attributes and values of all parts of an HDF5 file, by name."""
    found = {}

    def add(name: str, part: h5py.Group | h5py.Dataset) -> None:
        values = [(key, np.asarray(value)) for key, value in sorted(part.attrs.items())]
        if isinstance(part, h5py.Dataset):
            values.append(("", np.asarray(part[()])))
        digest = hashlib.sha256()
        for key, value in values:
            text = value.dtype.kind in "OSU"
            plain = repr(value.tolist()).encode().replace(output, b"OUTPUT") if text else value.tobytes()
            digest.update(f"{key} {'text' if text else value.dtype} {value.shape} ".encode() + plain)
        found[name] = digest.hexdigest()

    with h5py.File(io.BytesIO(data)) as file:
        add("/", file)
        file.visititems(add)
    return found


@dataclass
class Ended:
    """How a command ended."""

    code: int
    """Exit code, negative for the number of a signal."""
    said: str
    seconds: float

    @property
    def line(self) -> str:
        """The line of the error, "" where there is none or more than one."""
        lines = [line for line in self.said.splitlines() if line.startswith("mixgf: ")]
        return lines[-1] if lines else ""

    @property
    def traceback(self) -> str:
        """What was said from the first traceback on, "" where there is none."""
        _, found, rest = self.said.partition("Traceback")
        return found + rest[:2_000]


class Server:
    """Processes for commands: forked, so that they start in a fraction of a second."""

    def __init__(self) -> None:
        command = die_with_us([sys.executable, __file__])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self.answers.get(timeout=PATIENCE) == "ready"
        self.pid = 0

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line.strip())
        self.answers.put("gone")

    def start(self, words: list[str], log: Path, *, env: Mapping[str, str] | None = None, ray: bool = False) -> None:
        """Start a command; `ray`: on the cluster of RAY_ADDRESS, else all work is done in the process itself.

        The names of the files that it puts into their places are written beside the log, one JSON text each.
        """
        assert self.process.stdin is not None
        self.log, self.began = log, time.monotonic()
        asked = {"words": words, "log": str(log), "env": dict(env or {}), "ray": ray}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.answers.get(timeout=60))

    def ended(self, seconds: float) -> Ended | None:
        """Wait for the end of the command for so long; None = it goes on."""
        try:
            code = int(self.answers.get(timeout=seconds))
        except queue.Empty:
            return None
        self.pid = 0
        return Ended(code, self.log.read_text(errors="replace"), time.monotonic() - self.began)

    def ended_before(self, placed: int) -> Ended | None:
        """Wait until the command has put so many files into their places; None = it has, and goes on."""
        while Chain.placed(self.log) < placed:
            if (ended := self.ended(0.001)) is not None:
                return ended
        return None

    def end(self) -> Ended:
        """Wait for the end of the command; one that does not come is killed, and counts as such."""
        ended = self.ended(PATIENCE)
        if ended is None:
            os.kill(self.pid, signal.SIGKILL)
            ended = self.ended(60)
            assert ended is not None
            ended.said += f"\nmixgf: did not end in {PATIENCE} s"
        return ended

    def run(self, words: list[str], log: Path, **options: Any) -> Ended:
        self.start(words, log, **options)
        return self.end()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Chain:
    """The stages, what they make undisturbed, and folders in which they are tried.

    What stages made undisturbed is used again if the folder is; it must be of the same code. Several processes may use one folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.holding = False
        with self.alone():
            self.config = make_config(folder)
            self.tokens, self.imports = write_tokens(folder)
        self.server = Server()
        self.expected: dict[tuple[str, bool], dict[str, Any]] = {}
        self.seconds: dict[tuple[str, bool], float] = {}
        self.env: dict[str, str] = {}
        """Of commands on Ray."""

    def close(self) -> None:
        self.server.close()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process makes what is undisturbed meanwhile."""
        if self.holding:
            yield
            return
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.holding = True
            try:
                yield
            finally:
                self.holding = False

    def words(self, name: str, output: str, *, tracking: Tracking = UNTRACKED) -> list[str]:
        """The command of a stage in an output."""
        stage = STAGES[name]
        if name == "annotate":
            cells = f"human={self.config.sources[0].uri}"
            return ["annotate", cells, "--model", f"{output}/classify/classifiers/human", "--output", f"{output}/annotated.h5ad", "--workers", "1"]  # fmt: skip
        config = replace(self.config, output=output, tracking=tracking, **stage.changes)
        if name == "import":
            config = replace(config, sources=(self.tokens,), imports=self.imports, qc=QC(min_genes=5))
        path = self.folder / f"config-{hashlib.sha256(f'{name} {output} {tracking}'.encode()).hexdigest()[:16]}.json"
        path.write_text(json.dumps(parse.to_dict(config)))
        return [stage.command, "--config", str(path)]

    def made(self, artifact: str, *, ray: bool) -> Path:
        """Where an artifact lies that a stage made undisturbed."""
        name = next(name for name, stage in STAGES.items() if artifact in stage.makes)
        return self.undisturbed(name, ray=ray) / artifact

    def undisturbed(self, name: str, *, ray: bool = False) -> Path:
        """The output in which a stage ran undisturbed; `expected` and `seconds` know it then."""
        output = self.folder / f"whole-{'ray' if ray else 'local'}-{name.replace(' ', '_')}"
        if (name, ray) not in self.expected:
            took = output.with_suffix(".seconds")
            with self.alone():
                if not took.exists():
                    shutil.rmtree(output, ignore_errors=True)
                    self.link(name, output)
                    log = output.with_suffix(".log")
                    ended = self.server.run(self.words(name, str(output)), log, env=self.env, ray=ray)
                    assert ended.code == 0, ended.said[-3000:]
                    took.write_text(str(ended.seconds))
            self.expected[name, ray], self.seconds[name, ray] = contents(str(output)), float(took.read_text())
        return output

    @staticmethod
    def placed(log: Path) -> int:
        """Number of files that the command of a log has put into their places."""
        written = Path(f"{log}.written")
        return written.read_bytes().count(b"\n") if written.exists() else 0

    def link(self, name: str, output: Path) -> None:
        """Put the artifacts that a stage starts from into its output, as hard links; and a user's file beside them."""
        output.mkdir(parents=True)
        (output / "notes.txt").write_text("of a user")
        for artifact in STAGES[name].needs:
            made = self.made(artifact, ray=False)
            (shutil.copytree if made.is_dir() else shutil.copyfile)(made, output / artifact, copy_function=os.link)

    @contextlib.contextmanager
    def output(self, name: str, number: int) -> Iterator[Path]:
        """A folder for a try of a stage, with what it starts from; removed after it."""
        place = self.folder / f"try-{os.getpid()}-{number}-{name.replace(' ', '_')}"
        shutil.rmtree(place, ignore_errors=True)
        self.link(name, place)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            for log in self.folder.glob(f"{place.name}*.log*"):
                log.unlink()

    def unequal(self, name: str, output: str, *, ray: bool = False) -> list[str]:
        """Names of the files that are not as the stage makes them undisturbed."""
        expected, found = self.expected[name, ray], contents(output)
        return sorted(file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file))


def stage_of(number: int) -> str:
    """The stage of a try: all in turn."""
    return list(STAGES)[number % len(STAGES)]


# The server


def serve() -> None:
    """Import everything, then fork a process for each line of input; the answers are its id and its exit code."""
    import importlib
    import pkgutil

    import mlflow.tracking  # noqa: F401
    import ray.data
    import ray.train
    import ray.tune  # noqa: F401
    import s3fs  # noqa: F401
    import sklearn.linear_model  # noqa: F401

    import mixgf

    for found in pkgutil.walk_packages(mixgf.__path__, "mixgf."):
        if not found.name.endswith(("__main__", "served_model")):
            importlib.import_module(found.name)
    out = os.fdopen(os.dup(1), "w")
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os._exit(_command(json.loads(line)))
        out.write(f"{pid}\n")
        out.flush()
        out.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        out.flush()


def _command(asked: dict[str, Any]) -> int:
    """A command in this process; returns its exit code."""
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, to in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(to, number)
    os.environ.update(asked["env"])
    note = os.open(f"{asked['log']}.written", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def written(event: str, args: tuple[Any, ...]) -> None:
        if event in {"os.rename", "os.link"}:  # every file is written beside its place
            os.write(note, (json.dumps(os.fspath(args[1])) + "\n").encode())

    sys.addaudithook(written)
    from mixgf import cli
    from mixgf.execution import LocalExecutor

    if not asked["ray"]:
        for name, module in list(sys.modules.items()):
            if name.startswith("mixgf.stages."):
                vars(module).update(
                    {"RayExecutor": lambda *_, **__: LocalExecutor()} if hasattr(module, "RayExecutor") else {}
                )
    code = cli.main(asked["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
