"""Laws of the operations on sentences, on cases worked by hand and against plain list code."""

import numpy as np
import pytest
import torch

from mixgf.perturbation import operations

A, B, C, D, E, F, G = 10, 11, 12, 13, 14, 15, 16
CLS = 2


def run(sentences, cells, genes, operation, **options):
    """Sentences as lists in, sentences as lists out; checks the bookkeeping of hits on the way."""
    ids = torch.tensor([t for s in sentences for t in s])
    offsets = torch.tensor(np.cumsum([0] + [len(s) for s in sentences]))
    width = max(len(g) for g in genes)
    table = torch.tensor([list(g) + [operations.NO_GENE] * (width - len(g)) for g in genes])
    out = operations.edit_sentences(ids, offsets, torch.tensor(cells), table, operation, **{"max_len": 100} | options)
    result = [out.ids_T[a:b].tolist() for a, b in zip(out.offsets_S1[:-1], out.offsets_S1[1:], strict=True)]
    for where, sentence in zip(out.hits_H.tolist(), out.hit_sentences_H.tolist(), strict=True):
        assert out.ids_T[where] in genes[sentence]
        assert out.offsets_S1[sentence] <= where < out.offsets_S1[sentence + 1]
    expected_hits = 0 if operation == "delete" else sum(t in g for s, g in zip(result, genes, strict=True) for t in s)
    assert len(out.hits_H) == expected_hits
    for where, sentence in zip(out.sources_H.tolist(), out.source_sentences_H.tolist(), strict=True):
        assert ids[where] in genes[sentence]
        assert offsets[cells[sentence]] <= where < offsets[cells[sentence] + 1]
    assert len(out.sources_H) == sum(t in g for c, g in zip(cells, genes, strict=True) for t in sentences[c])
    return result


def plain(sentence, genes, operation, *, lead=0, max_len=100, rank_share=0.25):
    """The definition, one sentence and one gene at a time."""
    head, rest = sentence[:lead], sentence[lead:]
    if operation == "delete":
        return head + [t for t in rest if t not in genes]
    if operation == "overexpress":
        return (head + list(genes) + [t for t in rest if t not in genes])[:max_len]
    step = max(1, int(rank_share * len(rest)))
    present = [t for t in rest if t in genes]
    order = present[::-1] if operation == "inhibit" else present
    for done, gene in enumerate(order):  # one by one, outermost first, so that they do not block each other
        at = rest.index(gene)
        to = min(at + step, len(rest) - 1 - done) if operation == "inhibit" else max(at - step, done)
        rest = rest[:at] + rest[at + 1 :]
        rest.insert(to, gene)
    return head + rest


@pytest.mark.parametrize(
    ("operation", "gene", "expected"),
    [
        ("delete", C, [A, B, D, E, F, G]),
        ("overexpress", C, [C, A, B, D, E, F, G]),
        ("overexpress", A, [A, B, C, D, E, F, G]),
        ("overexpress", 99, [99, A, B, C, D, E, F, G]),
        ("inhibit", C, [A, B, D, E, F, C, G]),
        ("inhibit", F, [A, B, C, D, E, G, F]),
        ("inhibit", G, [A, B, C, D, E, F, G]),
        ("activate", E, [A, E, B, C, D, F, G]),
        ("activate", B, [B, A, C, D, E, F, G]),
        ("activate", A, [A, B, C, D, E, F, G]),
    ],
)
def test_one_gene_by_hand(operation, gene, expected):
    assert run([[A, B, C, D, E, F, G]], [0], [(gene,)], operation, rank_share=0.5) == [expected]  # 3 steps of 7


@pytest.mark.parametrize("operation", ["delete", "inhibit", "activate"])
def test_an_absent_gene_changes_nothing(operation):
    assert run([[A, B, C]], [0], [(D,)], operation) == [[A, B, C]]


def test_the_top_gene_is_overexpressed_too_and_the_second_really_moves():
    assert run([[A, B, C]], [0, 0], [(A,), (B,)], "overexpress") == [[A, B, C], [B, A, C]]


def test_overexpression_of_a_full_sentence_drops_its_last_gene_only_when_the_gene_is_new():
    assert run([[A, B, C]], [0, 0], [(D,), (C,)], "overexpress", max_len=3) == [[D, A, B], [C, A, B]]
    assert run([[CLS, A, B]], [0], [(D, E)], "overexpress", max_len=3, lead=1) == [[CLS, D, E]]


@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_cls_stays_in_front(operation):
    assert run([[CLS, A, B, C]], [0], [(B,)], operation, lead=1)[0][0] == CLS


def test_sets_by_hand():
    s = [A, B, C, D, E, F, G]
    assert run([s], [0], [(C, A)], "delete") == [[B, D, E, F, G]]
    assert run([s], [0], [(E, 99, B)], "overexpress") == [[E, 99, B, A, C, D, F, G]]
    assert run([s], [0], [(A, B)], "inhibit", rank_share=0.3) == [[C, D, A, B, E, F, G]]  # 2 steps each
    assert run([s], [0], [(F, G)], "inhibit", rank_share=0.3) == [s]
    assert run([s], [0], [(A, C)], "activate", rank_share=0.3) == [[A, C, B, D, E, F, G]]


def test_different_cells_sets_and_sizes_go_in_one_call():
    sentences = [[A, B, C, D], [E], [F, A, G]]
    result = run(sentences, [2, 0, 0, 1], [(A, F), (B,), (99,), (E,)], "delete")
    assert result == [[G], [A, C, D], [A, B, C, D], []]


@pytest.mark.parametrize("lead", [0, 1], ids=["no cls", "cls"])
@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_equals_plain_list_code_on_random_sentences(operation, lead):
    rng = np.random.default_rng([3, lead])
    sentences = [[CLS] * lead + rng.permutation(np.arange(3, 40))[: rng.integers(1, 20)].tolist() for _ in range(7)]
    cells = rng.integers(0, 7, 200).tolist()
    genes = [tuple(rng.permutation(np.arange(3, 42))[: rng.integers(1, 4)].tolist()) for _ in cells]
    for share in (0.05, 0.25, 0.9):
        options = {"lead": lead, "max_len": 14, "rank_share": share}
        result = run(sentences, cells, genes, operation, **options)
        assert result == [plain(sentences[c], g, operation, **options) for c, g in zip(cells, genes, strict=True)]


def test_sets_equal_successive_singles_for_delete_and_overexpress():
    rng = np.random.default_rng(4)
    sentence = rng.permutation(np.arange(3, 30)).tolist()
    one = run([sentence], [0], [(5,)], "delete")
    assert run(one, [0], [(9,)], "delete") == run([sentence], [0], [(5, 9)], "delete")
    last_first = run([sentence], [0], [(9,)], "overexpress")
    assert run(last_first, [0], [(5,)], "overexpress") == run([sentence], [0], [(5, 9)], "overexpress")


@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_the_other_genes_keep_their_order(operation):
    sentence = np.random.default_rng(5).permutation(np.arange(3, 30)).tolist()
    result = run([sentence], [0], [(7, 8, 20)], operation)[0]
    assert [t for t in result if t not in (7, 8, 20)] == [t for t in sentence if t not in (7, 8, 20)]
    assert len(set(result)) == len(result)


def test_ranks_are_looked_up_per_cell():
    ids, offsets = torch.tensor([CLS, A, B, C, CLS, C]), torch.tensor([0, 4, 6])
    assert operations.gene_ranks(ids, offsets, torch.tensor([C, A, 99]), lead=1).tolist() == [[2, 0, -1], [0, -1, -1]]
