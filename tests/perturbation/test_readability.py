"""In how many start cells a gene can be read, and what reading length would show it."""

import numpy as np
import pytest

from mixgf.config import perturbation, run
from mixgf.corpus.reader import Corpus
from mixgf.perturbation import group_design, readability

LENGTHS = [12, 9, 16, 7, 14, 16, 10, 8]


@pytest.fixture(scope="module")
def corpora(make_corpus):
    uri = make_corpus(LENGTHS, [0, 0, 0, 1, 0, 0, 1, 0], [3, 5], genes=20)
    return Corpus(uri), Corpus(uri, max_len=6)


def test_counts_and_lengths_equal_a_plain_loop(corpora):
    stored, read = corpora
    chosen = run.Config(
        perturb=perturbation.Perturb(max_cells=0, genes=("human3", "human4+human5", "human9", "mouse7"))
    )
    plan = group_design.build_design(read, chosen)
    found = readability.measure(read, plan, block=3)
    columns = found.columns()
    sentences = [stored.tokens([cell])[0].tolist() for cell in range(8)]
    for k, target in enumerate(plan.targets):
        mine = [cell for cell in range(8) if stored.species[stored.species_N[cell]] == target.species]
        places = [
            max(map(s.index, target.tokens)) for s in map(sentences.__getitem__, mine) if set(target.tokens) <= set(s)
        ]
        assert columns["start_cells"][k] == len(mine)
        assert columns["readable_cells"][k] == sum(place < 6 for place in places) == round(target.coverage * len(mine))
        assert columns["expressing_cells"][k] == len(places)
        if places:
            length = int(columns["reading_length"][k])
            assert np.mean([place < length for place in places]) >= readability.SHARE
            assert np.mean([place < length - 1 for place in places]) < readability.SHARE
    assert found.stored_K.max() > found.readable_K[found.stored_K.argmax()]


def test_hidden_genes_are_named_with_the_length_that_shows_them(corpora):
    stored, read = corpora
    sentences = [stored.tokens([cell])[0].tolist() for cell in (0, 1, 2, 4, 5, 7)]
    hidden = next(
        token
        for token in range(3, 23)
        if sum(token in s[:6] for s in sentences) == 0 and sum(token in s for s in sentences) >= 2
    )
    name = stored.vocabulary.symbols()[hidden]
    chosen = run.Config(perturb=perturbation.Perturb(max_cells=0, genes=(name,), start="species == 'human'"))
    plan = group_design.build_design(read, chosen)
    found = readability.measure(read, plan)
    (text,) = readability.warnings(plan, found, 6)
    assert f"{name} in 0 of the {found.stored_K[0]} start cells that hold it" in text
    assert f"model.max_positions = {int(found.length_K[0])}" in text
    whole = group_design.build_design(stored, chosen)
    assert readability.warnings(whole, readability.measure(stored, whole), 16) == []
    assert "does not pull the next gene in" in readability.cut_warning(read, plan, ("delete",))
    assert readability.cut_warning(read, plan, ("overexpress",)) == ""
    assert readability.cut_warning(stored, whole, ("delete",)) == ""
