"""Laws of records: no output without one, equal plans are no-ops, unequal ones are refused with their differences."""

import pytest

from mixgf.errors import UserError
from mixgf.storage import artifacts, files


def make(config=None, parents=None, kind="corpus", schema=1):
    return artifacts.plan(kind, schema, config or {"tokens": {"max_len": 8}}, parents or {})


def test_an_artifact_is_visible_only_when_its_record_is(tmp_path):
    uri = str(tmp_path / "corpus")
    assert artifacts.begin(uri, make())
    files.write_bytes(files.join(uri, "index.parquet"), b"x")
    with pytest.raises(UserError, match=r"no finished corpus \(unfinished\); run `mixgf prepare` first"):
        artifacts.require(uri, "corpus")
    assert artifacts.begin(uri, make()), "the same plan goes on"
    artifacts.finish(uri, make(), counts={"kept": 3})
    assert artifacts.require(uri, "corpus").counts == {"kept": 3}
    assert not artifacts.begin(uri, make()), "the same plan again is a no-op"


@pytest.mark.parametrize("finished", [False, True])
def test_another_plan_is_refused_with_the_fields_that_differ(tmp_path, finished):
    uri = str(tmp_path / "corpus")
    artifacts.begin(uri, make())
    if finished:
        artifacts.finish(uri, make())
    with pytest.raises(
        UserError, match=r"holds another corpus: config\.tokens\.max_len: 8 -> 16\. Choose another output"
    ):
        artifacts.begin(uri, make({"tokens": {"max_len": 16}}))
    with pytest.raises(UserError, match=r'parents\.vocabulary: null -> "abc"'):
        artifacts.begin(uri, make(parents={"vocabulary": "abc"}))


def test_the_fingerprint_covers_content_and_parents_but_not_time_or_code(monkeypatch):
    before = make()
    monkeypatch.setattr(artifacts, "code_version", lambda: "another")
    assert make().fingerprint == before.fingerprint
    others = [make({"a": 1}), make(parents={"x": "1"}), make(kind="embeddings"), make(schema=2)]
    assert len({before.fingerprint, *(o.fingerprint for o in others)}) == 5


def test_another_kind_schema_or_a_torn_record_is_refused(tmp_path):
    uri = str(tmp_path / "a")
    with pytest.raises(UserError, match=r"no finished checkpoint \(not there\); run `mixgf pretrain` first"):
        artifacts.require(uri, "checkpoint")
    artifacts.begin(uri, make())
    artifacts.finish(uri, make())
    with pytest.raises(UserError, match="holds a corpus, not a checkpoint"):
        artifacts.require(uri, "checkpoint")
    with pytest.raises(UserError, match="corpus of schema 1, this mixgf reads 2"):
        artifacts.require(uri, "corpus", schema=2)
    files.write_bytes(files.join(uri, "record.json"), b'{"kind": "cor')
    with pytest.raises(UserError, match="not a readable record"):
        artifacts.find(uri)


def test_a_plan_takes_the_place_of_what_it_includes_and_the_old_record_stays_until_then(tmp_path):
    uri, small, large = str(tmp_path / "a"), make({"models": ["x"]}), make({"models": ["x", "y"]})

    def includes(there):
        return set(there.config["models"]) < {"x", "y"}

    artifacts.begin(uri, small)
    artifacts.finish(uri, small)
    assert artifacts.begin(uri, large, replaces=includes)
    assert artifacts.find(uri).fingerprint == small.fingerprint, "still there to be read"
    assert artifacts.begin(uri, large, replaces=includes), "killed and given again"
    assert not artifacts.begin(uri, small), "the old one is finished, and nothing was lost"
    artifacts.reopen(uri)
    assert artifacts.find(uri) is None
    artifacts.finish(uri, large)
    assert artifacts.find(uri).fingerprint == large.fingerprint
    with pytest.raises(UserError, match=r"holds another corpus: config\.models"):
        artifacts.begin(uri, small)
    unfinished = str(tmp_path / "b")
    artifacts.begin(unfinished, small)
    assert artifacts.begin(unfinished, large, replaces=includes), "a plan that was not finished may grow, too"
    with pytest.raises(UserError, match="holds another corpus"):
        artifacts.begin(unfinished, small)


def test_a_run_that_died_between_its_record_and_the_end_of_its_plan_is_finished(tmp_path):
    uri, record = str(tmp_path / "a"), make()
    artifacts.begin(uri, record)
    plan = files.read_bytes(files.join(uri, "plan.json"))
    artifacts.finish(uri, record)
    files.write_bytes(files.join(uri, "plan.json"), plan)
    assert not artifacts.begin(uri, record)
