"""SIGKILL to embed and import on Ray: workers, the driver, a node. The output has the bytes of the run never killed."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import killing
import numpy as np
import pyarrow as pa
import pytest

from mixgf.config import data, parse, run, training
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.execution import LocalExecutor
from mixgf.genes.species import gene_table
from mixgf.stages import embed, import_corpus
from mixgf.storage import artifacts, files

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
STAGES = {"embed": embed, "import": import_corpus}
OUTPUTS = {"embed": "embed", "import": "corpus"}
SHARDS = 60
CELLS = 12
"""Of a shard."""
PATIENCE = 400
"""Seconds that a part may take to come on a busy machine."""


def to_embed(make_corpus, folder, chosen):
    """A corpus of many shards, and an untrained encoder."""
    num = SHARDS * CELLS
    lengths = np.random.default_rng(0).integers(60, 120, num)
    uri = make_corpus(lengths, np.arange(num) % 2, [CELLS] * SHARDS, genes=150)
    sizes = training.Model(num_layers=4, dim=128, num_heads=4, ffn_dim=256, max_positions=120)
    vocabulary, weights = Corpus(uri).vocabulary, f"{folder}/pretrain"
    record = artifacts.plan(checkpoint.KIND, checkpoint.SCHEMA, {}, {})
    artifacts.begin(weights, record)
    checkpoint.publish_checkpoint(
        weights, record, MaskedModel(sizes, vocabulary.size), vocabulary=vocabulary.hash, tokens=data.Tokens(max_len=40)
    )
    return dataclasses.replace(chosen, inputs=run.Inputs(corpus=uri, checkpoint=weights))


def to_import(_, folder, chosen):
    """A data set of as many row ranges, in two files."""
    genes = gene_table(data.HUMAN)["gene"].to_pylist()[:100]
    rng = np.random.default_rng(0)
    sentences = [(2 + rng.permutation(100)[: rng.integers(20, 100)]).tolist() for _ in range(SHARDS * CELLS)]
    table = pa.table({"input_ids": pa.array(sentences, pa.list_(pa.int16())), "length": [len(s) for s in sentences]})
    names, half = [f"data-{i:05d}-of-00002.arrow" for i in range(2)], len(sentences) // 2
    (folder / "h.dataset").mkdir()
    for i, name in enumerate(names):
        with pa.OSFile(f"{folder}/h.dataset/{name}", "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(i * half, half), max_chunksize=4)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "h.dataset/state.json").write_text(json.dumps(state))
    (folder / "h.dataset/dataset_info.json").write_text(json.dumps({"features": {}}))
    ids = {"<pad>": 0, "<mask>": 1} | {gene: 2 + i for i, gene in enumerate(genes)}
    (folder / "ids.pkl").write_bytes(pickle.dumps(ids))
    (folder / "medians.pkl").write_bytes(pickle.dumps(dict.fromkeys(genes, 1.0)))
    return dataclasses.replace(
        chosen, sources=(data.Source(uri=f"{folder}/h.dataset", species="human"),), tokens=data.Tokens(max_len=100),
        imports=data.Imports(dictionaries={"human": f"{folder}/ids.pkl"}, medians={"human": f"{folder}/medians.pkl"}),
        prepare=data.Prepare(shard_cells=CELLS, block_cells=5), qc=data.QC(min_genes=5),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[("embed", to_embed), ("import", to_import)], ids=["embed", "import"])
def work(request, make_corpus, tmp_path_factory):
    """Name of the stage, its config, and what it makes if nothing is killed."""
    name, make = request.param
    folder = tmp_path_factory.mktemp(name)
    chosen = run.Config(
        output=str(folder / "whole"), tracking=run.Tracking(uri="off"), compute=run.Compute(num_workers=2)
    )
    chosen = make(make_corpus, folder, chosen)
    return name, chosen, contents(STAGES[name].run(chosen, executor=LocalExecutor()))


def contents(uri):
    """Hashes of every file but the record and the cost ledger, which hold times, and what the record says of them."""
    record = artifacts.find(uri)
    found = {str(p.relative_to(uri)): files.sha256(str(p)) for p in Path(uri).rglob("*") if p.is_file()}
    kept = {name: digest for name, digest in found.items() if name != "record.json" and not name.startswith("cost/")}
    return kept | {"counts": record.counts, "details": record.details, "files": record.files}


def shards(uri):
    """Finished shards."""
    return len(files.list_dir(f"{uri}/shards"))


def until(uri, number, alive):
    """Wait for so many shards while `alive()`; returns whether they came."""
    return killing.until(lambda: shards(uri), number, alive, patience=PATIENCE)


def test_killed_workers_change_nothing(work, tmp_path, ray_local):
    name, chosen, expected = work
    chosen = dataclasses.replace(chosen, output=str(tmp_path))
    uri, rng = f"{tmp_path}/{OUTPUTS[name]}", np.random.default_rng()
    moments = (int(rng.integers(2, SHARDS // 3)), int(rng.integers(SHARDS // 3, SHARDS // 2)))
    with killing.workers_killed(moments, lambda *moment: until(uri, *moment), "ray::Read") as killed:
        STAGES[name].run(chosen)
    assert contents(uri) == expected, killed


@pytest.mark.slow
def test_a_killed_driver_and_a_lost_node_change_nothing(work, tmp_path):
    """First the driver of a local Ray dies with all it started, then the run goes on over three nodes, of which one is lost."""
    name, chosen, expected = work
    chosen = dataclasses.replace(chosen, output=str(tmp_path / "killed"))
    path, uri = tmp_path / "config.json", f"{chosen.output}/{OUTPUTS[name]}"
    path.write_text(json.dumps(parse.to_dict(chosen)))
    command = [sys.executable, "-m", "mixgf", name, "--config", str(path)]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    assert until(uri, 5, lambda: driver.poll() is None)
    driver.kill()
    assert driver.wait() == -9
    made = {p.name: p.stat().st_mtime_ns for p in Path(uri, "shards").iterdir() if not p.name.startswith(".")}
    assert len(made) < SHARDS
    assert artifacts.find(uri) is None
    command = [sys.executable, __file__, name, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '{"nodes": 2}' in done.stdout, done.stdout[-3000:]  # amid what Ray prints of the loss
    assert contents(uri) == expected
    if name == "embed":  # an import marks a shard as done after it has written it
        now = {p.name: p.stat().st_mtime_ns for p in Path(uri, "shards").iterdir()}
        assert {shard: now[shard] for shard in made} == made, "finished shards are not made again"


def main(name, path):
    """Run a stage on a cluster that loses a node."""
    chosen = parse.from_dict(run.Config, json.loads(Path(path).read_text()))
    uri = f"{chosen.output}/{OUTPUTS[name]}"
    first = shards(uri)

    def wait():
        assert until(uri, first + (SHARDS - first) // 4, lambda: True)

    killing.run_with_a_lost_node(lambda: STAGES[name].run(chosen), wait)


if __name__ == "__main__":
    main(*sys.argv[1:])
