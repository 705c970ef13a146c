"""Files of a user are neither removed nor replaced: a folder with any of them is refused before work, whatever the artifact."""

import os
from pathlib import Path

import pytest

from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import artifacts, files, layout
from mixgf.training import checkpoints

FOREIGN = (
    "notes.txt",
    "my cells.h5ad",
    "shards/mine.parquet",
    "shards/00000.parquet.bak",
    "shards/000001.parquet",
    "work/notes.txt",
    "steps/00000001/notes.txt",
    "steps/2024/model.safetensors",
    "steps/00000001/model.safetensors/x",
    "cost/prices.csv",
    "parts/notes.txt",
    "Modell β/日本.txt",
    "..data/x",
    ".hidden",
    "record.json.old",
)
KINDS = sorted(set(layout._FILES) - {layout.ANNOTATION})


def put(folder: str, name: str) -> str:
    uri = files.join(folder, name)
    files.write_bytes(uri, f"of a user: {name}".encode())
    return uri


def is_whole(folder: str, name: str) -> bool:
    return files.read_bytes(files.join(folder, name)) == f"of a user: {name}".encode()


def plan_of(kind: str) -> artifacts.Record:
    return artifacts.plan(kind, 1, {"seed": 1}, {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_any_other_file_is_refused_before_a_plan_is_written_and_while_unfinished(tmp_path, kind):
    for i, name in enumerate(FOREIGN):
        uri = str(tmp_path / f"{i}")
        put(uri, name)
        with pytest.raises(UserError, match=r"holds files that mixgf did not make") as refusal:
            artifacts.begin(uri, plan_of(kind))
        assert "\n" not in str(refusal.value)
        assert files.list_dir(uri) == [name.split("/")[0]]
        assert is_whole(uri, name)
        uri = str(tmp_path / f"unfinished-{i}")
        assert artifacts.begin(uri, plan_of(kind))
        put(uri, name)
        with pytest.raises(UserError, match=r"holds files that mixgf did not make"):
            artifacts.begin(uri, plan_of(kind))
        artifacts.finish(uri, plan_of(kind))
        assert not artifacts.begin(uri, plan_of(kind)), "nothing is done in a finished artifact"


def test_only_own_files_are_removed_and_then_the_empty_folders(root):
    own = (
        "plan.json",
        "work/metrics/00001.parquet",
        "work/sources/00000.json",
        "shards/00000.parquet",
        "index.parquet",
    )
    kept = ("notes.txt", "work/notes.txt", "work/metrics/mine.parquet", "shards/mine/00000.parquet", ".DS_Store")
    uri = files.join(root, "corpus")
    for name in own:
        put(uri, name)
    layout.remove_own(uri, "corpus")
    assert not files.exists(uri)
    layout.remove_own(uri, "corpus")  # nothing there is fine
    for name in (*own, *kept):
        put(uri, name)
    layout.remove_own(uri, "corpus", scratch=True)
    assert all(is_whole(uri, name) for name in (*kept, "plan.json", "shards/00000.parquet", "index.parquet"))
    assert not any(files.exists(files.join(uri, name)) for name in own if name.startswith("work/"))
    layout.remove_own(uri, "corpus")
    assert {found.removeprefix(f"{uri}/") for found in files.find(uri)} == set(kept)
    assert all(is_whole(uri, name) for name in kept)


def test_temporary_files_of_a_killed_writer_go_and_links_are_not_followed(tmp_path):
    put(str(tmp_path / "user"), "00000.parquet")
    uri = tmp_path / "corpus"
    put(str(uri), "work/metrics/00000.parquet")
    (uri / "work/metrics" / f"{files._TEMPORARY}{'0' * 32}").touch()
    (uri / "work" / "sums").symlink_to(tmp_path / "user", target_is_directory=True)
    layout.remove_own(str(uri), "corpus", scratch=True)
    assert is_whole(str(tmp_path / "user"), "00000.parquet")
    assert not (uri / "work/metrics").exists()


def test_files_that_systems_put_into_folders_are_no_reason_to_refuse(tmp_path):
    for name in (".DS_Store", "shards/.DS_Store", ".nfs000000a1", "Thumbs.db", "shards/._x"):
        put(str(tmp_path), name)
    assert artifacts.begin(str(tmp_path), plan_of("corpus"))


@pytest.mark.parametrize("name", ["plan.json", "record.json"])
def test_a_folder_in_the_place_of_a_record_is_refused(tmp_path, name):
    put(str(tmp_path), f"{name}/x")
    with pytest.raises(UserError, match=rf"{name}: not a readable record"):
        artifacts.begin(str(tmp_path), plan_of("corpus"))
    assert is_whole(str(tmp_path), f"{name}/x")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    put(str(tmp_path), "corpus")
    with pytest.raises(UserError, match=r"corpus: is a file"):
        artifacts.begin(str(tmp_path / "corpus"), plan_of("corpus"))
    assert is_whole(str(tmp_path), "corpus")


def test_pruning_of_checkpoints_leaves_what_it_did_not_write(tmp_path):
    for step in (1, 2, 3):
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            put(str(tmp_path), f"steps/{step:08d}/{name}")
    for name in ("00000001/notes.txt", "1/model.safetensors", "2024/x", "000000001/state.json", "best/state.json"):
        put(str(tmp_path), f"steps/{name}")
    checkpoints.remove_old_steps(str(tmp_path), 1)
    assert checkpoints.complete_steps(str(tmp_path)) == [3]
    assert not (tmp_path / "steps/00000002").exists()
    assert os.listdir(tmp_path / "steps/00000001") == ["notes.txt"]  # noqa: PTH208
    for name in ("00000001/notes.txt", "1/model.safetensors", "2024/x", "000000001/state.json", "best/state.json"):
        assert is_whole(str(tmp_path), f"steps/{name}")


@pytest.mark.parametrize("name", ["notes.txt", "work/notes.txt", "shards/mine.parquet"])
@pytest.mark.parametrize("sources", ["all refused", "good"])
def test_prepare_neither_removes_nor_follows_what_it_finds(world, tmp_path, name, sources):
    config, _ = world
    if sources == "all refused":
        for source in config.sources:
            Path(source.uri).write_bytes(b"no cells")
    put(f"{config.output}/corpus", name)
    with pytest.raises(UserError, match=r"holds files that mixgf did not make"):
        prepare.run(config, executor=LocalExecutor())
    assert is_whole(f"{config.output}/corpus", name)
    assert not list(tmp_path.rglob("vocabulary.parquet"))


class Meddling(LocalExecutor):
    """Puts a user's files into the work folder while the stage runs."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def run(self, tasks):
        put(self.folder, "notes.txt")
        put(self.folder, "work/notes.txt")
        yield from super().run(tasks)


@pytest.mark.parametrize("sources", ["all refused", "good"])
def test_what_a_user_adds_while_prepare_runs_stays(world, sources):
    config, _ = world
    uri = f"{config.output}/corpus"
    if sources == "good":
        prepare.run(config, executor=Meddling(uri))
        assert artifacts.find(uri) is not None
        assert files.list_dir(f"{uri}/work") == ["notes.txt"]
    else:
        for source in config.sources:
            Path(source.uri).write_bytes(b"no cells")
        with pytest.raises(UserError, match=r"all 3 sources are refused"):
            prepare.run(config, executor=Meddling(uri))
        assert sorted(files.find(uri)) == [f"{uri}/notes.txt", f"{uri}/work/notes.txt"]
    assert is_whole(uri, "notes.txt")
    assert is_whole(uri, "work/notes.txt")
