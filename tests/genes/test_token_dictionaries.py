"""Laws of token and median dictionaries: every published form reads alike, and a pickle runs nothing of its own."""

import collections
import gzip
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixgf.config.data import HUMAN, MOUSE
from mixgf.errors import UserError
from mixgf.genes import token_dictionaries

TOKENS = {"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2, "ENSG00000000005": 9, "ENSMUSG00000000001": 300}
KINDS = {
    "int": int, "int16": np.int16, "int32": np.int32, "int64": np.int64, "uint16": np.uint16, "big": lambda v: np.dtype(">i4").type(v),
}  # fmt: skip
SHARED = Path(os.environ.get("MIXGF_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_dictionary_reads_as_whole_numbers_at_any_protocol_and_width(tmp_path, protocol, kind):
    for make in (dict, collections.OrderedDict, lambda items: collections.defaultdict(int, items)):
        path = tmp_path / "tokens.pkl"
        path.write_bytes(pickle.dumps(make({k: KINDS[kind](v) for k, v in TOKENS.items()}), protocol=protocol))
        found = token_dictionaries.read_token_dictionary(str(path))
        assert found.genes | found.specials == TOKENS
        assert set(map(type, found.genes.values())) == {int}
        assert list(found.specials) == ["<pad>", "<mask>"]


def test_names_of_older_numpy_read_alike(tmp_path):
    """numpy 1 wrote numpy.core.multiarray where numpy 2 writes numpy._core.multiarray."""
    new = pickle.dumps({"ENSG00000000003": np.int16(-2)}, protocol=0)
    assert b"numpy._core.multiarray" in new
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert (
        token_dictionaries.load_pickle(old, "x") == token_dictionaries.load_pickle(new, "x") == {"ENSG00000000003": -2}
    )


def test_json_tsv_and_parquet_say_what_the_pickle_says(tmp_path):
    medians = {"ENSG00000000003": 2.5, "ENSG00000000005": 0.125, "ENSMUSG00000000001": 3.0}
    (tmp_path / "t.json").write_text(json.dumps(TOKENS))
    (tmp_path / "m.json").write_text(json.dumps(medians))
    (tmp_path / "m.pkl").write_bytes(
        pickle.dumps({k: np.float64(v) for k, v in medians.items()} | {"<pad>": None, "X": float("nan")})
    )
    rows = [f"{k}\t{v}\t{medians.get(k, '')}\n" for k, v in TOKENS.items()]
    with gzip.open(tmp_path / "t.tsv.gz", "wt") as file:
        file.write("key\ttoken\tmedian\n" + "".join(rows))
    table = pa.table({"gene": list(TOKENS), "token": list(TOKENS.values()), "median": [medians.get(k) for k in TOKENS]})
    pq.write_table(table, tmp_path / "t.parquet")
    for name in ("t.json", "t.tsv.gz", "t.parquet"):
        found = token_dictionaries.read_token_dictionary(str(tmp_path / name))
        assert found.genes | found.specials == TOKENS
    for name in ("m.json", "m.pkl", "t.tsv.gz", "t.parquet"):
        assert token_dictionaries.read_medians(str(tmp_path / name)) == medians


class Malice:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize(
    ("call", "args", "named"),
    [
        (os.system, ("touch {mark}",), r"posix\.system"),
        (eval, ("open('{mark}', 'w')",), r"_*builtins?_*\.eval"),
        (getattr, (np, "load"), r"_*builtins?_*\.getattr"),
        (np.loadtxt, ("{mark}",), r"numpy\S*\.loadtxt"),
        (np.dtype, ("O",), r"numpy values of type 'O'"),
        (np.dtype, ("S5",), r"numpy values of type 'S5'"),
    ],
    ids=["system", "eval", "getattr", "numpy-function", "objects", "bytes"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_by_name_and_does_not_run(tmp_path, call, args, named, protocol):
    mark = tmp_path / "ran"
    payload = Malice(call, *(a.format(mark=mark) if isinstance(a, str) else a for a in args if a is not np))
    path = tmp_path / "tokens.pkl"
    path.write_bytes(pickle.dumps({"ENSG00000000003": payload}, protocol=protocol))
    with pytest.raises(UserError, match=rf"dictionary = '.*tokens\.pkl': refused: .*{named}.*JSON or TSV") as caught:
        token_dictionaries.read_token_dictionary(str(path))
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if call is os.system:  # the payload is a real one
        pickle.loads(path.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cnumpy\ndtype\n(S'i4'\nI00\nI01\ntR(I3\nS'boom'\nNNNI-1\nI-1\nI0\ntb.",  # a byte order that is none
        b"cnumpy\ndtype\nS'code'\nI1\ns.",  # an item set on our function
        b"(dN}S'__code__'\nI1\ns\x86b.",  # attributes set on a dictionary
        b"cnumpy\ndtype\nN}S'__code__'\nI1\ns\x86b.",  # attributes set on our function
        b"Pexternal\n.",
        b"\x82\x01.",  # the extension registry
        b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame longer than any file
        b"I1",
        b"",
        b"not a pickle",
    ],
    ids=["order", "item", "slots", "function", "persistent", "extension", "frame", "short", "empty", "text"],
)
def test_a_malformed_pickle_is_one_line(tmp_path, code):
    path = tmp_path / "tokens.pkl"
    path.write_bytes(code)
    with pytest.raises(UserError, match=r"refused: .* a pickled dictionary needs only text and numbers") as caught:
        token_dictionaries.read_token_dictionary(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["ENSG1"], r"holds a list; must be a dictionary"),
        ({7: "ENSG1"}, r"key 7 is not text; must be gene to token \(not token to gene\)"),
        ({"ENSG1": 1.5}, r"id of ENSG1 is 1\.5; must be a whole number"),
        ({"ENSG1": True}, r"id of ENSG1 is True"),
        ({"ENSG1": -1}, r"id of ENSG1 is -1"),
        ({"ENSG1": 1 << 40}, r"id of ENSG1 is 1099511627776; .*below 16,777,216"),
        ({"ENSG1": 5, "ENSG2": 5}, r"ENSG1 and ENSG2 have the same id 5"),
    ],
)
def test_what_is_no_token_dictionary_is_refused(tmp_path, value, message):
    path = tmp_path / "tokens.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=message):
        token_dictionaries.read_token_dictionary(str(path), "imports.dictionaries")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.tsv", "symbol\ttoken\nA\t1\n", r"has columns symbol, token; must have gene \(or key\) and token"),
        ("t.tsv", "gene\tmedian\nA\t1\n", r"no column token"),
        ("t.tsv", "gene\ttoken\nA\t1\nA\t2\n", r"'A' stands in it twice"),
        ("t.json", "[1", r"not JSON"),
        ("t.json", "[1]", r"holds a list"),
        ("t.tsv.gz", "plain", r"not a readable table"),
        ("t.parquet", "plain", r"t\.parquet: damaged .*another file"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        token_dictionaries.read_token_dictionary(str(tmp_path / name))


def test_a_median_must_be_above_0_and_a_missing_file_is_named(tmp_path):
    for value in (0, -1.0, float("inf"), "2"):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"ENSG1": value}))
        with pytest.raises(UserError, match=r"median of ENSG1 is .*; must be a number above 0"):
            token_dictionaries.read_medians(str(tmp_path / "m.pkl"))
    with pytest.raises(UserError, match=r"imports\.medians = 'no\.pkl': no such file"):
        token_dictionaries.read_medians("no.pkl", "imports.medians")


def test_genes_go_to_the_species_that_knows_them_and_lose_their_version():
    known = {"human": {"ENSG00000000003", "ODD.1"}, "mouse": {"ENSMUSG00000000001"}}
    names = [
        "ENSG00000000003.15",
        "ENSG99999999999",
        "ENSMUSG00000000001",
        "ODD.1",
        "ENSGR0000002586",
        "TSPAN6",
        "ENSRNOG00000000001",
    ]
    assert token_dictionaries.genes_of_species(names, "human", (HUMAN, MOUSE), known) == {
        "ENSG00000000003.15": "ENSG00000000003", "ENSG99999999999": "ENSG99999999999", "ODD.1": "ODD.1",
        "ENSGR0000002586": "ENSGR0000002586",
    }  # fmt: skip
    assert list(token_dictionaries.genes_of_species(names, "mouse", (HUMAN, MOUSE), known)) == ["ENSMUSG00000000001"]


@pytest.mark.parametrize(
    "name", ["geneformer_v1_30M_tokens_medians.tsv.gz", "geneformer_v2_95M_104M_tokens_medians.tsv.gz"]
)
def test_the_published_table_survives_a_pickle_as_published(tmp_path, name):
    path = SHARED / "data" / "tables" / "geneformer" / name
    if not path.exists():
        pytest.skip(f"no {path}: set MIXGF_SHARED to a checkout of the shared data")
    table, medians = token_dictionaries.read_token_dictionary(str(path)), token_dictionaries.read_medians(str(path))
    numbers = table.genes | table.specials
    (tmp_path / "t.pkl").write_bytes(pickle.dumps({k: np.int16(v) for k, v in numbers.items()}, protocol=4))
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({k: np.float64(v) for k, v in medians.items()}, protocol=4))
    again = token_dictionaries.read_token_dictionary(str(tmp_path / "t.pkl"))
    assert again.genes | again.specials == numbers
    assert token_dictionaries.read_medians(str(tmp_path / "m.pkl")) == medians
    if "v1" in name:
        assert (len(table.genes), len(medians), table.specials) == (25_424, 25_424, {"<pad>": 0, "<mask>": 1})
        assert table.genes["ENSG00000000003"] == 2
