"""The response matrix against a plain implementation: one sentence at a time, dictionaries and numpy."""

from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import torch

from mixgf.config import data, perturbation, run, training
from mixgf.encoder.bert import Encoder
from mixgf.perturbation import gene_responses, group_design, operations, scoring_tasks
from mixgf.perturbation.shift import ShiftScorer
from mixgf.storage import tables

CLS = 2
ROW = training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=64, max_positions=24, init_sd=0.3)


def perturbed(sentence, genes, operation, lead, max_len):
    head, rest = sentence[:lead], sentence[lead:]
    others = [t for t in rest if t not in genes]
    return head + others if operation == "delete" else (head + list(genes) + others)[:max_len]


def states(encoder, sentence, layers):
    with torch.no_grad():
        h = encoder(torch.tensor(sentence), torch.tensor([0, len(sentence)], dtype=torch.int32), layers=layers)
    return dict(zip(sentence, h.numpy().astype(np.float64), strict=True))


def plain(encoder, sentences, pairs, operation, watched, *, lead=0, max_len=100, layers=None):
    """(target, responding token) to the list of (1 - cos, whether its place is the same), by definition."""
    found = defaultdict(list)
    for target, cell, genes in pairs:
        old, new = sentences[cell], perturbed(sentences[cell], genes, operation, lead, max_len)
        before, after = states(encoder, old, layers), states(encoder, new, layers)
        for token in watched:
            if token in before and token in after and token not in genes:
                a, b = before[token], after[token]
                change = 1 - a @ b / np.sqrt((a @ a) * (b @ b))
                found[target, token].append((change, old.index(token) == new.index(token)))
    return found


@pytest.mark.parametrize(("lead", "layers"), [(0, None), (1, None), (0, 1)])
@pytest.mark.parametrize("operation", ["delete", "overexpress"])
def test_equals_the_plain_implementation(operation, lead, layers):
    encoder = Encoder(ROW, 60, seed=3).eval()
    rng = np.random.default_rng(6)
    sentences = [[CLS] * lead + rng.permutation(np.arange(3, 40))[:n].tolist() for n in (20, 9, 20, 14)]
    genes = [(sentences[0][lead],), (sentences[2][-1],), (59, 7), (5,)]  # 59: beyond every sentence and column
    watched = np.array([3, 5, 7, 9, 11, 15, 21, 30, 39])
    pairs = [(k, c, g) for k, g in enumerate(genes) for c in range(4)]
    engine = ShiftScorer(encoder=encoder, layers=layers, lead=lead, max_len=21, micro_tokens=64)
    original = engine.encode_cells(
        torch.tensor([t for s in sentences for t in s]), torch.tensor(np.cumsum([0] + [len(s) for s in sentences]))
    )
    table = torch.tensor([[*g, *[operations.NO_GENE] * (2 - len(g))] for _, _, g in pairs])
    cells, rows = torch.tensor([c for _, c, _ in pairs]), torch.tensor([k for k, _, _ in pairs])
    sums = gene_responses.measure_responses(engine, original, cells, table, rows, operation, watched)
    expected = plain(encoder, sentences, pairs, operation, watched.tolist(), lead=lead, max_len=21, layers=layers)
    assert sums.num_KR.sum() > 20
    for k in range(4):
        for r, token in enumerate(watched.tolist()):
            values, still = np.array(expected.get((k, token), [(0.0, 0.0)])).T
            if (k, token) not in expected:
                values = still = np.empty(0)
            assert sums.num_same_rank_KR[k, r] == still.sum()
            assert sums.same_rank_KR[k, r] == pytest.approx(values @ still, abs=1e-6)
            assert sums.num_KR[k, r] == len(values)
            assert sums.sum_KR[k, r] == pytest.approx(values.sum(), abs=1e-6)
            assert sums.squares_KR[k, r] == pytest.approx((values**2).sum(), abs=1e-6)
    assert sums.sum_KR.max() > 1e-3  # the comparison can fail
    assert 0 < sums.num_same_rank_KR.sum() < sums.num_KR.sum()


def design(num_targets=3, num_watched=4):
    def gene(name):
        return group_design.Target(gene=f"ENSG{name}", symbol=name, species="human", tokens=(3,), coverage=1.0)

    return group_design.Design(
        cells_N=np.arange(2), states=(), donors=("d",), donor_of=np.zeros(2, int), warnings=(),
        targets=tuple(gene(f"p{k}") for k in range(num_targets)), responding=tuple(gene(f"r{r}") for r in range(num_watched)),
    )  # fmt: skip


def test_parts_add_up_to_means_by_hand():
    def sums(*fields):
        return gene_responses.ResponseSums(
            **{n: np.array(v) for n, v in zip(gene_responses.FIELDS, fields, strict=True)}
        )

    first = sums(
        [[1, 0], [2, 0]], [[0.5, 0], [0.4, 0]], [[0.25, 0], [0.1, 0]], [[1, 0], [0, 0]], [[0.5, 0], [0.0, 0]]
    ).part(np.array([0, 2]))
    second = sums([[1, 3]], [[0.1, 0.6]], [[0.01, 0.12]], [[0, 2]], [[0.0, 0.3]]).part(np.array([0]))
    frame = gene_responses.response_table({"delete": [first, second]}, design(3, 2)).to_pandas()
    assert frame[["symbol", "responding_symbol", "num_cells"]].to_numpy().tolist() == [
        ["p0", "r0", 2],
        ["p0", "r1", 3],
        ["p2", "r0", 2],
    ]
    assert frame["change"].tolist() == pytest.approx([0.3, 0.2, 0.2])
    assert frame["num_same_rank"].tolist() == [1, 2, 0]
    assert frame["change_same_rank"].tolist()[:2] == pytest.approx([0.5, 0.15])
    assert np.isnan(frame["change_same_rank"][2])
    assert frame["sd"].tolist() == pytest.approx([np.std([0.5, 0.1], ddof=1), 0.0, np.sqrt(0.02)], abs=1e-7)


def test_what_is_between_two_genes_is_what_neither_does_in_general():
    rng = np.random.default_rng(4)
    general = np.exp2(rng.normal(0, 2, (12, 1)) + rng.normal(0, 2, (1, 9)))
    general[4, 5] *= 8
    rows = [
        {"gene": f"p{k}", "responding": f"r{r}", "num_same_rank": 9, "change_same_rank": general[k, r]}
        for k in range(12)
        for r in range(9)
    ]
    rows.append(
        {"gene": "p0", "responding": "r99", "num_same_rank": gene_responses.MIN_CELLS - 1, "change_same_rank": 1.0}
    )
    frame = pd.DataFrame(rows)
    found = gene_responses.specific_responses(frame).set_index(["gene", "responding"])["excess"]
    former = frame.rename(columns={"num_same_rank": "num_still", "change_same_rank": "change_still"})
    pd.testing.assert_frame_equal(gene_responses.specific_responses(former), gene_responses.specific_responses(frame))
    assert len(found) == 108
    assert found["p4", "r5"] == pytest.approx(3)
    assert found.drop(("p4", "r5")).abs().max() == pytest.approx(0, abs=1e-9)


def test_a_matrix_needs_no_cells_of_its_own_and_names_the_most_frequent_genes(corpus_and_run):
    """Every row of the driver's matrix is the plain one over the perturbed cells; columns are the genes in most cells."""
    corpus, scorer, plan, folder, units = corpus_and_run
    counts = np.zeros(corpus.vocabulary.size)
    for cell in plan.cells_N.tolist():
        counts[corpus.tokens([cell])[0]] += 1
    best = sorted(np.argsort(-counts, kind="stable")[:5].tolist())
    assert plan.responding_R.tolist() == best
    parts = {name: [tables.read_table(f"{folder}/{scoring_tasks.RESPONSES}/{u.key}.parquet") for u in units if u.operation == name]
             for name in ("delete", "overexpress")}  # fmt: skip
    frame = gene_responses.response_table(parts, plan).to_pandas().astype({"operation": str})
    sentences = {c: corpus.tokens([c])[0].tolist() for c in plan.cells_N.tolist()}
    for name, part in frame.groupby("operation"):
        pairs = [
            (k, c, t.tokens)
            for k, t in enumerate(plan.targets)
            for c, s in sentences.items()
            if name == "overexpress" or t.tokens[0] in s
        ]
        expected = plain(scorer.scorer.encoder, sentences, pairs, name, best, max_len=16)
        assert len(part) == len(expected)
        symbols = corpus.vocabulary.symbols()
        value = part.set_index(["symbol", "responding_symbol"])
        for (k, token), changes in expected.items():
            row = value.loc[(plan.targets[k].symbol, symbols[token])]
            assert row["num_cells"] == len(changes)
            assert row["change"] == pytest.approx(np.mean([change for change, _ in changes]), abs=1e-6)
            assert row["num_same_rank"] == sum(still for _, still in changes)


@pytest.fixture(scope="module")
def corpus_and_run(make_corpus, tmp_path_factory):
    from mixgf.corpus.reader import Corpus
    from mixgf.encoder import checkpoint
    from mixgf.encoder.bert import MaskedModel
    from mixgf.storage import artifacts

    corpus = Corpus(make_corpus([9, 4, 12, 7, 16, 5, 10, 8, 11], [0] * 9, [4, 5], genes=20, names=("human",)))
    uri, folder = str(tmp_path_factory.mktemp("pretrain")), str(tmp_path_factory.mktemp("parts"))
    record = artifacts.plan("checkpoint", 1, {}, {})
    artifacts.begin(uri, record)
    row = training.Model(num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_positions=16, init_sd=0.3)
    model = MaskedModel(row, corpus.vocabulary.size, seed=5)
    checkpoint.publish_checkpoint(uri, record, model, vocabulary=corpus.vocabulary.hash, tokens=data.Tokens(max_len=16))
    settings = perturbation.Perturb(
        max_cells=6, min_coverage=0.01, response=5, block_cells=2, block_genes=7, micro_tokens=40
    )
    chosen = run.Config(perturb=settings, tokens=data.Tokens(max_len=16))
    plan = group_design.build_design(corpus, chosen)
    scorer = scoring_tasks.ScoringWorker(chosen, corpus=corpus.uri, weights=uri, folder=folder)
    units = [u for u in scoring_tasks.plan_tasks(plan, corpus, settings) if u.operation != "embed"]
    for unit in units:
        scorer((unit, np.ones((1, 16))))
    return corpus, scorer, plan, folder, units
