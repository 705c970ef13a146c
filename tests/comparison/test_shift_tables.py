"""Laws of the tables of `mixgf compare`, on cases worked by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mixgf.classification import embedding_measures
from mixgf.classification.labels import merged
from mixgf.comparison import transfer_tables
from mixgf.config.comparison import Compare, ShiftSpec
from mixgf.errors import UserError


def test_what_a_failed_type_is_called_and_why():
    task = {"group": "g", "split": "species", "direction": "h>m", "seed": 0}
    cells = [
        ("knn", "a", "a", 1), ("knn", "a", "b", 6), ("knn", "a", "c", 3), ("knn", "b", "b", 8), ("knn", "c", "a", 4),
        ("hvg_logreg", "a", "a", 9), ("hvg_logreg", "a", "b", 1), ("hvg_logreg", "b", "b", 8), ("hvg_logreg", "c", "a", 4),
        ("majority", "a", "a", 10), ("majority", "b", "a", 8), ("majority", "c", "a", 4),  # finds all of a, and tells nothing
    ]  # fmt: skip
    confusion = pd.DataFrame([task | {"model": m, "true": t, "predicted": p, "count": n} for m, t, p, n in cells])
    sizes = {"a": (50, 10), "b": (60, 8), "c": (5, 4)}
    per_class = pd.DataFrame([
        task | {"model": m, "class": kind, "num_train": train, "num_test": test} for m in ("knn", "hvg_logreg", "majority") for kind, (train, test) in sizes.items()
    ])  # fmt: skip
    found = transfer_tables.failures(per_class, confusion).set_index(["model", "type"])
    a = found.loc[("knn", "a")]
    assert (a["recall"], a["into"], a["into_share"], a["best_control"], a["control_f1"]) == (
        0.1,
        "b",
        0.6,
        "hvg_logreg",
        18 / 23,
    )
    assert 0.017 < a["low"] < 0.019  # Wilson's interval of 1 in 10: .0179 to .4042
    assert 0.404 < a["high"] < 0.405
    assert a["why"] == "a baseline finds it (hvg_logreg: F1 0.78), this model does not"
    assert found.loc[("knn", "b"), "why"] == found.loc[("knn", "b"), "into"] == ""
    assert found.loc[("knn", "c"), "why"] == "only 5 training cells"
    twice = transfer_tables.failures(per_class, pd.concat([confusion, confusion.assign(seed=1)])).set_index(
        ["model", "type"]
    )
    pd.testing.assert_frame_equal(twice, found)  # the same cells again are no more cells
    few = transfer_tables.failures(per_class.assign(num_train=90), confusion).set_index(["model", "type"])
    assert few.loc[("knn", "c"), "why"].startswith("all baselines fail too (best majority: F1 0.00)")


def test_corresponding_types_by_hand():
    """Types lie on axes; b of the mouse lies nearer to a of the human than its own counterpart does."""
    at = {"human a": (1, 0), "human b": (0, 1), "mouse a": (1, 0.1), "mouse b": (1, 0.2)}
    names = [n for n in at for _ in range(5)]
    vectors = np.array([at[n] for n in names], dtype=np.float32)
    species, types = (np.array([n.split()[i] for n in names]) for i in (0, 1))
    found = embedding_measures.corresponding(vectors, vectors, types, species).set_index(["species", "type"])
    assert found.loc[("human", "a"), "nearest"] == "a"
    assert (found.loc[("mouse", "b"), "nearest"], found.loc[("mouse", "b"), "place"]) == ("a", 2)
    assert found.loc[("human", "a"), "distance"] == pytest.approx(1 - 1 / np.sqrt(1.01), abs=1e-6)
    assert found.loc[("human", "b"), "map_distance"] == pytest.approx(np.hypot(1, 0.8), abs=1e-6)
    few = embedding_measures.corresponding(vectors[1:], vectors[1:], types[1:], species[1:])
    assert "a" not in set(few["type"])  # of the human's a only four cells are left


def test_shifts_have_different_names_and_two_sets():
    one = ShiftSpec(name="x", before="a == 'q'", after="b == 1")
    with pytest.raises(UserError, match=r"compare.shifts = \['x', 'x'\]: must be shifts with different names"):
        Compare(shifts=(one, replace(one, after=None)))
    with pytest.raises(UserError, match=r"compare.shifts\[\].after = ' ': must be given"):
        replace(one, after=" ")


def test_labels_that_count_as_one():
    labels = np.array(["CD4 T", "CD8 T", "B", ""])
    assert merged(labels, {"T": ("CD4 T", "CD8 T")}).tolist() == ["T", "T", "B", ""]
    assert merged(labels, {}) is labels
    for wrong in ({"T": ("CD5 T",)}, {"": ("CD4 T",)}, {"T": ("CD4 T",), "U": ("CD4 T",)}):
        with pytest.raises(UserError, match="must replace labels of cells, each once"):
            merged(labels, wrong)
