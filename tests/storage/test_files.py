"""Laws of storage: atomic, deterministic, the same on disk and on S3 (moto's server: real HTTP on loopback)."""

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from mixgf.errors import StorageError, UserError
from mixgf.storage import files, retry, tables


def test_what_is_written_is_read_listed_and_removed(root):
    uri = files.join(root, "a", "b.json")
    assert not files.exists(uri)
    files.write_json(uri, {"x": [1, 2]})
    files.write_bytes(files.join(root, "a", "c.bin"), b"0123456789")
    assert files.read_json(uri) == {"x": [1, 2]}
    assert files.list_dir(files.join(root, "a")) == ["b.json", "c.bin"]
    assert files.list_dir(uri) == []  # a file is no folder
    assert files.glob(files.join(root, "a", "*.bin")) == [files.join(root, "a", "c.bin")]
    assert files.size(files.join(root, "a", "c.bin")) == 10
    with files.open_read(files.join(root, "a", "c.bin"), block_size=4) as file:
        file.seek(6)
        assert file.read(3) == b"678"
    with files.local_copy(uri) as path:
        assert Path(path).read_text() == '{\n "x": [\n  1,\n  2\n ]\n}\n'
    files.write_json(uri, 3)  # a reader never sees a stale listing or an old object
    assert files.read_json(uri) == 3
    files.remove(files.join(root, "a"))
    assert files.list_dir(files.join(root, "a")) == []
    files.remove(files.join(root, "a"))  # nothing there is fine


def test_the_same_table_gives_the_same_bytes(root):
    table = pa.table({"tokens": pa.array([[3, 1], [2]], pa.list_(pa.int32())), "cell": ["a", "b"]})
    first = tables.write_table(files.join(root, "t1.parquet"), table)
    assert tables.write_table(files.join(root, "t2.parquet"), table) == first
    assert (files.size(files.join(root, "t1.parquet")), files.sha256(files.join(root, "t1.parquet"))) == first
    assert tables.read_table(files.join(root, "t1.parquet")).equals(table)
    assert tables.read_table(files.join(root, "t1.parquet"), columns=["cell"]).column_names == ["cell"]


def test_of_several_who_create_a_file_one_succeeds(root):
    uri = files.join(root, "claim")
    assert files.create_bytes(uri, b"first")
    assert not files.create_bytes(uri, b"second")
    assert files.read_bytes(uri) == b"first"
    assert files.list_dir(root) == ["claim"]


def test_a_writer_killed_in_the_middle_leaves_the_old_file_whole(tmp_path):
    uri = str(tmp_path / "f")
    files.write_bytes(uri, b"old")
    code = (
        "import os, signal; from pathlib import Path; from mixgf.storage import files as storage\n"
        "Path.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"storage.write_bytes({uri!r}, b'new' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert files.read_bytes(uri) == b"old"
    assert files.list_dir(str(tmp_path)) == ["f"]  # the torn temporary is not listed


def test_two_drivers_that_tidy_one_folder_at_the_same_time_both_end(tmp_path):
    root, mine, left = str(tmp_path / "run"), re.compile(r"work/\d+/\d+"), []

    def tidy(start):
        start.wait()
        left.append((files.remove_matching(root, mine), files.list_dir(files.join(root, "work")), files.find(root)))

    for _ in range(5):
        for number in range(200):
            files.write_bytes(files.join(root, "work", str(number % 7), str(number)), b"")
        start = threading.Barrier(3)
        with ThreadPoolExecutor(3) as threads:
            for done in [threads.submit(tidy, start) for _ in range(3)]:
                done.result()
    assert left == [([], [], {})] * 15


def test_an_unknown_storage_is_refused():
    with pytest.raises(UserError, match="tape:// is not a known storage"):
        files.exists("tape://x/y")


def test_resources_travel_with_the_package():
    assert files.exists("resource:orthologs.parquet")
    assert files.glob("resource:nothing.parquet") == []


def test_a_corpus_on_s3_is_inspected_like_one_on_disk(s3, make_corpus):
    from mixgf.corpus import summary

    uri = make_corpus([5, 9, 7, 3], [0, 0, 1, 1], [2, 2])
    there = f"{s3}/inspected/corpus"
    for name in ("record.json", "vocabulary.parquet", "shards/00000.parquet", "shards/00001.parquet"):
        files.upload(Path(uri) / name, f"{there}/{name}")
    assert summary.summarise_corpus(there) == summary.summarise_corpus(uri) | {"uri": there}
    with pytest.raises(
        UserError, match=rf"{s3}/inspected: the folder of a whole run, not a corpus; its corpus is {there}"
    ):
        summary.summarise_corpus(f"{s3}/inspected")


def test_small_reads_from_object_storage_run_together_in_order_and_not_far_ahead(monkeypatch):
    monkeypatch.setattr(files, "REMOTE_READS", 4)
    together, begun = threading.Barrier(4, timeout=30), []

    def read(item):
        begun.append(item)
        together.wait()
        return item * 10

    found = files.map_reads("s3://bucket/work", read, range(12))
    assert [next(found) for _ in range(3)] == [0, 10, 20]
    assert len(begun) <= 3 + 4
    assert list(found) == [item * 10 for item in range(3, 12)]
    assert sorted(begun) == list(range(12))
    assert list(files.map_reads("/disk", lambda item: (item, threading.current_thread()), "ab")) == [
        (item, threading.main_thread()) for item in "ab"
    ]


@pytest.mark.parametrize(("times", "asked"), [(0, 1), (2, 3), (9, 3)])
def test_an_answer_of_any_object_store_that_is_cut_short_is_asked_for_again(monkeypatch, times, asked):
    from fsspec.implementations.memory import MemoryFileSystem

    whole, answers = MemoryFileSystem.cat_file, []

    def short(self, path, **options):
        data = whole(self, path, **options)
        answers.append(data[: len(data) // 2] if len(answers) < times else data)
        return answers[-1]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", short)
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    uri = f"memory://cut/{times}.bin"
    files.write_bytes(uri, b"0123456789")
    if times < asked:
        assert files.read_bytes(uri) == b"0123456789"
    else:
        with pytest.raises(StorageError, match=r"memory://cut/9\.bin: .*broke off after 5 of 10 bytes"):
            files.read_bytes(uri)
    assert len(answers) == asked
