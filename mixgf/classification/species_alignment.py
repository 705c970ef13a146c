"""Moved here from mixgf/classify.py."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special

from mixgf.arrays import Floats, Ints
from mixgf.genes.vocabulary import NUM_SPECIALS, Vocabulary


def shared_tokens(
    vocabulary: Vocabulary, pairs: dict[tuple[str, str], dict[str, str]], source: str, target: str
) -> npt.NDArray[np.int32]:
    """What each token is read as where cells of one species train and cells of another are tested, (V,).

    Args:
        vocabulary: Of the corpus.
        pairs: `species.orthologs`.
        source: The species that trains: its genes with a one-to-one ortholog are read as they are.
        target: The species that is tested: its genes are read as their orthologs. Specials stay; all others are -1.
    """
    there, back = (vocabulary.ortholog_map(a, b, pairs) for a, b in ((source, target), (target, source)))
    tokens_V = np.arange(vocabulary.size, dtype=np.int32)
    out_V = np.where(back >= 0, back, np.where(there >= 0, tokens_V, -1)).astype(np.int32)
    out_V[:NUM_SPECIALS] = tokens_V[:NUM_SPECIALS]
    return out_V


def moved(test_MC: Floats, train_NC: Floats, labels_N: Ints, *, rounds: int = 10) -> Floats:
    """Probabilities whose log scores are shifted, class by class, to where the training cells' lie.

    For a linear model it is the same as to centre every feature within its species. The centre is the mean of the classes' means,
    so that it does not follow how many cells of each class there are; the tested cells' classes are the predicted ones, first
    without a shift, then again with it until none changes. A class that is predicted fewer than three times is left out of both.

    Args:
        test_MC: Of the tested cells.
        train_NC: Of the training cells.
        labels_N: Class ids of the training cells, each class at least once.
        rounds: At most.
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
