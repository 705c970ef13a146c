"""Laws of import: every cell's genes and their order survive, kept + dropped == read, kills and workers change no byte."""

import dataclasses
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from executors import Through, backwards, dying

from mixgf import cli
from mixgf.config import checks, parse
from mixgf.config.data import HUMAN, MOUSE, QC, Imports, Prepare, Source, Tokens, Vocab
from mixgf.config.parse import to_dict
from mixgf.config.run import Config, Tracking
from mixgf.corpus.reader import Corpus
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.genes import species
from mixgf.genes.species import gene_table
from mixgf.genes.vocabulary import Vocabulary
from mixgf.stages import import_corpus
from mixgf.storage import artifacts, files, tables
from mixgf.training import loop, worker_group
from mixgf.training.pretraining import Pretraining

NUM_GENES = 40
SHARED = Path(os.environ.get("MIXGF_SHARED", Path(__file__).parents[3] / "shared"))


def write(path, table, form, rows=4):
    make = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[form]
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_dataset(folder, sentences, columns, *, form="stream", files=2, kind=None):
    """What save_to_disk writes: data-*.arrow, state.json, dataset_info.json."""
    folder.mkdir()
    lists = pa.array(sentences, pa.list_(pa.int16()) if kind is None else kind)
    lengths = pa.array([len(s) for s in sentences])
    table = pa.table({"input_ids": lists} | columns | ({} if "length" in columns else {"length": lengths}))
    cuts = np.linspace(0, len(sentences), files + 1).astype(int)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for name, a, b in zip(names, cuts[:-1], cuts[1:], strict=True):
        write(folder / name, table.slice(a, b - a), form)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return str(folder)


@pytest.fixture(scope="module")
def genes():
    """Some genes of the shipped tables, by species; a quarter of the mouse genes are orthologs of human ones."""
    human = gene_table(HUMAN)["gene"].to_pylist()[:NUM_GENES]
    pairs = species.orthologs(Vocab().orthologs)["human", "mouse"]
    shared = [pairs[g] for g in human if g in pairs][:10]
    partners = set(pairs.values())
    others = [g for g in gene_table(MOUSE)["gene"].to_pylist() if g not in partners][:30]
    return {"human": human, "mouse": sorted(shared + others)}


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"  # made once: a new database takes seconds


@pytest.fixture
def world(tmp_path, genes, tracking_uri):
    """Two data sets whose ids overlap: human ids 2.., mouse ids 2.. in the other direction; the sentences by gene."""
    rng = np.random.default_rng(0)
    ids = {
        "human": {"<pad>": 0, "<mask>": 1} | {g: 2 + i for i, g in enumerate(genes["human"])},
        "mouse": {"<pad>": 0, "<mask>": 1} | {g: 2 + i for i, g in enumerate(reversed(genes["mouse"]))},
    }
    said = {
        name: [rng.permutation(genes[name])[: rng.integers(5, 30)].tolist() for _ in range(num)]
        for name, num in (("human", 37), ("mouse", 20))
    }
    said["human"][7] = said["human"][7][:3]  # a cell with few genes
    said["human"][36] = []
    for name, kind in (("human", np.int16), ("mouse", np.int64)):
        (tmp_path / f"{name}_tokens.pkl").write_bytes(pickle.dumps({g: kind(i) for g, i in ids[name].items()}))
        medians = {g: np.float64(1 + i / 8) for i, g in enumerate(genes[name])}
        (tmp_path / f"{name}_medians.pkl").write_bytes(pickle.dumps(medians))
    columns = {
        "human": {
            "cell_type": [f"t{i % 3}" for i in range(37)],
            "organ_major": ["brain"] * 37,
            "age": list(range(37)),
        },
        "mouse": {"cell_type": [f"m{i % 2}" for i in range(20)], "age": np.arange(20) / 2},
    }
    numbers = {name: [[ids[name][g] for g in cell] for cell in said[name]] for name in said}
    write_dataset(tmp_path / "h.dataset", numbers["human"], columns["human"], files=3)
    kind = pa.large_list(pa.int32())
    write_dataset(tmp_path / "m.dataset", numbers["mouse"], columns["mouse"], form="file", kind=kind)
    settings = Config(
        output=str(tmp_path / "run"),
        sources=(Source(uri=str(tmp_path / "h.dataset"), species="human"), Source(uri=str(tmp_path / "m.dataset"), species="mouse")),
        imports=Imports(
            dictionaries={n: f"{tmp_path}/{n}_tokens.pkl" for n in ids}, medians={n: f"{tmp_path}/{n}_medians.pkl" for n in ids}
        ),
        tokens=Tokens(max_len=20), prepare=Prepare(shard_cells=5, block_cells=5), qc=QC(min_genes=5), tracking=Tracking(uri=tracking_uri),
    )  # fmt: skip
    return settings, said, numbers


def made(settings, tmp_path, name="run", **changes):
    return import_corpus.run(
        dataclasses.replace(settings, output=str(tmp_path / name), **changes), executor=LocalExecutor()
    )


def ruled(settings, **rules):
    return dataclasses.replace(settings, imports=dataclasses.replace(settings.imports, **rules))


def shards(uri):
    record = artifacts.require(uri, "corpus")
    return pa.concat_tables([tables.read_table(f"{uri}/shards/{s['name']}") for s in record.details["shards"]])


def bytes_of(uri):
    paths = [f"{name}.parquet" for name in ("index", "mapping", "dropped", "imported", "vocabulary")]
    return {f: files.sha256(f"{uri}/{f}") for f in paths + [f"shards/{n}" for n in files.list_dir(f"{uri}/shards")]}


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("sharing", ["separate", "ortholog"])
def test_every_cell_keeps_its_genes_in_order_under_our_ids(world, tmp_path, cls, sharing):
    settings, said, _ = world
    vocab = dataclasses.replace(settings.vocab, sharing=sharing)
    uri = made(settings, tmp_path, tokens=Tokens(max_len=20, cls=cls), vocab=vocab)
    record, vocabulary, table = artifacts.require(uri, "corpus"), Vocabulary.load(uri), shards(uri)
    assert record.details["vocabulary"] == vocabulary.hash == Vocabulary.load(f"{settings.output}/vocabulary").hash
    assert record.counts == {"read": 57, "kept": 55, "dropped": {"few_genes": 2}}
    assert vocabulary.size == 3 + 2 * NUM_GENES - 10 * (sharing == "ortholog")
    for cell in table.to_pylist():
        of = vocabulary.species_genes(cell["species"])
        gene = dict(zip(of.tokens.tolist(), of.genes.tolist(), strict=True))
        row = cell["source_row"]
        assert [gene[t] for t in cell["tokens"][cls:]] == said[cell["species"]][row][: 20 - cls]
        assert cell["tokens"][:cls] == [2] * cls
        assert cell["length"] == len(cell["tokens"])
        assert (cell["source"], cell["cell"]) == (cell["species"][0], f"{cell['species'][0]}:{row}")
        assert cell["cell_type"] == (f"t{row % 3}" if cell["species"] == "human" else f"m{row % 2}")
        assert cell["organ_major"] == ("brain" if cell["species"] == "human" else None)
        assert cell["age"] == (row if cell["species"] == "human" else row / 2)
        assert cell["n_counts"] is cell["n_genes"] is cell["mito_fraction"] is None
    rows = {name: table.filter(pa.compute.equal(table["species"], name))["source_row"].to_pylist() for name in said}
    assert rows == {"human": [i for i in range(36) if i != 7], "mouse": list(range(20))}
    index = tables.read_table(f"{uri}/index.parquet")
    assert index["length"].to_pylist() == table["length"].to_pylist()
    assert [record.details["species"][c] for c in index["species"].to_pylist()] == table["species"].to_pylist()


def test_every_id_of_every_cell_is_accounted_for(world, tmp_path):
    settings, said, _ = world
    uri = made(settings, tmp_path)
    human, mouse = tables.read_table(f"{uri}/imported.parquet").to_pylist()
    for row, name in ((human, "human"), (mouse, "mouse")):
        assert sum(n for k, n in row.items() if k.startswith("ids_")) == sum(map(len, said[name]))
        assert (row["dictionary_genes"], row["genes_in_vocabulary"]) == (NUM_GENES, NUM_GENES)
    assert human["ids_in_dropped_cells"] == 3
    assert human["ids_truncated"] == sum(max(0, len(s) - 20) for s in said["human"])
    assert (human["cells_read"], human["cells_kept"]) == (37, 35)
    sources = artifacts.require(uri, "corpus").details["sources"]
    assert [[f["rows"] for f in s["files"]] for s in sources] == [[12, 12, 13], [10, 10]]
    assert all(f["sha256"] == files.sha256(f["uri"]) for s in sources for f in s["files"])


def test_a_killed_run_continues_and_ends_with_the_same_bytes(world, tmp_path, genes):
    settings, _, _ = world
    expected = bytes_of(made(settings, tmp_path, "whole"))
    calls = []

    total = 0
    for after in (2, 4, 5):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            import_corpus.run(settings, executor=dying(after, calls))
        assert artifacts.find(f"{settings.output}/corpus") is None
        total += len(calls)
    calls.clear()
    uri = import_corpus.run(settings, executor=dying(10**9, calls))
    assert total + len(calls) == 5 + 13  # five files, thirteen row ranges with kept cells: nothing was made twice
    assert bytes_of(uri) == expected
    assert not files.exists(f"{uri}/work")
    calls.clear()
    assert import_corpus.run(settings, executor=dying(0, calls)) == uri  # done: nothing to do
    with pytest.raises(UserError, match=r"holds another .*tokens\.max_len: 20 -> 19"):
        made(settings, tmp_path, tokens=Tokens(max_len=19))
    (tmp_path / "human_tokens.pkl").write_bytes(pickle.dumps({genes["human"][0]: 7}))
    with pytest.raises(UserError, match=r"holds another .*imports\.sha256"):  # another dictionary under the old name
        made(settings, tmp_path)


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 3])
def test_ray_gives_what_the_loop_gives(world, tmp_path, ray_local, workers):
    settings, _, _ = world
    expected = bytes_of(made(settings, tmp_path, "loop"))
    compute = dataclasses.replace(settings.compute, num_workers=workers)
    assert bytes_of(import_corpus.run(dataclasses.replace(settings, compute=compute))) == expected


def test_neither_the_cut_nor_the_order_of_work_changes_a_sentence(world, tmp_path):
    settings, _, _ = world
    whole = made(settings, tmp_path, "whole")

    other = dataclasses.replace(settings, output=str(tmp_path / "back"))
    assert bytes_of(import_corpus.run(other, executor=Through(backwards))) == bytes_of(whole)
    cut = made(settings, tmp_path, "cut", prepare=Prepare(shard_cells=7, block_cells=3))
    assert shards(cut).equals(shards(whole))


# What is wrong with a data set


def spoiled(tmp_path, numbers, name, **columns):
    """The human data set with other ids."""
    columns = {"cell_type": ["t"] * len(numbers)} | columns
    return Source(uri=write_dataset(tmp_path / f"{name}.dataset", numbers, columns), species="human")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda s: [*s, 99], ("unknown_ids", r"row 6: id 99 is not in the dictionary \S+human_tokens\.pkl", "ids_unknown")),
        (lambda s: [1, *s], ("unknown_ids", r"row 6: id 1 is not in .* special token out of place", "ids_unknown")),
        (lambda s: [*s, s[0]], ("duplicates", r"row 6: id \d+ is a gene that the sentence already has", "ids_duplicate")),
        (lambda s: s, ("lengths", r"row 6: length says 3, input_ids has \d+ ids", "cells_wrong_length")),
    ],
    ids=["unknown", "mask", "duplicate", "length"],
)  # fmt: skip
def test_what_is_wrong_is_refused_or_counted(world, tmp_path, spoil, found):
    """Row 24 of the data set is row 6 of its second file."""
    field, message, counter = found
    settings, said, numbers = world
    ids = [spoil(s) if i == 24 else s for i, s in enumerate(numbers["human"])]
    lengths = {"length": [3 if i == 24 else len(s) for i, s in enumerate(ids)]} if field == "lengths" else {}
    source = spoiled(tmp_path, ids, "bad", **lengths)
    with pytest.raises(UserError, match=rf"{message}.*imports\.{field} = 'count'") as caught:
        made(settings, tmp_path, "only", sources=(source,))
    assert "\n" not in str(caught.value)
    assert not files.exists(str(tmp_path / "only" / "corpus"))
    # beside a good source the bad one is listed, and the shards are those of the good one
    both = made(settings, tmp_path, "both", sources=(source, settings.sources[1]))
    record = artifacts.require(both, "corpus")
    assert [r["name"] for r in record.details["refused"]] == ["bad"]
    assert [s["name"] for s in record.details["shards"]] == [f"{i:05d}.parquet" for i in range(4)]
    assert record.counts["read"] == 20
    with pytest.raises(UserError, match=message):
        made(
            settings,
            tmp_path,
            "strict",
            sources=(source, settings.sources[1]),
            prepare=Prepare(shard_cells=5, block_cells=5, strict=True),
        )
    counted = made(ruled(settings, **{field: "count"}), tmp_path, "counted", sources=(source,))
    (row,) = tables.read_table(f"{counted}/imported.parquet").to_pylist()
    assert row[counter] == 1
    vocabulary = Vocabulary.load(counted).species_genes("human")
    gene = dict(zip(vocabulary.tokens.tolist(), vocabulary.genes.tolist(), strict=True))
    for cell in shards(counted).to_pylist():
        assert [gene[t] for t in cell["tokens"]] == said["human"][cell["source_row"]][:20]


def test_genes_without_a_median_are_left_out_and_counted_or_refused(world, tmp_path, genes):
    settings, said, _ = world
    medians = pickle.loads((tmp_path / "human_medians.pkl").read_bytes())
    lost = set(genes["human"][::4])
    (tmp_path / "human_medians.pkl").write_bytes(pickle.dumps({g: m for g, m in medians.items() if g not in lost}))
    uri = made(settings, tmp_path, sources=settings.sources[:1], qc=QC(min_genes=1))
    (row,) = tables.read_table(f"{uri}/imported.parquet").to_pylist()
    assert row["ids_outside"] == sum(g in lost for s in said["human"] for g in s) > 0
    assert (row["dictionary_genes"], row["genes_in_vocabulary"]) == (40, 30)
    assert Vocabulary.load(uri).species_genes("human").genes.tolist() == [g for g in genes["human"] if g not in lost]
    with pytest.raises(
        UserError, match=r"is a gene that the human vocabulary does not have.*imports\.outside = 'count'"
    ):
        made(ruled(settings, outside="refuse"), tmp_path, "no", sources=settings.sources[:1])


def test_two_dictionaries_of_one_species_and_one_of_two(world, tmp_path, genes):
    """A source may have a dictionary of its own, and a joint dictionary (the paper's) serves both species."""
    settings, said, numbers = world
    joint = {"<pad>": 0, "<mask>": 1} | {g: 2 + i for i, g in enumerate([*genes["mouse"], *genes["human"]])}
    (tmp_path / "joint.json").write_text(json.dumps(joint))
    write_dataset(tmp_path / "j.dataset", [[joint[g] for g in s] for s in said["human"]], {"cell_type": ["j"] * 37})
    again = Source(uri=str(tmp_path / "j.dataset"), species="human")
    joint_uri = f"{tmp_path}/joint.json"
    dictionaries = {"all": joint_uri, "h": f"{tmp_path}/human_tokens.pkl", "mouse": f"{tmp_path}/mouse_tokens.pkl"}
    uri = made(ruled(settings, dictionaries=dictionaries), tmp_path, sources=(*settings.sources, again))
    table = shards(uri)
    tokens = {name: table.filter(pa.compute.equal(table["source"], name))["tokens"].to_pylist() for name in "hj"}
    assert tokens["h"] == tokens["j"]
    foreign = [*numbers["human"][:30], [joint[genes["mouse"][0]]], *numbers["human"][31:]]
    write_dataset(tmp_path / "f.dataset", foreign, {})
    with pytest.raises(UserError, match=r"gene that the human vocabulary does not have \(another species\?"):
        made(ruled(settings, dictionaries={"all": joint_uri}, outside="refuse"), tmp_path, "f",
             sources=(Source(uri=str(tmp_path / "f.dataset"), species="human"),))  # fmt: skip


def test_a_vocabulary_is_used_unchanged_and_a_table_brings_its_own_medians(world, tmp_path, genes):
    settings, _, _ = world
    first = made(settings, tmp_path, "first")
    no_medians = ruled(settings, medians={})
    again = made(no_medians, tmp_path, "again", vocab=Vocab(reuse=str(tmp_path / "first" / "vocabulary")))
    assert shards(again).equals(shards(first))
    assert not files.exists(str(tmp_path / "again" / "vocabulary"))
    with pytest.raises(UserError, match=r"imports\.medians = \{\}: no median of any human gene .*vocab\.reuse"):
        made(no_medians, tmp_path, "none")
    lines = [f"{g}\t{2 + i}\t{1 + i / 8}\n" for i, g in enumerate(genes["human"])]
    (tmp_path / "table.tsv").write_text("key\ttoken\tmedian\n<pad>\t0\t\n<mask>\t1\t\n" + "".join(lines))
    table = ruled(settings, medians={}, dictionaries={"all": str(tmp_path / "table.tsv")})
    both = {
        "first": settings,
        "table": table,
        "given": ruled(table, dictionaries={"all": f"{tmp_path}/human_tokens.pkl"}),
    }
    given = dataclasses.replace(settings.vocab, medians=str(tmp_path / "table.tsv"))
    hashes = {
        name: Vocabulary.load(made(s, tmp_path, f"one-{name}", sources=settings.sources[:1], vocab=given if name == "given" else Vocab())).hash
        for name, s in both.items()
    }  # fmt: skip
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imports": {"dictionaries": {}}}, r"imports\.dictionaries = \{\}: none for sources\[0\] \('h', human\); add human=URI"),
        ({"imports": {"dictionaries": {"rat": "x.pkl"}}}, r"imports\.dictionaries = rat=x\.pkl: no such source or species; must be one of h, human, m, mouse"),
        ({"imports": {"dictionaries": {"all": "x.pkl"}}}, r"imports\.dictionaries = 'x\.pkl': no such file"),
        ({"imports": {"medians": {"human": "x.pkl"}}}, r"imports\.medians = 'x\.pkl': no such file"),
        ({"imports": {"dictionaries": {"all": "{tmp}/mouse_tokens.pkl"}}}, r"none of its 40 genes is one of human \(source 'h'\); they are like ENSMUSG"),
        ({"tokens": Tokens(max_len=20, scaling="multiply")}, r"tokens\.scaling = 'multiply': imported sentences are ranked already"),
        ({"sources": ()}, r"sources = \(\): must name at least one tokenised Arrow data set"),
        ({"sources": (Source(uri="x", species="human", layer="raw"),)}, r"sources\[0\]\.layer = 'raw': means nothing for tokenised data"),
        ({"sources": (Source(uri="{tmp}/h.dataset", species="human", obs=("kind",)),)}, r"sources\[0\]\.obs = 'kind': no such column; it has cell_type, organ_major, age"),
        ({"sources": (Source(uri="no.dataset", species="human"),)}, r"no\.dataset: no such file or folder"),
        ({"qc": QC(min_genes=50)}, r"qc\.min_genes = 50: none of 57 cells"),
    ],
    ids=["no-dictionary", "name", "missing", "medians", "species", "scaling", "no-source", "layer", "obs", "uri", "min-genes"],
)  # fmt: skip
def test_what_is_given_wrongly_is_one_line(world, tmp_path, change, message):
    settings, _, _ = world

    def filled(value):
        return value.replace("{tmp}", str(tmp_path))

    if "imports" in change:
        settings = ruled(settings, **{k: {n: filled(u) for n, u in v.items()} for k, v in change["imports"].items()})
        change = {}
    if "sources" in change:
        change = {"sources": tuple(dataclasses.replace(s, uri=filled(s.uri)) for s in change["sources"])}
    with pytest.raises(UserError, match=message) as caught:
        made(settings, tmp_path, **change)
    assert "\n" not in str(caught.value)
    assert not files.exists(f"{settings.output}/corpus")


def test_chosen_columns_get_new_names_and_ours_are_left_out(world, tmp_path):
    settings, _, numbers = world
    source = spoiled(tmp_path, numbers["human"], "x", n_counts=list(range(37)), organ=["o"] * 37)
    table = shards(made(settings, tmp_path, "all", sources=(source,)))
    assert {"cell_type", "organ"} < set(table.column_names)
    assert table["n_counts"].null_count == table.num_rows
    chosen = dataclasses.replace(source, obs=("cell_type",), rename={"cell_type": "kind", "n_counts": "depth"})
    table = shards(made(settings, tmp_path, "some", sources=(chosen,)))
    assert "organ" not in table.column_names
    assert table["depth"].to_pylist() == table["source_row"].to_pylist()
    assert set(table["kind"].to_pylist()) == {"t"}


# Object storage


@pytest.fixture
def bucket(s3_server, s3_settings):
    """A folder of a bucket of moto's server."""
    import boto3

    s3_settings(s3_server)
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="imports")
    return "s3://imports/x"


def test_object_storage_gives_the_bytes_of_the_disk(world, tmp_path, bucket):
    settings, _, _ = world
    expected = bytes_of(made(settings, tmp_path, "disk"))
    for path in sorted(tmp_path.glob("*.dataset/*")) + sorted(tmp_path.glob("*.pkl")):
        files.upload(path, f"{bucket}/{path.relative_to(tmp_path)}")

    def moved(text):
        return text.replace(str(tmp_path), bucket)

    remote = dataclasses.replace(
        ruled(
            settings, dictionaries={n: moved(uri) for n, uri in settings.imports.dictionaries.items()},
            medians={n: moved(uri) for n, uri in settings.imports.medians.items()},
        ),
        output=f"{bucket}/run", sources=tuple(dataclasses.replace(s, uri=moved(s.uri)) for s in settings.sources),
    )  # fmt: skip
    uri = import_corpus.run(remote, executor=LocalExecutor())
    found = bytes_of(uri)
    assert {k: v for k, v in found.items() if k != "imported.parquet"} == {
        k: v for k, v in expected.items() if k != "imported.parquet"
    }
    assert import_corpus.run(remote, executor=LocalExecutor()) == uri
    name = f"{bucket}/h.dataset/data-00001-of-00003.arrow"
    files.write_bytes(name, files.read_bytes(name)[:700])  # cut short: the data set is refused, not asked for again
    again = import_corpus.run(dataclasses.replace(remote, output=f"{bucket}/cut"), executor=LocalExecutor())
    (refused,) = artifacts.require(again, "corpus").details["refused"]
    assert "data-00001-of-00003.arrow: truncated or not an Arrow file" in refused["error"]


# Through the command line, to a trained model

SMALL = [
    "tokens.max_len=20", "qc.min_genes=5", "model.num_layers=1", "model.dim=16", "model.num_heads=2", "model.ffn_dim=16",
    "train.max_steps=3", "train.warmup_steps=1", "train.batch_cells=8", "compute.num_workers=1",
]  # fmt: skip
DICTIONARIES = "imports.dictionaries=human=human_tokens.pkl,mouse=mouse_tokens.pkl"
MEDIANS = "imports.medians=human=human_medians.pkl,mouse=mouse_medians.pkl"


def command(settings, name, *positional):
    changes = [*SMALL, f"tracking.uri={settings.tracking.uri}", *((DICTIONARIES, MEDIANS) if name == "import" else ())]
    return [name, *positional, "--output", "run", *(x for change in changes for x in ("--set", change))]


@pytest.mark.ray
def test_an_imported_corpus_is_inspected_trained_on_and_told_from_a_prepared_one(
    world, tmp_path, ray_local, capsys, monkeypatch
):
    settings, _, _ = world
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(settings, "import", "human=h.dataset", "mouse=m.dataset", "--debug")) == 0
    assert "next: mixgf pretrain --output run" in capsys.readouterr().out
    assert cli.main(["inspect", "run/corpus", "--debug"]) == 0
    out = capsys.readouterr().out
    assert "57" in out
    assert "55" in out
    corpus, small = Corpus("run/corpus"), parse.override(Config(), SMALL)
    model = MaskedModel(small.model, corpus.vocabulary.size, seed=0)
    rows = loop.fit(model, Pretraining(small, corpus), small.train, worker_group.LocalContext())
    losses = [value for _, _, name, value in rows if name == "loss"]
    assert len(losses) > 0
    assert np.isfinite(losses).all()
    assert corpus.obs(["cell_type", "n_counts"])["n_counts"].isna().all()
    assert cli.main(command(settings, "classify")) == 2
    refused = capsys.readouterr().err
    assert re.search(r"classify.models: .*pca_knn, pseudobulk, .* need raw counts, which the imported corpus", refused)
    assert "leave them out: --set classify.models=finetune,knn,probe" in refused


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_runs_on_an_imported_corpus(world, tmp_path, ray_local, monkeypatch):
    settings, _, _ = world
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(settings, "import", "human=h.dataset", "mouse=m.dataset", "--debug")) == 0
    assert cli.main([*command(settings, "pretrain"), "--debug"]) == 0
    assert artifacts.require("run/pretrain", "checkpoint").counts["steps"] == 3
    assert cli.main([*command(settings, "embed"), "--debug"]) == 0
    few = [
        "--set",
        "classify.models=knn,knn@untrained",
        "--set",
        "classify.min_class_fraction=0",
        "--set",
        "classify.splits=random",
    ]
    assert cli.main([*command(settings, "classify"), *few, "--debug"]) == 0
    states = [
        "--set",
        "perturb.start=cell_type == 't0'",
        "--set",
        "perturb.goal=cell_type == 't1'",
        "--set",
        "perturb.max_genes=2",
    ]
    assert cli.main([*command(settings, "perturb"), *states, "--debug"]) == 0
    assert cli.main([*command(settings, "report"), *few, *states, "--debug"]) == 0


def test_help_and_printed_config_show_the_section(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["import", "--help"])
    assert 'imports.unknown_ids = "refuse"' in capsys.readouterr().out
    assert (
        cli.main(["import", "human=a", "--set", "imports.dictionaries=human=s3://b/a=b.pkl,x.pkl", "--print-config"])
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["imports"]["dictionaries"] == {"human": "s3://b/a=b.pkl", "all": "x.pkl"}
    assert checks.split_named("s3://b/a=b.pkl") == ("", "s3://b/a=b.pkl")
    with pytest.raises(UserError, match=r"imports\.outside = 'drop': must be one of 'refuse', 'count'"):
        Imports(outside="drop")
    with pytest.raises(UserError, match=r"imports\.medians = 'human=a,human=b': must be a JSON object"):
        parse.override(Config(), ["imports.medians=human=a,human=b"])
    assert to_dict(Config())["imports"]["dictionaries"] == {}


def test_the_published_table_gives_back_its_genes(tmp_path, tracking_uri):
    path = SHARED / "data" / "tables" / "geneformer" / "geneformer_v1_30M_tokens_medians.tsv.gz"
    if not path.exists():
        pytest.skip(f"no {path}: set MIXGF_SHARED to a checkout of the shared data")
    rng = np.random.default_rng(1)
    sentences = [rng.choice(25_424, 300, replace=False) + 2 for _ in range(20)]
    write_dataset(tmp_path / "g.dataset", [s.tolist() for s in sentences], {"cell_type": ["x"] * 20})
    settings = Config(
        output=str(tmp_path / "run"), sources=(Source(uri=str(tmp_path / "g.dataset"), species="human"),),
        imports=Imports(dictionaries={"all": str(path)}, outside="refuse"), tracking=Tracking(uri=tracking_uri),
    )  # fmt: skip
    uri = import_corpus.run(settings, executor=LocalExecutor())
    vocabulary = Vocabulary.load(uri)
    assert vocabulary.size == 25_424 + 3
    names = vocabulary.genes()
    import gzip

    with gzip.open(path, "rt") as file:
        published = {int(row.split("\t")[1]): row.split("\t")[0] for row in file.readlines()[1:]}
    for cell, ids in zip(shards(uri)["tokens"].to_pylist(), sentences, strict=True):
        assert [names[t] for t in cell] == [published[i] for i in ids.tolist()]
