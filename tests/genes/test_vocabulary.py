"""Laws of the vocabulary: order of ids, sharing, hash, look-ups, imported medians."""

import gzip

import numpy as np
import pyarrow as pa
import pytest

from mixgf.config.data import SpeciesRow
from mixgf.errors import UserError
from mixgf.genes import vocabulary
from mixgf.storage import tables


def table(genes):
    return pa.table({"gene": genes, "symbol": [g.lower() for g in genes], "biotype": ["protein_coding"] * len(genes)})


MEDIANS = {"zebra": {"Z2": 2.0, "Z1": 1.0}, "ant": {"A1": 3.0, "A3": 1.5, "A2": 1.0}}
TABLES = {"zebra": table(["Z1", "Z2"]), "ant": table(["A1", "A2", "A3"])}
PAIRS = {("zebra", "ant"): {"Z2": "A1"}, ("ant", "zebra"): {"A1": "Z2"}}


def build(sharing="separate", medians=MEDIANS):
    return vocabulary.build_vocabulary(medians, TABLES, sharing=sharing, orthologs=PAIRS)


def test_ids_follow_the_specials_by_species_then_by_gene():
    v = build()
    assert v.genes() == ["<pad>", "<mask>", "<cls>", "Z1", "Z2", "A1", "A2", "A3"]
    assert v.symbols()[3:] == ["z1", "z2", "a1", "a2", "a3"]
    assert v.size == 8
    assert v.species == ("zebra", "ant")
    assert v.species_genes("ant").genes.tolist() == ["A1", "A2", "A3"]
    assert v.species_genes("ant").medians.tolist() == [3.0, 1.0, 1.5]
    assert v.species_tokens("ant").tolist() == [5, 6, 7]
    assert v.ortholog_map("ant", "zebra", PAIRS).tolist() == [-1, -1, -1, -1, -1, 4, -1, -1]


def test_one_to_one_orthologs_share_an_id_when_asked():
    v = build("ortholog")
    assert v.size == 7
    assert v.species_genes("zebra").tokens.tolist() == [3, 4]
    assert v.species_genes("ant").tokens.tolist() == [4, 5, 6]  # A1 is Z2
    assert v.species_genes("ant").medians.tolist() == [3.0, 1.0, 1.5]  # its own median all the same
    assert v.genes()[4] == "Z2"


def test_three_species_never_give_one_id_to_two_genes_of_a_species():
    medians = {"a": {"A1": 1.0}, "b": {"B1": 1.0}, "c": {"C1": 1.0, "C2": 1.0}}
    pairs = {("b", "a"): {"B1": "A1"}, ("c", "a"): {"C1": "A1"}, ("c", "b"): {"C2": "B1"}}
    v = vocabulary.build_vocabulary(
        medians, {n: table(list(g)) for n, g in medians.items()}, sharing="ortholog", orthologs=pairs
    )
    assert len(set(v.species_genes("c").tokens.tolist())) == 2


def test_a_gene_is_found_by_id_or_symbol_of_its_species_only():
    v = build()
    assert v.find("A2", "ant") == v.find("a2", "ant") == 6
    with pytest.raises(UserError, match=r"gene = 'Z1': not in the ant vocabulary"):
        v.find("Z1", "ant")
    with pytest.raises(UserError, match=r"species = 'cat': not in the vocabulary, which has zebra, ant"):
        v.find("Z1", "cat")


def test_the_hash_covers_what_decides_a_sentence_and_survives_a_round_trip(tmp_path):
    v = build()
    uri = str(tmp_path / "vocabulary.parquet")
    v.save(uri)
    again = vocabulary.Vocabulary.load(str(tmp_path))
    assert again.hash == v.hash
    assert again.table.equals(v.table)
    assert (again.species, again.sharing) == (v.species, v.sharing)
    other = {**MEDIANS, "ant": {**MEDIANS["ant"], "A2": 1.0000000001}}
    assert build(medians=other).hash != v.hash
    assert build("ortholog").hash != v.hash
    edited = v.table.set_column(4, "median", pa.array(np.full(5, 1.0)))
    tables.write_table(uri, edited.replace_schema_metadata(tables.read_table(uri).schema.metadata))
    with pytest.raises(UserError, match="does not fit its hash"):
        vocabulary.Vocabulary.load(uri)


def test_medians_are_imported_by_species_from_a_published_layout(tmp_path):
    rows = (
        SpeciesRow(name="human", taxon=9606, gene_prefix="ENSG", genes=""),
        SpeciesRow(name="mouse", taxon=10090, gene_prefix="ENSMUSG", genes=""),
    )
    known = {"human": {"ENSG01"}, "mouse": set()}
    text = "key\ttoken\tmedian\tname\n<pad>\t0\t\t\nENSG01\t2\t1.25\tA\nENSG02\t3\t2.5\tB\nENSMUSG07\t4\t0.5\tC\nX\t5\t1\tD\n"
    path = tmp_path / "m.tsv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert vocabulary.read_median_table(str(path), rows, known) == {
        "human": {"ENSG01": 1.25, "ENSG02": 2.5},
        "mouse": {"ENSMUSG07": 0.5},
    }
    bad = tmp_path / "bad.tsv"
    bad.write_text("gene\tmedian\nENSG01\t-1\n")
    with pytest.raises(UserError, match="median of ENSG01 is -1"):
        vocabulary.read_median_table(str(bad), rows, known)
    bad.write_text("name\tvalue\nENSG01\t-1\n")
    with pytest.raises(UserError, match="must have gene and median"):
        vocabulary.read_median_table(str(bad), rows, known)
