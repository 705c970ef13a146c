"""The forecast counts what a run does."""

import pytest

from mixgf.config import perturbation, run, training
from mixgf.corpus.reader import Corpus
from mixgf.encoder.bert import forward_flops
from mixgf.perturbation import cost_estimate, group_design

ROW = training.Model(num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_positions=16)
LENGTHS, SPECIES = [9, 4, 12, 7, 16, 5, 10, 8, 11], [0, 1, 0, 0, 1, 0, 1, 0, 0]


@pytest.fixture(scope="module")
def corpus(make_corpus):
    return Corpus(make_corpus(LENGTHS, SPECIES, [4, 5], genes=20))


def plan(corpus, **settings):
    chosen = run.Config(perturb=perturbation.Perturb(**({"max_cells": 0, "min_coverage": 0.01} | settings)))
    return group_design.build_design(corpus, chosen), chosen.perturb


@pytest.mark.parametrize("insert_absent", [True, False])
@pytest.mark.parametrize("genes", [(), ("human3", "human4+human5", "mouse7")], ids=["all genes", "sets"])
def test_equals_a_count_of_every_sentence(corpus, genes, insert_absent):
    design, settings = plan(
        corpus, genes=genes, operations=("delete", "overexpress", "inhibit"), insert_absent=insert_absent, layer=-2
    )
    found = {part.name: part for part in cost_estimate.estimate_work(design, corpus, settings, ROW, 16)}
    lengths = {name: [] for name in settings.operations}
    for cell in range(9):
        sentence = corpus.tokens([cell])[0].tolist()
        for target in design.targets:
            num = len(target.tokens)
            if set(target.tokens) <= set(sentence):
                lengths["delete"].append(len(sentence) - num)
                lengths["inhibit"].append(len(sentence))
                lengths["overexpress"].append(len(sentence))
            elif insert_absent and target.species == corpus.species[SPECIES[cell]]:
                lengths["overexpress"].append(min(16, len(sentence) + num))
    originals = forward_flops(ROW, LENGTHS, layers=1)
    for name, made in lengths.items():
        assert found[name].sentences == len(made)
        if not genes or name != "overexpress":  # a set that is there in part grows by less than its size
            assert found[name].tokens == sum(made)
            assert found[name].flops == pytest.approx(forward_flops(ROW, made, layers=1) + originals)
        assert found[f"{name}, untrained twin"].flops == found[name].flops
    assert found["states, both encoders"].tokens == 2 * sum(LENGTHS)
    design, alone = plan(corpus, genes=genes, controls=False)
    assert cost_estimate.estimate_work(design, corpus, alone, ROW, 16)[0].tokens == sum(LENGTHS)


def test_a_screen_costs_little_where_genes_are_many(make_corpus):
    wide = Corpus(make_corpus([200] * 4, [0] * 4, [4], genes=400, names=("human",)))
    row = training.Model(num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_positions=200)
    design, settings = plan(wide, goal="cell_type == 'beta'", screen=20, screen_sample=20, null_genes=10)
    parts = {part.name: part for part in cost_estimate.estimate_work(design, wide, settings, row, 200)}
    whole, no_screen = plan(wide, goal="cell_type == 'beta'")
    every = {part.name: part for part in cost_estimate.estimate_work(whole, wide, no_screen, row, 200)}
    for name in ("delete", "overexpress"):
        assert parts[f"{name}, screen"].flops < every[name].flops / 5
    share = 50 / len(design.targets)
    half = every["delete"].sentences / 2  # the other two cells are those of the screen
    assert parts[f"delete, {share:.0%} of the genes"].sentences == pytest.approx(half * share)
    assert parts["delete, sample of the screen"].sentences == pytest.approx(half * 20 / len(design.targets))


def test_the_text_says_time_and_cost(corpus):
    design, _ = plan(corpus)
    parts = [cost_estimate.WorkPart(name="delete", sentences=10, tokens=1000, flops=7.2e12)]
    text = cost_estimate.estimate_text(parts, design, rate=1e9, how="measured", num_workers=2, price=3.0)
    assert "time   1 h" in text
    assert "on 2 workers, 2 worker-hours" in text
    assert "cost   6.00" in text
    assert "perturb.price" in cost_estimate.estimate_text(
        parts, design, rate=1e9, how="measured", num_workers=2, price=0.0
    )
