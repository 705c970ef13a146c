"""Laws of the species tables: rows with unique genes, orthologs one to one and symmetric."""

import pyarrow as pa
import pytest

from mixgf.config.data import HUMAN, MOUSE, SpeciesRow
from mixgf.errors import UserError
from mixgf.genes.species import gene_table, orthologs
from mixgf.storage import tables


@pytest.mark.parametrize("row", [HUMAN, MOUSE], ids=lambda row: row.name)
def test_shipped_genes_are_unique_sorted_and_of_the_species(row):
    genes = gene_table(row)["gene"].to_pylist()
    assert genes == sorted(set(genes))
    assert all(gene.startswith(row.gene_prefix) and "." not in gene for gene in genes)


def test_thirteen_mitochondrial_proteins_in_both_species():
    for row in (HUMAN, MOUSE):
        table = gene_table(row).to_pandas()
        assert (table.is_mito & (table.biotype == "protein_coding")).sum() == 13


def test_orthologs_are_one_to_one_and_the_way_back_leads_home():
    maps = orthologs(("resource:orthologs.parquet",))
    there, back = maps["human", "mouse"], maps["mouse", "human"]
    assert len(there) == len(back) == 17_122
    assert all(back[mouse] == human for human, mouse in there.items())
    assert there["ENSG00000115263"] == "ENSMUSG00000000394"  # GCG, Gcg
    assert "ENSG00000254647" not in there  # INS has two mouse partners, Ins1 and Ins2


def test_a_gene_with_two_partners_is_refused(tmp_path):
    uri = str(tmp_path / "o.parquet")
    tables.write_table(uri, pa.table({"a": ["a1", "a1", "a2"], "b": ["b1", "b2", None]}))
    with pytest.raises(UserError, match="a gene a1 has two b partners"):
        orthologs((uri,))


def test_a_third_species_is_a_row_and_a_bad_table_is_named(tmp_path):
    uri = str(tmp_path / "g.parquet")
    tables.write_table(
        uri,
        pa.table(
            {"gene": ["X2", "X1"], "symbol": ["b", "a"], "biotype": ["protein_coding"] * 2, "is_mito": [False] * 2}
        ),
    )
    table = gene_table(SpeciesRow(name="axolotl", taxon=8296, gene_prefix="X", genes=uri))
    assert table["gene"].to_pylist() == ["X1", "X2"]
    assert table["alias"].to_pylist() == [[], []]
    tables.write_table(str(tmp_path / "bad.parquet"), pa.table({"gene": ["X1"]}))
    with pytest.raises(UserError, match=r"species 'axolotl': genes = .*: no column 'symbol'"):
        gene_table(SpeciesRow(name="axolotl", taxon=8296, gene_prefix="X", genes=str(tmp_path / "bad.parquet")))
