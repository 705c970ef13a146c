"""Gene vectors of a corpus are its singular vectors, whatever cuts the work; a table of the user's has its place."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from executors import Through, dying

from mixgf.config import data, run, training
from mixgf.corpus import reader
from mixgf.encoder.bert import rank_weight
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor, Receipt
from mixgf.genes import species
from mixgf.stages import pretrain_inputs
from mixgf.storage import files, tables
from mixgf.training import gene_vectors

DIM, GENES = 4, 19


@pytest.fixture(scope="module")
def uri(make_corpus):
    lengths = np.random.default_rng(0).integers(5, 16, 90)
    return make_corpus(lengths, np.arange(90) % 2, [40, 30, 20], genes=GENES)


def config(uri, output):
    return run.Config(
        output=str(output), model=training.Model(num_layers=1, dim=DIM, num_heads=2, ffn_dim=8, max_positions=20, start="svd"),
        vocab=data.Vocab(orthologs=(f"{uri}/orthologs.parquet",)), inputs=run.Inputs(corpus=uri),
    )  # fmt: skip


def dense(corpus, code):
    """Rows of a species' cells over its genes, as the module's docstring has them, by plain loops."""
    ids = corpus.vocabulary.species_tokens(corpus.species[code])
    rows = []
    for cell in np.flatnonzero(corpus.species_N == code):
        row = np.zeros(corpus.vocabulary.size)
        tokens = corpus.tokens([cell])[0]
        row[tokens] = rank_weight(np.arange(len(tokens)))
        rows.append(row[ids] / np.linalg.norm(row))
    return np.array(rows)


def test_vectors_are_singular_vectors_of_scaled_rows_without_the_first(uri, tmp_path):
    corpus = reader.Corpus(uri)
    made = pretrain_inputs.make_gene_vectors(config(uri, tmp_path), corpus, LocalExecutor())
    table = tables.read_table(made)
    human = np.array(table["vector"].to_pylist())[:GENES]
    rows = dense(corpus, 0)
    scaled = rows / np.maximum(rows.std(0), np.median(rows.std(0)))
    _, s, vt = np.linalg.svd(scaled, full_matrices=False)
    expected = (vt.T * np.sqrt(s))[:, 1 : DIM + 1]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs((human * expected).sum(0)), (expected**2).sum(0), rtol=1e-4)
    np.testing.assert_allclose(np.abs(human), np.abs(expected), atol=1e-4)


def test_a_species_that_only_differs_by_a_turn_is_turned_back_by_its_orthologs(uri):
    corpus, rng = reader.Corpus(uri), np.random.default_rng(1)
    own = gene_vectors._unit(rng.standard_normal((GENES, DIM)))
    turn = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    pairs = species.orthologs((f"{uri}/orthologs.parquet",))
    found, turned = gene_vectors.align_species([own, own @ turn], corpus.vocabulary, corpus.species, pairs)
    assert turned == {"mouse": GENES // 2}
    np.testing.assert_allclose(found[3 : 3 + GENES], own, atol=1e-6)
    np.testing.assert_allclose(found[3 + GENES :], own, atol=1e-6)


def test_fewer_orthologs_than_dimensions_turn_nothing(uri):
    corpus = reader.Corpus(uri)
    own = gene_vectors._unit(np.random.default_rng(1).standard_normal((GENES, DIM)))
    found, turned = gene_vectors.align_species([own, -own], corpus.vocabulary, corpus.species, {})
    assert turned == {"mouse": 0}
    np.testing.assert_allclose(found[3 + GENES :], -own, atol=1e-6)


def test_a_shared_id_has_the_mean_of_both_species_at_length_1(uri):
    corpus = reader.Corpus(uri)
    shared = corpus.vocabulary.table.set_column(0, "token", pa.array(np.tile(np.arange(GENES) + 3, 2), pa.int32()))
    vocabulary = type(corpus.vocabulary)(shared, species=corpus.species, sharing="ortholog")
    rng = np.random.default_rng(2)
    a = gene_vectors._unit(rng.standard_normal((GENES, DIM)))
    b = gene_vectors._unit(a + 0.1 * rng.standard_normal((GENES, DIM)))
    found, turned = gene_vectors.align_species([a, b], vocabulary, corpus.species, {})
    assert turned == {"mouse": GENES}
    turn = np.linalg.svd(b.T @ a)
    expected = gene_vectors._unit(a + b @ turn[0] @ turn[2])
    np.testing.assert_allclose(found[3:], expected, atol=1e-6)


def test_bytes_do_not_depend_on_the_cut_of_tables_or_the_order_of_parts(uri, tmp_path):
    corpus = reader.Corpus(uri)
    made = pretrain_inputs.make_gene_vectors(config(uri, tmp_path / "a"), corpus, LocalExecutor())

    def cutting(tasks):
        """Run the last task first, and cut what is read into tables of 7 rows."""
        for number, task in reversed(list(enumerate(tasks))):
            (plan,) = task.args
            rows = pa.concat_tables(gene_vectors.read_sentences(plan))
            gene_vectors.write_sums((rows.slice(i, 7) for i in range(0, len(rows), 7)), plan)
            yield Receipt(number)

    other = pretrain_inputs.make_gene_vectors(config(uri, tmp_path / "b"), corpus, Through(cutting))
    assert files.read_bytes(made) == files.read_bytes(other)


def test_a_killed_computation_goes_on_to_the_same_bytes(uri, tmp_path):
    corpus = reader.Corpus(uri)
    made = pretrain_inputs.make_gene_vectors(config(uri, tmp_path / "a"), corpus, LocalExecutor())

    with pytest.raises(KeyboardInterrupt):
        pretrain_inputs.make_gene_vectors(config(uri, tmp_path / "b"), corpus, dying(8, []))
    ran = []
    again = pretrain_inputs.make_gene_vectors(config(uri, tmp_path / "b"), corpus, dying(10**9, ran))
    assert files.read_bytes(made) == files.read_bytes(again)
    assert 0 < len(ran) <= 3 * (gene_vectors.PASSES + 1) - 7
    assert not files.list_dir(str(tmp_path / "b" / "gene_vectors" / "work"))


@pytest.mark.ray
def test_one_and_two_workers_of_ray_make_the_bytes_of_one_process(uri, tmp_path, ray_local):
    from mixgf.distributed.executor import RayExecutor

    corpus = reader.Corpus(uri)
    made = [pretrain_inputs.make_gene_vectors(config(uri, tmp_path / "0"), corpus, LocalExecutor())]
    for workers in (1, 2):
        chosen = dataclasses.replace(config(uri, tmp_path / str(workers)), compute=run.Compute(num_workers=workers))
        made.append(pretrain_inputs.make_gene_vectors(chosen, corpus, RayExecutor(chosen)))
    assert len({files.read_bytes(one) for one in made}) == 1


# tables of the user's


def vocabulary(uri):
    return reader.Corpus(uri).vocabulary


def test_a_table_of_the_vocabularys_genes_is_the_start_and_what_it_lacks_is_its_orthologs_or_zero(uri, tmp_path):
    words, rng = vocabulary(uri), np.random.default_rng(3)
    genes = words.table["gene"].to_pylist()[: GENES - 2]  # human genes without the last two
    vectors = rng.standard_normal((len(genes), DIM))
    where = str(tmp_path / "mine.csv")
    lines = [",".join(["gene", *map(str, range(DIM))])]
    lines += [f"{gene}.7,{','.join(map(repr, row))}" for gene, row in zip(genes, vectors.tolist(), strict=True)]
    files.write_bytes(where, "\n".join(lines).encode())
    pairs = species.orthologs((f"{uri}/orthologs.parquet",))
    found, counts = gene_vectors.start_tokens(where, words, dim=DIM, orthologs=pairs)
    unit = gene_vectors._unit(vectors)
    np.testing.assert_allclose(found[3 : 3 + GENES - 2], unit, atol=1e-6)
    assert not found[3 + GENES - 2 : 3 + GENES].any()
    np.testing.assert_allclose(found[3 + GENES : 3 + GENES + GENES // 2], unit[: GENES // 2], atol=1e-6)
    assert counts == {"own": GENES - 2, "ortholog": GENES // 2, "none": 2 + GENES - GENES // 2}
    listed = str(tmp_path / "mine.parquet")
    tables.write_table(listed, pa.table({"ensembl_id": genes, "vector": vectors.tolist()}))
    again, _ = gene_vectors.start_tokens(listed, words, dim=DIM, orthologs=pairs)
    assert np.array_equal(found, again)


def test_longer_vectors_are_projected_on_their_principal_components(uri, tmp_path):
    words, rng = vocabulary(uri), np.random.default_rng(3)
    genes = words.table["gene"].to_pylist()
    plane = rng.standard_normal((len(genes), DIM)) @ rng.standard_normal((DIM, 9))
    tables.write_table(str(tmp_path / "t.parquet"), pa.table({"gene": genes, "vector": plane.tolist()}))
    found, _ = gene_vectors.start_tokens(str(tmp_path / "t.parquet"), words, dim=DIM, orthologs={})
    centred = gene_vectors._unit(plane - plane.mean(0))
    np.testing.assert_allclose(found[3:] @ found[3:].T, centred @ centred.T, atol=1e-5)


def test_the_table_of_another_run_is_read_back(uri, tmp_path):
    corpus = reader.Corpus(uri)
    made = pretrain_inputs.make_gene_vectors(config(uri, tmp_path), corpus, LocalExecutor())
    found, counts = gene_vectors.start_tokens(made, corpus.vocabulary, dim=DIM, orthologs={})
    assert counts["own"] == 2 * GENES
    np.testing.assert_allclose(found[3:], np.array(tables.read_table(made)["vector"].to_pylist()), atol=1e-6)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"name": ["a"], "vector": [[1.0] * DIM]}, "must have gene"),
        ({"gene": ["Ghuman00000"], "vector": [[1.0, float("nan"), 0.0, 0.0]]}, "finite numbers"),
        ({"gene": ["Ghuman00000", "Ghuman00001"], "vector": [[1.0] * DIM, [1.0]]}, "one length"),
        ({"gene": ["Ghuman00000"], "vector": [[1.0, 2.0]]}, "set model.dim to at most that"),
        ({"gene": ["other"], "vector": [[1.0] * DIM]}, "none of the genes"),
    ],
)
def test_a_table_that_cannot_be_used_is_said_in_one_line(uri, tmp_path, table, why):
    where = str(tmp_path / "t.parquet")
    tables.write_table(where, pa.table(table))
    with pytest.raises(UserError, match=why):
        gene_vectors.start_tokens(where, vocabulary(uri), dim=DIM, orthologs={})
    with pytest.raises(UserError, match="no such file"):
        gene_vectors.read_vectors("")
