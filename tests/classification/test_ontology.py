"""Terms of the Cell Ontology for labels, and the term that covers the plausible labels of a doubted cell."""

from pathlib import Path

import numpy as np
import pytest

from mixgf.classification import ontology
from mixgf.classification.ontology import Ontology
from mixgf.errors import UserError

SMALL = Ontology(
    names={"a": "cell", "b": "blood cell", "c": "lymphocyte", "d": "T cell", "e": "B cell", "f": "neuron", "g": "both"},
    parents={"a": (), "b": ("a",), "c": ("b",), "d": ("c",), "e": ("c",), "f": ("a",), "g": ("d", "f")},
)
"""cell > blood cell > lymphocyte > T cell, B cell; cell > neuron; `both` is a T cell and a neuron."""


@pytest.mark.parametrize(
    ("terms", "expected"),
    [("de", "c"), ("df", "a"), ("d", "d"), ("dd", "d"), ("dc", "c"), ("gf", "f"), ("ge", "c"), ("", "")],
)
def test_the_common_term_is_the_most_specific_one_that_covers_all(terms: str, expected: str) -> None:
    assert SMALL.common(terms) == expected


def test_the_bundled_ontology_is_whole() -> None:
    found = ontology.load()
    assert len(found.names) > 3_000
    assert found.release.startswith("v20")
    assert found.names["CL:0000236"] == "B cell"
    for term, parents in found.parents.items():
        assert set(parents) <= set(found.names)
        assert term not in parents
    for parent, child in (("CL:0000084", "CL:0000624"), ("CL:0000542", "CL:0000236"), ("CL:0008024", "CL:0000169")):
        assert parent in found.ancestors[child]
        assert child not in found.ancestors[parent]


def test_every_common_name_has_a_term_and_no_synonym_is_taken() -> None:
    names = list(ontology._common_names())
    assert set(ontology.ids_of(names, {})) == set(names)
    assert ontology.ids_of(["alpha cell"], {}) == {"alpha cell": "CL:0000171"}  # not the retinal ganglion cell
    assert ontology.ids_of(["no such cell", "T Cell"], {}) == {"T Cell": "CL:0000084"}


def test_ids_of_the_user_come_first_and_must_be_known(tmp_path: Path) -> None:
    for name, text in (
        ("ids.csv", "label,id\nductal cell,CL:0002079\nodd,\n"),
        ("ids.tsv", "id\tlabel\nCL:0002079\tductal cell\n"),
    ):
        (tmp_path / name).write_text(text)
        own = ontology.read_ids(str(tmp_path / name))
        assert ontology.ids_of(["ductal cell", "beta cell"], own) == {
            "ductal cell": "CL:0002079",
            "beta cell": "CL:0000169",
        }
    with pytest.raises(UserError, match=r"label 'x': 'CL:1' is no term of the Cell Ontology v20"):
        ontology.ids_of(["x"], {"x": "CL:1"})
    (tmp_path / "bad.csv").write_text("label,term\na,b\n")
    with pytest.raises(UserError, match=r"--ontology .*bad.csv: no column 'id'; there are label, term"):
        ontology.read_ids(str(tmp_path / "bad.csv"))
    with pytest.raises(UserError, match=r"--ontology .*none.csv: no such file"):
        ontology.read_ids(str(tmp_path / "none.csv"))


def test_a_doubted_cell_gets_the_term_that_covers_its_plausible_labels() -> None:
    classes = ("CD4 T cell", "CD8 T cell", "B cell", "odd")
    ids = ontology.ids_of(classes, {})
    p = np.array([
        [0.60, 0.39, 0.01, 0.0],  # trusted: its own term
        [0.60, 0.39, 0.01, 0.0],  # an alpha-beta T cell
        [0.50, 0.30, 0.20, 0.0],  # a lymphocyte
        [0.99, 0.01, 0.00, 0.0],  # doubted for its distance: the two most probable
        [0.60, 0.00, 0.00, 0.4],  # a plausible label has no id
        [np.nan] * 4,
    ])  # fmt: skip
    found = ontology.columns(p, np.array([False, True, True, True, True, True]), classes, ids)
    terms, names = found["term_id"].to_pylist(), found["term"].to_pylist()
    assert terms[0] == found["ontology_id"].to_pylist()[0] == ids["CD4 T cell"]
    covers = ontology.load().ancestors
    assert names[1] == names[3] == "mature alpha-beta T cell"
    assert all(terms[2] in covers[ids[name]] for name in classes[:3])
    assert names[2] == "lymphocyte"
    assert (terms[4], names[4], terms[5]) == ("", "", "")
