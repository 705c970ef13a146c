"""Models on sentences between species and studies: genes are read as orthologs, class scores are shifted to those of the training cells.

Shapes: N training cells, M cells to predict, C classes, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from mixgf.arrays import Floats, Ints
from mixgf.classification.models.protocol import Problem, SentenceSet
from mixgf.corpus.packed import Packed, keep_tokens
from mixgf.genes.species import orthologs
from mixgf.genes.vocabulary import NUM_SPECIALS, Vocabulary


def shared_tokens(
    vocabulary: Vocabulary, pairs: dict[tuple[str, str], dict[str, str]], source: str, target: str
) -> npt.NDArray[np.int32]:
    """The token that each token is read as (V,), where one species trains and another is tested.

    Args:
        vocabulary: Of the corpus.
        pairs: One-to-one orthologs (`species.orthologs`).
        source: The species that trains; its genes with a one-to-one ortholog are read as they are.
        target: The species that is tested; its genes are read as their orthologs. Special tokens stay; all others are -1.
    """
    there, back = (vocabulary.ortholog_map(a, b, pairs) for a, b in ((source, target), (target, source)))
    tokens_V = np.arange(vocabulary.size, dtype=np.int32)
    out_V = np.where(back >= 0, back, np.where(there >= 0, tokens_V, -1)).astype(np.int32)
    out_V[:NUM_SPECIALS] = tokens_V[:NUM_SPECIALS]
    return out_V


def shared_tokens_of(problem: Problem[SentenceSet]) -> npt.NDArray[np.int32] | None:
    """`shared_tokens` of a problem in which one species trains and another is tested; None for others, or without `classify.align`."""
    trains, tested = (np.unique(cells.species).tolist() for cells in (problem.train, problem.target))
    if not (problem.config.classify.align and len(trains) == len(tested) == 1 and trains != tested):
        return None
    pairs = orthologs(problem.config.vocab.orthologs)
    return shared_tokens(problem.train.x.corpus.vocabulary, pairs, trains[0], tested[0])


def read_as(sentences: Packed, shared_V: npt.NDArray[np.int32] | None) -> Packed:
    """Sentences with each token read as `shared_V` has it; one without any shared gene stays as it is. None: all stay."""
    if shared_V is None:
        return sentences
    tokens_T, offsets = sentences
    read_T = shared_V[tokens_T]
    some_B = np.add.reduceat(np.append(read_T >= NUM_SPECIALS, False), offsets[:-1]) > 0
    some_T = np.repeat(some_B & (np.diff(offsets) > 0), np.diff(offsets))
    return keep_tokens((np.where(some_T, read_T, tokens_T), offsets), (read_T >= 0) | ~some_T)


def is_new_study(problem: Problem[Any]) -> bool:
    """Whether no cell of the studies to predict has trained, and `classify.align` shifts their scores."""
    known = np.isin(problem.target.studies, problem.train.studies)
    return problem.config.classify.align and len(known) > 0 and not known.any()


def align_scores(test_MC: Floats, train_NC: Floats, labels_N: Ints, *, rounds: int = 10) -> Floats:
    """Probabilities (M, C) whose log scores are shifted, class by class, so that their centre is that of the training cells.

    For a linear model this is the same as centring every feature within its species. The centre is the mean of the class means, so
    it does not depend on class sizes. Classes of the tested cells are the predicted ones, first without a shift, then with it until
    none changes. A class that is predicted fewer than three times is left out of both centres.

    Args:
        test_MC: Probabilities of the tested cells.
        train_NC: Probabilities of the training cells.
        labels_N: Class ids of the training cells, each class at least once.
        rounds: Most repetitions.
    """
    tests_MC, trains_NC = (np.log(p.clip(1e-300)) for p in (test_MC, train_NC))
    shifted_MC = tests_MC
    for _ in range(rounds):
        said_M = shifted_MC.argmax(1)
        there = [c for c in range(test_MC.shape[1]) if (said_M == c).sum() >= 3]
        if not there:
            break
        of_tests, of_trains = (
            np.stack([scores[ids == c].mean(0) for c in there]).mean(0)
            for scores, ids in ((tests_MC, said_M), (trains_NC, labels_N))
        )
        shifted_MC = tests_MC - of_tests + of_trains
        if (shifted_MC.argmax(1) == said_M).all():
            break
    return special.softmax(shifted_MC, axis=1)
