"""Translate the token ids of a published dictionary to those of the vocabulary.

Letters: N cells, T ids of all cells, K the dictionary's highest id + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mixgf.genes.token_dictionaries import TokenDictionary
from mixgf.genes.vocabulary import SpeciesGenes
from mixgf.jit import jit

UNKNOWN, FRONT, END, OUTSIDE = -1, -2, -3, -4
"""Codes of ids that are not vocabulary genes: not in the dictionary (or a special token that sentences must not hold); a
special token of the front or of the end of a sentence; a gene that is not in the vocabulary."""
_PLACES = {"<cls>": FRONT, "<bos>": FRONT, "<pad>": END, "<eos>": END, "<sep>": END}
COUNTED = ("kept", "special", "unknown", "outside", "duplicate", "truncated")
"""What becomes of the ids of a sentence; every id counts as one of these."""


def token_of_id(dictionary: TokenDictionary, names: Mapping[str, str], genes: SpeciesGenes) -> np.ndarray:
    """Token of the vocabulary, or one of the codes above, for each id of a dictionary: int32[K].

    `names` are the dictionary's genes of the species (`genes_of_species`), `genes` the vocabulary's.
    """
    ids = [*dictionary.genes.values(), *dictionary.specials.values()]
    out = np.full(max(ids, default=-1) + 1, UNKNOWN, dtype=np.int32)
    ours = dict(zip(genes.genes.tolist(), genes.tokens.tolist(), strict=True))
    for name, at in dictionary.genes.items():
        out[at] = ours.get(names.get(name, ""), OUTSIDE)
    for name, at in dictionary.specials.items():
        out[at] = _PLACES.get(name, UNKNOWN)
    return out


@jit
def _remap_ids(  # noqa: PLR0917 (a compiled kernel)
    ids: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    longest: int,
    seen: np.ndarray,
    out: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    first: np.ndarray,
) -> int:
    written = 0
    for row in range(offsets.shape[0] - 1):
        n = 0
        begin, stop = offsets[row], offsets[row + 1]
        after = (
            END  # what stands behind an id, seen from the end of the sentence: only specials of the end may follow one
        )
        last = stop
        while last > begin and after == END:
            t = int(ids[last - 1])
            after = int(table[t]) if 0 <= t < table.shape[0] else UNKNOWN
            if after == END:
                last -= 1
        counts[1] += stop - last
        for p in range(begin, last):
            t = int(ids[p])
            code = int(table[t]) if 0 <= t < table.shape[0] else UNKNOWN
            if code >= 0 and seen[code] != row + 1:
                seen[code] = row + 1
                if n < longest:
                    out[written] = code
                    written += 1
                n += 1
                continue
            if code >= 0:
                kind = 4
            elif code == FRONT and p == begin:
                kind = 1
            else:
                kind = 3 if code == OUTSIDE else 2
            counts[kind] += 1
            if first[kind] < 0:
                first[kind] = p
        genes[row] = n
        counts[0] += min(n, longest)
        counts[5] += max(n - longest, 0)
    return written


@dataclass(frozen=True, slots=True)
class Sentences:
    """Packed sentences in token ids of the vocabulary."""

    tokens: np.ndarray
    """int32: the first `longest` genes of each cell, one cell after the other."""
    genes_N: np.ndarray
    """int32: number of distinct vocabulary genes of each cell, before it is cut."""
    counts: dict[str, int]
    """Number of ids of each kind of `COUNTED`."""
    first: dict[str, int]
    """Position among the T ids of the first of each kind that is left out, -1 = none."""


def remap_ids(ids_T: np.ndarray, offsets_N1: np.ndarray, table_K: np.ndarray, *, size: int, longest: int) -> Sentences:
    """Translate sentences to token ids of the vocabulary; the order stays, and a repeated gene keeps its first position.

    Args:
        ids_T: ids of the dictionary, integers of any width.
        offsets_N1: int64 offsets of the cells.
        table_K: from `token_of_id`.
        size: number of token ids of the vocabulary.
        longest: most genes kept of a cell.
    """
    out = np.empty(len(ids_T), dtype=np.int32)
    genes = np.empty(len(offsets_N1) - 1, dtype=np.int32)
    counts, first = np.zeros(len(COUNTED), dtype=np.int64), np.full(len(COUNTED), -1, dtype=np.int64)
    seen = np.zeros(size, dtype=np.int32)
    n = _remap_ids(ids_T, offsets_N1, table_K, longest, seen, out, genes, counts, first)
    return Sentences(
        out[:n],
        genes,
        dict(zip(COUNTED, counts.tolist(), strict=True)),
        dict(zip(COUNTED, first.tolist(), strict=True)),
    )
