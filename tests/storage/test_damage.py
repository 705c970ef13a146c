"""What is read is what was written: a damaged file is refused in one line, or read as it was; it never gives other values."""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from executors import dying

from mixgf.corpus import near_hashes
from mixgf.corpus.reader import Corpus
from mixgf.errors import DamagedError, UserError
from mixgf.execution import LocalExecutor
from mixgf.genes.vocabulary import Vocabulary
from mixgf.stages import prepare
from mixgf.storage import artifacts, files, sealed, tables


def flipped(data: bytes, bit: int) -> bytes:
    other = bytearray(data)
    other[bit // 8] ^= 1 << (bit % 8)
    return bytes(other)


def outcome(read, is_same) -> str:
    """The one line of a refusal; empty where the same is read as before."""
    try:
        found = read()
    except UserError as error:
        return str(error)
    assert is_same(found), "other values, in silence"
    return ""


def tried(path: Path, data: bytes, damages, read, is_same):
    """How often a file in damaged forms is refused, in one line that begins with its name, and how often it reads as before."""
    counts = {"refused": 0, "same": 0}
    for damage in damages:
        path.write_bytes(damage)
        line = outcome(read, is_same)
        assert not line or (line.startswith(str(path)) and "\n" not in line)
        counts["refused" if line else "same"] += 1
    path.write_bytes(data)
    return counts


def cut(data: bytes):
    return [b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\0", data[1:], b"PAR1", bytes(len(data))]


def some_table(num: int = 400) -> pa.Table:
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 30_000, rng.integers(1, 60)).astype(np.int32) for _ in range(num)]
    return pa.table({
        "tokens": pa.array(lists, pa.list_(pa.int32())), "cell": [f"c{i}" for i in range(num)], "x": rng.random(num),
        "species": pa.array(["human", None] * (num // 2)), "n": pa.array(rng.integers(0, 9, num)),
    })  # fmt: skip


OPTIONS = (
    {},
    {"compression": "none"},
    {"compression_level": 1, "use_dictionary": ["species"], "row_group_size": 150,
     "column_encoding": {"tokens.list.element": "BYTE_STREAM_SPLIT"}},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=["as tables", "plain", "as shards"])
def test_no_flipped_bit_of_a_table_gives_another_table(tmp_path, options):
    path, table = tmp_path / "t.parquet", some_table()
    size, digest = tables.write_table(str(path), table, **options)
    data = path.read_bytes()
    assert (size, digest) == (len(data), files.sha256(str(path)))
    draw = random.Random(5)
    bits = [draw.randrange(8 * size) for _ in range(250)] + [
        8 * size - 1 - draw.randrange(8 * 2_000) for _ in range(250)
    ]
    damages = [flipped(data, bit) for bit in bits] + cut(data)
    outcomes = tried(path, data, damages, lambda: tables.read_table(str(path)), table.equals)
    assert outcomes["same"] < 0.05 * len(damages)  # bits that mean nothing, such as those of the hash of unread pages
    outcomes = tried(path, data, damages, lambda: tables.read_table(str(path), sha256=digest), table.equals)
    assert outcomes["same"] == 0


def test_other_readers_of_parquet_read_the_tables(tmp_path):
    path, table = str(tmp_path / "t.parquet"), some_table()
    tables.write_table(path, table, row_group_size=100)
    assert pq.read_table(path).equals(table)
    assert pl.read_parquet(path).to_arrow().num_rows == table.num_rows
    pq.write_table(table, path)  # a table of another writer
    assert tables.read_table(path).equals(table)
    assert tables.read_table(path, ["x"]).column_names == ["x"]


def test_a_table_rewritten_with_other_values_is_not_the_one_that_was_written(tmp_path):
    uri = str(tmp_path / "t.parquet")
    _, digest = tables.write_table(uri, some_table())
    tables.write_table(uri, some_table().slice(1))
    with pytest.raises(UserError, match="other bytes than were written"):
        tables.read_table(uri, sha256=digest)


def test_no_flipped_bit_of_a_batch_file_gives_other_batches(tmp_path):
    path, table = tmp_path / "t.arrow", some_table().select(["n", "x"])
    tables.write_batches(str(path), table.schema, [table.slice(0, 250), table.slice(250)])
    data, draw = path.read_bytes(), random.Random(6)
    damages = [flipped(data, draw.randrange(8 * len(data))) for _ in range(400)] + cut(data)
    read = lambda: pa.Table.from_batches(list(tables.read_batches(str(path))))  # noqa: E731
    assert read().equals(table)
    assert tried(path, data, damages, read, table.equals)["same"] == 0


def test_no_flipped_bit_of_a_sealed_object_gives_another(tmp_path):
    path, value = (
        tmp_path / "record.json",
        {"kind": "corpus", "config": {"seed": 1, "tokens": [1.5, "x", None]}, "n": 12345},
    )
    sealed.write_sealed(str(path), value)
    data = path.read_bytes()
    damages = [flipped(data, bit) for bit in range(8 * len(data))] + cut(data)
    outcomes = tried(path, data, damages, lambda: sealed.read_sealed(str(path)), lambda found: found == value)
    assert outcomes["refused"] > 0.9 * len(damages)  # the rest are blanks
    path.write_text(json.dumps(value))  # of an earlier version
    assert sealed.read_sealed(str(path)) == value


def content(uri: str):
    """All that a corpus says, by the readers of the stages."""
    corpus = Corpus(uri)
    tokens, offsets = corpus.tokens(np.arange(corpus.num_cells))
    vocabulary = Vocabulary.load(uri)
    return (
        tokens.tolist(), offsets.tolist(), corpus.obs().astype(str).to_numpy().tolist(), corpus.record.details["sources"],
        corpus.species_N.tolist(), vocabulary.table.to_pydict(), corpus.record.counts, corpus.vocabulary.hash,
        artifacts.read_artifact_table(uri, "hashes").to_pydict(),
        [block.tolist() for block in near_hashes.blocks(uri, None)],
    )  # fmt: skip


def test_no_flipped_bit_in_a_corpus_gives_another_corpus(world):
    config, _ = world
    uri = prepare.run(config, executor=LocalExecutor())
    expected, draw = content(uri), random.Random(7)
    for found in files.find(uri):
        if (
            found.endswith(("mapping.parquet", "dropped.parquet", "doublets.parquet", "near_duplicates.parquet"))
            or "/cost/" in found
        ):
            continue
        path = Path(found)
        data = path.read_bytes()
        damages = [flipped(data, draw.randrange(8 * len(data))) for _ in range(12)] + cut(data)
        refused = 0
        for damage in damages:
            path.write_bytes(damage)
            line = outcome(lambda: content(uri), lambda found: found == expected)
            refused += bool(line)
            assert not line or (uri in line and "\n" not in line)
        assert refused > 0.5 * len(damages)
        path.write_bytes(data)
    assert content(uri) == expected


def test_reversed_sentences_are_refused_with_the_way_to_make_them_again(world):
    config, _ = world
    uri = prepare.run(config, executor=LocalExecutor())
    shard = Corpus(uri).shard_uri(0)
    table = tables.read_table(shard)
    reverse = pa.array([tokens[::-1] for tokens in table["tokens"].to_pylist()], table["tokens"].type)
    tables.write_table(shard, table.set_column(0, table.schema.field("tokens"), reverse))
    with pytest.raises(
        UserError, match=rf"{shard}: damaged .*; restore it from a copy, or remove {uri} and .*`mixgf prepare`"
    ):
        Corpus(uri).tokens([0])


@pytest.mark.parametrize("damage", ["empty", "half"])
def test_one_damaged_file_of_an_unfinished_stage_is_made_again_whichever_it_is(world, whole_corpus, tmp_path, damage):
    config, _ = world
    with pytest.raises(KeyboardInterrupt):
        prepare.run(config, executor=dying(30, []))
    begun, seen = Path(config.output), set()
    same = [files.sha256(f"{whole_corpus}/shards/{name}") for name in files.list_dir(f"{whole_corpus}/shards")]
    for name in files.names_in(f"{begun}/corpus"):
        kind = re.sub(r"\d+", "", name)
        if kind in seen or name == "plan.json":
            continue
        seen.add(kind)
        other = dataclasses.replace(config, output=str(tmp_path / "other"))
        shutil.copytree(begun, other.output)
        path = Path(other.output) / "corpus" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "half" else 0])
        uri = prepare.run(other, executor=LocalExecutor())
        assert [files.sha256(f"{uri}/shards/{n}") for n in files.list_dir(f"{uri}/shards")] == same, name
        shutil.rmtree(other.output)
    assert {"work/facts/.parquet", "work/refused/.json", "work/group_metrics/.parquet"} <= seen


@pytest.mark.parametrize("damage", ["empty", "half", "gone"])
@pytest.mark.parametrize("after", [3, 9, 14, 20, 27])
def test_damaged_files_of_an_unfinished_stage_are_made_again(world, whole_corpus, after, damage):
    config, _ = world
    with pytest.raises(KeyboardInterrupt):
        prepare.run(config, executor=dying(after, []))
    for found in files.find(f"{config.output}/corpus"):
        if not found.endswith("plan.json"):
            path = Path(found)
            data = path.read_bytes()
            path.unlink()
            if damage != "gone":
                path.write_bytes(data[: len(data) // 2] if damage == "half" else b"")
    uri = prepare.run(config, executor=LocalExecutor())
    assert content(uri)[:3] == content(whole_corpus)[:3]
    same = files.list_dir(f"{uri}/shards")
    assert [files.sha256(f"{uri}/shards/{name}") for name in same] == [
        files.sha256(f"{whole_corpus}/shards/{name}") for name in same
    ]


def test_nothing_but_storage_opens_parquet():
    import ast

    import mixgf

    root = Path(mixgf.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.parent.name == "storage":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            assert name not in {"read_parquet", "scan_parquet", "ParquetFile", "read_metadata", "ParquetDataset"}, (
                f"{path}:{node.lineno}"
            )


class Damaging(LocalExecutor):
    """Flips bits in the middle of a part as soon as it is there."""

    def __init__(self, part: Path) -> None:
        self.part = part

    def run(self, tasks):
        for receipt in super().run(tasks):
            yield receipt
            if self.part.exists():
                data = self.part.read_bytes()
                middle = len(data) // 2
                self.part.write_bytes(data[:middle] + bytes(8) + data[middle + 8 :])


def test_no_source_is_left_out_for_a_damaged_part_of_the_work(world, whole_corpus):
    config, _ = world
    part = Path(f"{config.output}/corpus/work/sources/00001.parquet")
    with pytest.raises(DamagedError, match=rf"^{part}: damaged .*; remove it, and the command"):
        prepare.run(config, executor=Damaging(part))
    part.unlink()
    uri = prepare.run(config, executor=LocalExecutor())
    assert artifacts.require(uri, "corpus").details["refused"] == []
    for name in files.list_dir(f"{uri}/shards"):
        assert files.sha256(f"{uri}/shards/{name}") == files.sha256(f"{whole_corpus}/shards/{name}")
