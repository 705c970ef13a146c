"""Terms of the Cell Ontology for labels, and for doubted cells the most specific term that covers the plausible labels.

The terms and their is_a edges are bundled (`resources/cell_ontology.parquet`; CC BY 4.0; Diehl et al. 2016). A label gets the id
that the user gives it, else that of `resources/cell_type_names.tsv`, else that of the term of the same name. Synonyms are not
searched: "alpha cell" is one of a retinal ganglion cell.

Shape letters: N cells, C classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pyarrow as pa

from mixgf.arrays import Bools, Floats
from mixgf.errors import UserError
from mixgf.storage import files, tables

PLAUSIBLE = 0.95
"""The plausible labels of a cell are the most probable ones that together have at least this probability."""
_TERMS, _NAMES = "resource:cell_ontology.parquet", "resource:cell_type_names.tsv"


@dataclass(frozen=True, eq=False)
class Ontology:
    """Terms and their is_a edges."""

    names: dict[str, str]
    """Name of each term, by id."""
    parents: dict[str, tuple[str, ...]]
    """Direct parents of each term, by id."""
    release: str = ""

    @cached_property
    def ancestors(self) -> dict[str, frozenset[str]]:
        """Each term's ancestors and itself."""
        found: dict[str, frozenset[str]] = {}
        for term in self.names:
            todo = [term]
            while todo:
                now = todo[-1]
                missing = [p for p in self.parents[now] if p not in found]
                if missing:
                    todo += missing
                    continue
                found[now] = frozenset({now}).union(*(found[p] for p in self.parents[now]))
                todo.pop()
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of terms that each term covers, itself included."""
        count = dict.fromkeys(self.names, 0)
        for covered in self.ancestors.values():
            for term in covered:
                count[term] += 1
        return count

    def common(self, terms: Iterable[str]) -> str:
        """The most specific term that covers all of `terms`; empty where there is none.

        Of their common ancestors it is the one that covers the fewest terms (the most informative one: Resnik 1995). Of equals the
        lowest id.
        """
        several = [self.ancestors[term] for term in terms]
        shared = frozenset.intersection(*several) if several else frozenset()
        return min(shared, key=lambda term: (self.sizes[term], term), default="")


@cache
def load() -> Ontology:
    """The bundled Cell Ontology."""
    table = tables.read_table(_TERMS)
    ids = table["id"].to_pylist()
    release = (table.schema.metadata or {}).get(b"release", b"").decode()
    parents = {term: tuple(of) for term, of in zip(ids, table["parents"].to_pylist(), strict=True)}
    return Ontology(dict(zip(ids, table["name"].to_pylist(), strict=True)), parents, release)


@cache
def _common_names() -> dict[str, str]:
    text = files.read_bytes(_NAMES).decode()
    return {row["name"]: row["id"] for row in csv.DictReader(io.StringIO(text), delimiter="\t")}


def ids_of(labels: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """Id of each label that has one.

    Args:
        labels: Names of cell types.
        given: The user's ids, by label. They come first.

    Raises:
        UserError: an id of `given` is not in the ontology.
    """
    ontology = load()
    by_name = {name.lower(): term for term, name in ontology.names.items()}
    wrong = [(label, term) for label, term in given.items() if term and term not in ontology.names]
    if wrong:
        label, term = wrong[0]
        msg = f"label {label!r}: {term!r} is no term of the Cell Ontology {ontology.release}; give an id such as CL:0000236, or leave it empty"
        raise UserError(msg)
    found = {}
    for label in labels:
        name = label.strip().lower()
        term = given[label] if label in given else _common_names().get(name) or by_name.get(name, "")
        if term:
            found[label] = term
    return found


def read_ids(uri: str) -> dict[str, str]:
    """A user's table of labels and ids: CSV, TSV or Parquet with the columns `label` and `id`.

    Raises:
        UserError: no such file, or a column is missing.
    """
    where = f"--ontology {uri}"
    if not files.exists(uri):
        msg = (
            f"{where}: no such file; give a CSV, TSV or Parquet table with the columns label and id, or the word names"
        )
        raise UserError(msg)
    if uri.endswith(".parquet"):
        columns: dict[str, list[object]] = tables.read_table(uri).to_pydict()
    else:
        text = files.read_bytes(uri).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if uri.endswith(".tsv") else ","))
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    missing = [name for name in ("label", "id") if name not in columns]
    if missing:
        msg = f"{where}: no column {missing[0]!r}; there are {', '.join(map(str, columns)) or 'none'}"
        raise UserError(msg)
    return {str(a): str(b or "") for a, b in zip(columns["label"], columns["id"], strict=True) if a is not None}


def columns(p_NC: Floats, doubted_N: Bools, classes: Sequence[str], ids: Mapping[str, str]) -> dict[str, pa.Array]:
    """Terms of cells: `ontology_id` of the label, and `term_id` and `term` that can be trusted.

    `term` is the label's own term for a cell whose label is not doubted. For a doubted cell it is the most specific term that
    covers the plausible labels (`PLAUSIBLE`), at least the two most probable ones. It is empty where one of these has no id.

    Args:
        p_NC: Probabilities; a row of NaN = no label.
        doubted_N: Whether the label is doubted.
        classes: Names of the classes.
        ids: Id of each class that has one (`ids_of`).
    """
    ontology = load()
    id_C = [ids.get(name, "") for name in classes]
    own: list[str] = []
    terms: list[str] = []
    seen: dict[tuple[int, ...], str] = {}
    for p_C, doubted in zip(p_NC, doubted_N.tolist(), strict=True):
        if np.isnan(p_C).any():
            own.append("")
            terms.append("")
            continue
        order = np.argsort(-p_C, kind="stable")
        own.append(id_C[order[0]])
        number = 1
        if doubted:
            number = max(2, int(np.searchsorted(np.cumsum(p_C[order]), PLAUSIBLE)) + 1)
        key = tuple(sorted(order[:number].tolist()))
        if key not in seen:
            several = [id_C[c] for c in key]
            seen[key] = ontology.common(several) if all(several) else ""
        terms.append(seen[key])
    named = [ontology.names.get(term, "") for term in terms]
    return {
        "ontology_id": pa.array(own, pa.string()),
        "term_id": pa.array(terms, pa.string()),
        "term": pa.array(named, pa.string()),
    }
