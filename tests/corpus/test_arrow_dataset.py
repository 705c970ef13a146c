"""Laws of tokenised Arrow data sets: either IPC form, any integer width, any cut into batches gives the same sentences."""

import json
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pytest

from mixgf.corpus import arrow_dataset, remap_ids
from mixgf.errors import UserError
from mixgf.genes.token_dictionaries import TokenDictionary
from mixgf.genes.vocabulary import SpeciesGenes

SENTENCES = [[7, 3, 5], [], [3, 9, 7, 5], [5], [9, 3], [7, 5]]


def write(path, table, form="stream", rows=2):
    """One .arrow file with batches of `rows` rows."""
    make = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[form]
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return str(path)


def tokenised(kind=None, sentences=SENTENCES, **columns):
    kind = pa.list_(pa.int16()) if kind is None else kind
    lengths = [len(s) for s in sentences]
    return pa.table({"input_ids": pa.array(sentences, kind), "length": lengths} | columns)


def read(uri):
    with arrow_dataset.files.open_arrow(uri) as file:
        where = arrow_dataset.find_batches(file, uri)
        schema = arrow_dataset.read_schema(file, where, uri)
        arrow_dataset.check_schema(schema, uri)
        return schema, list(arrow_dataset.read_batches(file, where, uri))


def unpacked(values, offsets):
    return [values[a:b].tolist() for a, b in pairwise(offsets)]


# Files


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int16()), pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.uint16())], ids=str
)
def test_any_form_width_and_cut_gives_the_same_sentences(tmp_path, form, rows, kind):
    _, found = read(write(tmp_path / "a.arrow", tokenised(kind), form, rows))
    assert len(found) == -(-len(SENTENCES) // rows)
    assert list(chain.from_iterable(unpacked(*arrow_dataset.read_ids(b, "a", 0)) for b in found)) == SENTENCES
    sliced = found[0].slice(1) if rows > 1 else found[2]
    assert unpacked(*arrow_dataset.read_ids(sliced, "a", 0))[0] == SENTENCES[1 if rows > 1 else 2]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_every_batch_is_read_alone_with_its_dictionaries_and_compression(tmp_path, form):
    table = tokenised(cell_types=pa.array(list("abcabc")).dictionary_encode())
    make = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[form]
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)
    uri = str(tmp_path / "a.arrow")
    with arrow_dataset.files.open_arrow(uri) as file:
        where = arrow_dataset.find_batches(file, uri)
        last = arrow_dataset.read_batch(file, where, 2, uri)  # without the ones before it
        attribute = arrow_dataset.find_attributes(arrow_dataset.read_schema(file, where, uri))[0]["cell_types"]
    assert unpacked(*arrow_dataset.read_ids(last, uri, 4)) == SENTENCES[4:]
    assert attribute.read(last).to_pylist() == ["b", "c"]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_a_file_cut_anywhere_is_refused(tmp_path, form):
    whole = (tmp_path / "a.arrow", write(tmp_path / "a.arrow", tokenised(), form))[0].read_bytes()
    for end in [0, 3, 8, 40, *range(100, len(whole), 97), len(whole) - 8, len(whole) - 1]:
        (tmp_path / "b.arrow").write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"b\.arrow: (truncated or not an Arrow file|an empty file)") as caught:
            read(str(tmp_path / "b.arrow"))
        assert "\n" not in str(caught.value)


def test_a_data_set_is_what_state_json_lists_in_its_order(tmp_path):
    folder = tmp_path / "some.dataset"
    folder.mkdir()
    for name in ("data-00000.arrow", "data-00001.arrow", "cache-1.arrow"):
        write(folder / name, tokenised())
    assert [u.rsplit("/", 1)[1] for u in arrow_dataset.data_files(str(folder))] == [
        "cache-1.arrow",
        "data-00000.arrow",
        "data-00001.arrow",
    ]
    state = {
        "_data_files": [{"filename": "data-00001.arrow"}, {"filename": "data-00000.arrow"}],
        "_indices_files": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    assert [u.rsplit("/", 1)[1] for u in arrow_dataset.data_files(str(folder))] == [
        "data-00001.arrow",
        "data-00000.arrow",
    ]
    assert arrow_dataset.data_files(str(folder / "cache-1.arrow")) == [str(folder / "cache-1.arrow")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"state.json": '{"_data_files": [{"filename": "gone.arrow"}]}'},
            r"gone\.arrow, which state\.json lists, is missing",
        ),
        ({"state.json": "{}"}, r"state\.json: not one of save_to_disk \(KeyError"),
        ({"state.json": "x"}, r"state\.json: not one of save_to_disk"),
        ({"state.json": '{"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}'}, r"flatten_indices"),
        ({"dataset_dict.json": '{"splits": ["train", "test"]}'}, r"give one of them: \S+/train, \S+/test"),
        ({"readme.txt": ""}, r"no \.arrow file in it"),
    ],
    ids=["missing", "other", "text", "indexed", "splits", "empty"],
)
def test_what_is_no_data_set_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        arrow_dataset.data_files(str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere: no such file or folder; give a folder that save_to_disk wrote"):
        arrow_dataset.data_files(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"tokens": [[1]]}), r"no column input_ids; it has tokens"),
        (pa.table({"input_ids": [1]}), r"input_ids is int64; must be a list of integers"),
        (pa.table({"input_ids": [[1.0]]}), r"input_ids is list<\w+: double>; must be"),
        (pa.table({"input_ids": [[1]], "length": ["1"]}), r"length is string; must be integers"),
        (pa.table({"input_ids": [[1], None]}), r"row 1: input_ids is null"),
        (pa.table({"input_ids": [[1, None]]}), r"null among input_ids"),
    ],
    ids=["no-ids", "flat", "floats", "length", "null-row", "null-id"],
)
def test_columns_of_another_kind_are_refused(tmp_path, table, message):
    def use():
        _, found = read(write(tmp_path / "a.arrow", table))
        arrow_dataset.read_ids(found[0], "a", 0)

    with pytest.raises(UserError, match=message):
        use()


def test_attributes_become_text_and_numbers_and_class_labels_their_names(tmp_path):
    features = {"organ": {"names": ["brain", "liver"], "_type": "ClassLabel"}, "input_ids": {"_type": "Sequence"}}
    table = tokenised(
        organ=pa.array([0, 1, None, 1, -1, 0]), age=pa.array([1, None, 3, 4, 5, 6], pa.int8()), score=pa.array([0.5] * 6, pa.float32()),
        cell_types=list("abcdef"), healthy=[True, False, None, True, True, True], spots=[[1]] * 6,
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})  # fmt: skip
    schema, (batch,) = read(write(tmp_path / "a.arrow", table, rows=100))
    found, left_out = arrow_dataset.find_attributes(schema)
    assert left_out == ["spots"]
    values = {name: a.read(batch).to_pylist() for name, a in found.items()}
    assert values == {
        "organ": ["brain", "liver", None, "liver", None, "brain"], "age": [1, None, 3, 4, 5, 6], "score": [0.5] * 6,
        "cell_types": list("abcdef"), "healthy": ["true", "false", None, "true", "true", "true"],
    }  # fmt: skip
    for broken in (b"{", b"[]", b'{"info": null}'):
        assert arrow_dataset.find_attributes(schema.with_metadata({b"huggingface": broken}))[0]["organ"].kind == "int"


# Ids


@pytest.fixture
def ids():
    """A dictionary of four genes and its specials; `d` is not in the vocabulary, whose ids run the other way."""
    dictionary = TokenDictionary(
        "d", {"a": 4, "b": 5, "c": 9, "d": 11}, {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
    )
    genes = SpeciesGenes(np.asarray(["c", "b", "a"], dtype=object), np.asarray([3, 6, 7], dtype=np.int32), np.ones(3))
    return remap_ids.token_of_id(dictionary, {name: name for name in "abcd"}, genes)


def translate(table, sentences, longest=10, kind=np.int16):
    values = np.asarray(list(chain.from_iterable(sentences)), dtype=kind)
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sentences])]).astype(np.int64)
    found = remap_ids.remap_ids(values, offsets, table, size=8, longest=longest)
    kept = np.minimum(found.genes_N, longest)
    assert sum(found.counts.values()) == len(values)
    assert found.counts["kept"] == kept.sum() == len(found.tokens)
    return unpacked(found.tokens, np.concatenate([[0], np.cumsum(kept)])), found


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.int64, np.uint16])
def test_ids_are_translated_in_order_and_cut_after_that(ids, kind):
    sentences = [[9, 4, 5], [], [5], [4, 9]]
    assert translate(ids, sentences, kind=kind)[0] == [[3, 7, 6], [], [6], [7, 3]]
    cut, found = translate(ids, sentences, longest=2, kind=kind)
    assert cut == [[3, 7], [], [6], [7, 3]]
    assert found.genes_N.tolist() == [3, 0, 1, 2]
    assert found.counts["truncated"] == 1


def test_specials_stand_at_the_front_or_the_end_and_are_no_genes(ids):
    out, found = translate(ids, [[2, 9, 4, 3], [9, 0, 0], [2, 5, 3, 0], [0], [2], []])
    assert out == [[3, 7], [3], [6], [], [], []]
    assert found.counts == {"kept": 4, "special": 9, "unknown": 0, "outside": 0, "duplicate": 0, "truncated": 0}


@pytest.mark.parametrize(
    ("sentence", "kind", "at"),
    [
        ([9, 1, 4], "unknown", 1),  # <mask>
        ([9, 0, 4], "unknown", 1),  # <pad> between genes
        ([9, 2, 4], "unknown", 1),  # <cls> between genes
        ([9, 3, 4, 3], "unknown", 1),  # <eos> between genes
        ([9, 6, 4], "unknown", 1),  # a hole of the dictionary
        ([9, 12, 4], "unknown", 1),  # above it
        ([9, 30_000, 4], "unknown", 1),
        ([-1, 9, 4], "unknown", 0),
        ([9, 4, 11], "outside", 2),
        ([9, 4, 9], "duplicate", 2),
    ],
)
def test_what_is_left_out_is_counted_and_found(ids, sentence, kind, at):
    out, found = translate(ids, [[5], sentence])
    assert out == [[6], [3, 7]]
    assert found.counts[kind] == 1
    assert found.first[kind] == 1 + at
    assert all(v == -1 for name, v in found.first.items() if name != kind)


def test_a_gene_may_come_again_in_the_next_cell_and_one_beyond_the_cut_is_still_a_duplicate(ids):
    out, found = translate(ids, [[9, 4], [9, 4], [9, 4, 9, 4]], longest=1)
    assert out == [[3], [3], [3]]
    assert (found.counts["duplicate"], found.counts["truncated"]) == (2, 3)
