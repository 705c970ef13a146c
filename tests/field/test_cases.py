"""Laws of files as people have them: read as the good file is, or refused in one line that says what the file is and what to do.

Each case stands for a kind; `test_members.py` has more of every kind.
"""

import re

import pytest

from tests.field.prepared import run_prepare

GOOD = (60, 25_262, 10_888, 0.0063, 300)
"""Cells, counts, detected genes, mean mitochondrial share, and mapped columns of the good file."""

READ = {
    # file: what is said, as a pattern; empty = nothing
    "id-spelled-na/in.h5ad": "",
    "dots-for-dashes/in.h5ad": r"6 names are read in another spelling: with dashes for dots \(MT\.CO1 = MT-CO1\)",
    "genome-prefix/symbols.h5ad": r"300 names .* without the name of the reference \(GRCh38_MT-CO1 = MT-CO1\)",
    "genome-prefix/symbols3.h5ad": r"GRCh38___MT-CO1 = MT-CO1",
    "genome-prefix/ids.h5ad": r"GRCh38_ENSG00000198804 = MT-CO1",
    "id-and-symbol-joined/underscore.h5ad": r"by the id within the name \(ENSG00000198804_MT-CO1 = MT-CO1\)",
    "id-and-symbol-joined/bar.h5ad": r"MT-CO1\|ENSG00000198804",
    "id-and-symbol-joined/colon.h5ad": r"MT-CO1:ENSG00000198804",
    "numbers-for-index/in.h5ad": r"read from var\['feature_id'\], because the index has 0 known ones of 300 \(0, 1, 2\)",
    "concat-left-two-columns/in.h5ad": "",
    "citeseq-h5ad/in.h5ad": r"6 features are no genes and are left out: 6 Antibody Capture \(CD4, CD45, CD8, \.\.\.\)",
    "citeseq-h5ad/rna.h5ad": "",
    "nullable-string-index/in.h5ad": "",
    "column-that-is-not-there/in.h5ad": "",
    "big-endian/in.h5ad": "",
    "not-the-file/anndata.h5": "",
    "columns-of-our-names/in.h5ad": r"kept under another name: source as original_source",
    "gaps-in-columns/in.h5ad": "",
    "bytes-for-text/in.h5ad": "",
    "mtx-tabs/in": "",
    "mtx-bare-header/in": "",
    "mtx-transposed/in": "",
    "mtx-prefix/in": "",
    "mtx-header-lines/barcodes": "",
    "mtx-header-lines/features": "",
    "mtx-quotes/in": "",
    "mtx-and-a-subfolder/in": "",
    "mtx-that-pass/crlf": "",
    "mtx-that-pass/real": "",
    "mtx-that-pass/symbols": "",
    "machine/in.h5ad": "",
}  # fmt: skip

REFUSED = {
    "ids-of-other-rows/in.h5ad": r"var\['gene_ids'\] and the index name different genes in 300 of 300 rows, .* --set sources\.genes=gene_ids or --set sources\.genes=index",
    "small-letters/in.h5ad": r"only the case of their letters differs .* \(mt-co1: MT-CO1\)",
    "no-rna-h5ad/in.h5ad": r"no feature is of the kind Gene Expression",
    "text-in-latin1/in.h5ad": r"obs column 'donor': text that is not UTF-8 .* --set sources\.obs=",
    "zstd/in.h5ad": r"filter 32015 \(zstd\), which is not installed; run: pip install hdf5plugin",
    "not-the-file/pointer.h5ad": r"a pointer of git-lfs.* git lfs pull",
    "not-the-file/page.h5ad": r"a web page",
    "not-the-file/empty.h5ad": r"an empty file",
    "not-the-file/half.h5ad": r"truncated",
    "log-in-x-counts-in-a-layer/in.h5ad": r"X is already log-normalised \(every cell sums to 10,000\); layer 'counts' holds counts: --set sources\.layer=counts",
    "no-counts-anywhere/in.h5ad": r"X is scaled, raw is log-normalised: no matrix of this file holds counts",
    "ambient-corrected/in.h5ad": r"holds fractions of counts .* --set sources\.round=true",
    "counts-then-log/in.h5ad": r"cell cell045 .* earlier cells hold counts, and from here on they are log-normalised",
    "one-negative/in.h5ad": r"count -1\.0 of cell cell010 \(row 10\), gene ENSG\d+ is negative; the other values of X are raw counts",
    "h5-two-species/in.h5": r"2 genomes \(GRCh38, mm10\).* --set sources\.layer=GRCh38 or --set sources\.layer=mm10",
    "h5-molecule-info/in.h5": r"molecule table of Cell Ranger.* filtered_feature_bc_matrix\.h5",
    "h5-of-something-else/latents.h5": r"HDF5 without a matrix of counts \(it holds droplet_latents, metadata\)",
    "h5-of-something-else/table.h5": r"HDF5 without a matrix of counts \(it holds dataset\)",
    "mtx-five-columns/in": r"5 columns .* spliced, unspliced",
    "mtx-cell-out-of-range/in": r"an entry of cell 99 \(of 60\)",
    "mtx-that-pass/fractions": r"count 5\.125 of cell AAAC0+-1 \(row 0\), gene ENSG\d+ is not a whole number",
}  # fmt: skip


def said_of(outcome):
    """What prepare says of a source itself."""
    return [
        line
        for line in outcome.lines
        if re.match(r"\w+: (\d+ of \d+ columns|names of genes|obs columns|values|all cells)", line)
    ]


@pytest.fixture(scope="module")
def good(cases, tmp_path_factory):
    return run_prepare(tmp_path_factory.mktemp("good"), f"human={cases / 'machine/in.h5ad'}")


@pytest.mark.parametrize("name", READ)
def test_the_same_cells_are_read_from_every_form_of_a_file_and_what_was_done_is_said(name, cases, good, tmp_path):
    found = run_prepare(tmp_path, f"human={cases / name}")
    assert (found.code, found.sums) == (0, GOOD), found.lines
    assert found.sentences == good.sentences
    lines = said_of(found)
    assert len(lines) == bool(READ[name]), lines
    assert re.search(READ[name], "".join(lines)), lines


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line_with_the_file_and_the_way_out(name, cases, tmp_path):
    found = run_prepare(tmp_path, f"{'mouse' if name.startswith('rat') else 'human'}={cases / name}")
    assert found.code == 2, found.lines
    assert found.error.count("\n") == 0
    assert name.rpartition("/")[2] in found.error
    assert re.search(REFUSED[name], found.error), found.error
    assert not re.search(r"KeyError|ArrowInvalid|TypeError|Traceback", found.error)


@pytest.mark.parametrize("name", ["text-in-latin1", "not-the-file/page.h5ad", "one-negative", "ids-of-other-rows"])
def test_a_refused_file_never_costs_another_one(name, cases, good, tmp_path):
    bad = cases / name if name.endswith(".h5ad") else cases / name / "in.h5ad"
    found = run_prepare(tmp_path, f"human=bad={bad}", f"human={cases / 'machine/in.h5ad'}")
    assert (found.code, found.sums) == (3, GOOD)
    assert str(bad) in found.error


def test_names_that_no_gene_has_are_counted_with_their_share_and_cause(cases, tmp_path):
    found = run_prepare(tmp_path, f"human={cases / 'a-third-unknown/in.h5ad'}")
    assert found.code == 0
    (line,) = said_of(found)
    assert re.search(r"111 are no known human gene, with 36\.3% of the counts \(XYZ135\.0_q, .*end with '_q'", line)


def test_rounded_normalised_values_are_doubted(cases, tmp_path):
    found = run_prepare(tmp_path, f"human={cases / 'rounded-per-10k/in.h5ad'}")
    assert any(
        re.search(r"in: all cells have the same sum of counts \(10,000\): normalised and rounded", line)
        for line in found.lines
    )


def test_rat_is_not_mouse(cases, tmp_path):
    found = run_prepare(tmp_path, f"mouse={cases / 'rat-ids/in.h5ad'}")
    assert found.code == 2
    assert "another species" in found.error


def test_versions_go_and_copies_are_added_and_said(cases, tmp_path):
    ids = run_prepare(tmp_path / "a", f"human={cases / 'versions-and-duplicates/ids.h5ad'}")
    symbols = run_prepare(tmp_path / "b", f"human={cases / 'versions-and-duplicates/symbols.h5ad'}")
    for found, summed in ((ids, 1), (symbols, 2)):
        assert found.sums[1] == GOOD[1]
        assert (found.mapping[0]["unmapped"], found.mapping[0]["summed"]) == (0, summed)
        assert len(said_of(found)) == 1


def test_types_of_two_old_files_keep_their_names(cases, tmp_path):
    folder = cases / "categories-of-2020"
    found = run_prepare(tmp_path, f"human={folder / 'a.h5ad'}", f"human={folder / 'b.h5ad'}")
    assert sorted(set(found.obs["cell_type"])) == ["acinar cell", "alpha cell", "beta cell", "ductal cell"]
    assert sorted(set(found.obs["donor"])) == ["d0", "d1"]


def test_samples_of_one_file_name_are_named_after_their_folders(cases, tmp_path):
    found = run_prepare(tmp_path, f"human={cases}/samples-in-folders/S*/outs/filtered_feature_bc_matrix.h5")
    assert found.sums[0] == 120
    assert sorted(set(found.obs["source"])) == ["S1", "S2"]


def test_a_user_s_own_columns_stay(cases, tmp_path):
    found = run_prepare(tmp_path, f"human={cases / 'columns-of-our-names/in.h5ad'}")
    assert set(found.obs["original_source"]) == {"blood"}
    assert set(found.obs["original_species"]) == {"Homo sapiens"}
    assert found.obs["original_cell"].tolist() == [f"T{k}" for k in range(60)]
    assert set(found.obs["original_n_genes"]) == {7}


def test_fractions_are_rounded_on_request_only_and_it_is_in_the_record(cases, tmp_path):
    found = run_prepare(tmp_path, f"human={cases / 'ambient-corrected/in.h5ad'}", sources__round="true")
    assert found.code == 0
    assert said_of(found) == ["in: values are rounded to whole numbers (round)"]
    assert '"round": true' in (tmp_path / "corpus/record.json").read_text()
    logged = run_prepare(
        tmp_path / "log", f"human={cases / 'log-in-x-counts-in-a-layer/in.h5ad'}", sources__round="true"
    )
    assert logged.code == 2, "no rounding makes counts of normalised values"


def test_the_way_out_of_a_refusal_works(cases, good, tmp_path):
    layer = run_prepare(
        tmp_path / "a", f"human={cases / 'log-in-x-counts-in-a-layer/in.h5ad'}", sources__layer="counts"
    )
    names = run_prepare(tmp_path / "b", f"human={cases / 'ids-of-other-rows/in.h5ad'}", sources__genes="index")
    human = run_prepare(tmp_path / "c", f"human={cases / 'h5-two-species/in.h5'}", sources__layer="GRCh38")
    for found in (layer, names, human):
        assert (found.code, found.sums, found.sentences) == (0, GOOD, good.sentences), found.lines
    assert "300 of the genome mm10" in "".join(said_of(human))
