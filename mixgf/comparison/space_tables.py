"""Tables of embedding spaces: measures, maps, and distances between corresponding types."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mixgf.classification import embedding_measures, encoders
from mixgf.classification.encoders import CHECKPOINT, EXPRESSION
from mixgf.classification.workspace import vector_column
from mixgf.comparison import compactness
from mixgf.comparison.encoder_sets import ComparisonContext, EncoderSet, donors_of, read_classification
from mixgf.corpus.reader import Corpus
from mixgf.storage import files, tables

MIN_SHARED = 50
"""Fewest cells that two spaces have in common for their types to be compared."""


def spaces(context: ComparisonContext) -> dict[str, pd.DataFrame]:
    """Tables of all spaces, from the classifications.

    `integration` has the measures, `maps` the coordinates and donor of every cell, `corresponding` the types of both species.
    `compactness` has the dispersion and local density of each type in the run's own space, relative to every other space.
    """
    measures, maps, types = [], [], []
    drawn: dict[str, tuple[pd.DataFrame, np.ndarray, np.ndarray]] = {}
    for encoder_set in context.encoder_sets:
        table = read_classification(encoder_set, "integration")
        if encoder_set.name:
            table = table[table["space"] != EXPRESSION]
        measures.append(table.assign(space=[encoder_set.space_name(s) for s in table["space"]]))
        obs = Corpus(encoder_set.paths.corpus).obs()
        of_cell = dict(zip(obs["cell"], donors_of(encoder_set, obs), strict=True))
        found = read_classification(encoder_set, "maps")
        for space, frame in found.groupby("space", sort=False):
            called = encoder_set.space_name(str(space))
            if encoder_set.name and space == EXPRESSION:
                continue
            maps.append(frame.assign(space=called, donor=[of_cell[c] for c in frame["cell"]]))
            vectors_ND, xy_N2 = _drawn(encoder_set, str(space))
            drawn[called] = maps[-1], vectors_ND, xy_N2
            kinds, species = frame["type"].to_numpy(str), frame["species"].to_numpy(str)
            types.append(embedding_measures.corresponding(vectors_ND, xy_N2, kinds, species).assign(space=called))
    return {"integration": pd.concat(measures, ignore_index=True), "maps": pd.concat(maps, ignore_index=True),
            "corresponding": pd.concat(types, ignore_index=True), "compactness": _compactness(drawn)}  # fmt: skip


def _compactness(drawn: dict[str, tuple[pd.DataFrame, np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """`compactness.compare` of the run's own space with every other one, on the cells that both have drawn."""
    own = encoders.space_name(CHECKPOINT)
    found = [pd.DataFrame(columns=["other", *compactness.COLUMNS])]
    for name, (frame, vectors_ND, xy_N2) in drawn.items():
        if name == own or own not in drawn:
            continue
        ours, own_ND, own_N2 = drawn[own]
        _, a, b = np.intersect1d(ours["cell"].to_numpy(str), frame["cell"].to_numpy(str), return_indices=True)
        if len(a) < MIN_SHARED:
            continue
        columns = (ours[c].to_numpy(str)[a] for c in ("species", "type", "donor"))
        table = compactness.compare(
            {"map": own_N2[a], "space": own_ND[a]}, {"map": xy_N2[b], "space": vectors_ND[b]}, *columns
        )
        found.append(table.assign(other=name))
    return pd.concat([f for f in found if len(f)] or found, ignore_index=True)


def _drawn(encoder_set: EncoderSet, space: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (N, D) and map coordinates (N, 2) of a classification's sample in one space, in the order of its `maps`."""
    folder = files.join(encoder_set.classification, "parts", "integration")
    names = [n for n in files.list_dir(folder) if n.rpartition("-")[0] == space]
    sizes = [int(n.rpartition("-")[2].removesuffix(".parquet")) for n in names]
    part = tables.read_table(files.join(folder, names[int(np.argmax(sizes))]))
    return vector_column(part), part.select(["x", "y"]).to_pandas().to_numpy()
