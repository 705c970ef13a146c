"""Masked inputs and second views of cells (paper section 3.3), on packed sentences.

Every random draw is a function of the seed, the epoch, the visit of the cell and the position in it.

Shapes: T packed tokens, B cells, K masked positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mixgf import rng
from mixgf.corpus.packed import Packed, keep_tokens, token_positions
from mixgf.errors import UserError
from mixgf.genes.vocabulary import MASK, NUM_SPECIALS, Vocabulary
from mixgf.jit import jit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
_SELECT, _ACTION, _GENE, _SUBSAMPLE, _TARGET, _SIDE = range(6)  # streams of random draws


class ReplacementGenes(NamedTuple):
    """Token ids of the genes of every species, from which random replacements of masked genes are drawn."""

    genes: I32
    """Ids of all species, one species after the other."""
    starts: I64
    """Offsets of each species code in `genes`."""

    @classmethod
    def by_species(cls, genes: list[I32]) -> ReplacementGenes:
        """Join the token ids of each species, in the order of the species codes."""
        return cls(np.concatenate(genes), np.cumsum([0, *map(len, genes)]))


def mask_genes(
    sentences: Packed,
    visits_B: I64,
    species_B: npt.NDArray[np.int8],
    replacements: ReplacementGenes,
    *,
    fraction: float,
    key: tuple[int, ...],
) -> tuple[I32, I64, I64]:
    """Mask sentences: each gene is chosen with probability `fraction`, then replaced as in BERT.

    80 % of the chosen genes become <mask>, 10 % a random gene of the species, 10 % stay.

    Args:
        sentences: tokens (T,) and offsets.
        visits_B: visits of the cells, part of the random key.
        species_B: species code of each cell.
        replacements: genes for random replacements.
        fraction: probability of a gene to be chosen; special tokens never are.
        key: further parts of the random key (seed, epoch, view).

    Returns:
        Input tokens (T,), chosen positions (K,), and the true genes there (K,), int64.
    """
    tokens_T, offsets = sentences
    return _mask_genes(
        tokens_T,
        offsets,
        rng.of_numbers(*key),
        visits_B,
        species_B,
        replacements.genes,
        replacements.starts,
        rng.limit(fraction),
    )


@jit
def _mask_genes(  # noqa: PLR0917 (compiled)
    tokens_T: I32,
    offsets: I64,
    after: Any,
    visits_B: I64,
    species_B: npt.NDArray[np.int8],
    genes: I32,
    starts: I64,
    limit: np.uint64,
) -> tuple[I32, I64, I64]:
    inputs, at, number = tokens_T.copy(), np.empty(len(tokens_T) + 1, dtype=np.int32), np.int64(0)
    drawn = np.empty(len(tokens_T), dtype=np.bool_)
    for cell in range(len(species_B)):
        start, stop, key = offsets[cell], offsets[cell + 1], rng.mixed(after, np.uint64(visits_B[cell]))
        cell_L, drawn_L, places, chosen = inputs[start:stop], drawn[start:stop], at[number:], np.uint64(0)
        for t in range(len(drawn_L)):  # a separate loop, which compiles to vector instructions
            drawn_L[t] = rng.draw53(rng.mixed(key, np.uint64(t)), np.uint64(_SELECT)) < limit
        for t in range(len(drawn_L)):  # no branch, as it would be mispredicted
            places[chosen] = start + t
            chosen += np.uint64(drawn_L[t] & (cell_L[t] >= NUM_SPECIALS))
        first = starts[species_B[cell]]
        count = starts[species_B[cell] + 1] - first
        for t in places[:chosen]:
            h = rng.mixed(key, np.uint64(t - start))
            action = rng.draw(h, np.uint64(_ACTION))
            if action < 0.8:
                inputs[t] = MASK
            elif action < 0.9:
                inputs[t] = genes[first + np.int64(rng.draw(h, np.uint64(_GENE)) * count)]
        number += np.int64(chosen)
    at_K, genes_K = np.empty(number, dtype=np.int64), np.empty(number, dtype=np.int64)
    for k in range(number):
        at_K[k], genes_K[k] = at[k], tokens_T[at[k]]
    return inputs, at_K, genes_K


@jit
def merge_query_positions(at_K: I64, begins_B: I32, offsets_B1: I32) -> tuple[I64, I64, I64, I32]:
    """Positions whose last hidden state is needed: masked tokens and first tokens of cells.

    Args:
        at_K: positions of masked tokens, ascending.
        begins_B: positions of first tokens, ascending.
        offsets_B1: offsets of the cells.

    Returns:
        The union of both, ascending (R,); the index in it of each masked token (K,) and of each first token (B,); and the
        offsets of the cells in it (B + 1,).
    """
    places = np.empty(len(at_K) + len(begins_B), dtype=np.int64)
    of_at, of_begins = np.empty_like(at_K), np.empty(len(begins_B), dtype=np.int64)
    number, i, j = 0, 0, 0
    while i < len(at_K) or j < len(begins_B):
        place = at_K[i] if j == len(begins_B) or (i < len(at_K) and at_K[i] <= begins_B[j]) else np.int64(begins_B[j])
        if i < len(at_K) and at_K[i] == place:
            of_at[i] = number
            i += 1
        if j < len(begins_B) and begins_B[j] == place:
            of_begins[j] = number
            j += 1
        places[number] = place
        number += 1
    bounds = np.empty(len(offsets_B1), dtype=np.int32)
    before = 0
    for cell in range(len(offsets_B1)):
        while before < number and places[before] < offsets_B1[cell]:
            before += 1
        bounds[cell] = before
    return places[:number], of_at, of_begins, bounds


def subsample_genes(sentences: Packed, visits_B: I64, fraction: float, key: tuple[int, ...]) -> Packed:
    """Keep each gene with probability `fraction`; special tokens and the first token always stay."""
    tokens_T, offsets = sentences
    keep = rng.chance(rng.of_places(rng.hashed(*key, visits_B), offsets), _SUBSAMPLE, fraction)
    keep[offsets[:-1][np.diff(offsets) > 0]] = True
    return keep_tokens(sentences, keep | ((tokens_T < NUM_SPECIALS) & (tokens_T != MASK)))


def gene_sides(vocab_size: int, key: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """A side for every token id, drawn by a fair coin: bool (V,)."""
    return rng.uniform(np.arange(vocab_size), after=rng.of_numbers(*key, _SIDE)) < 0.5


def genes_of_side(sentences: Packed, side_V: npt.NDArray[np.bool_]) -> tuple[Packed, I64]:
    """Sentences with the genes of one side only, and the positions of these in the whole sentences.

    Special tokens stay. A sentence without a gene of the side keeps its first token.
    """
    tokens_T, offsets = sentences
    keep_T = side_V[tokens_T] | (tokens_T < NUM_SPECIALS)
    kept = np.concatenate([[0], np.cumsum(keep_T)])
    empty = (np.diff(kept[offsets]) == 0) & (np.diff(offsets) > 0)
    keep_T[offsets[:-1][empty]] = True
    return keep_tokens(sentences, keep_T), token_positions(offsets)[keep_T]


class Translator:
    """Translates sentences gene by gene to another species, by one-to-one orthologs.

    Args:
        vocabulary: of the corpus.
        orthologs: (species_a, species_b) to pairs of genes, `genes.species.orthologs`.
    """

    def __init__(self, vocabulary: Vocabulary, orthologs: dict[tuple[str, str], dict[str, str]]) -> None:
        names = vocabulary.species
        maps = {
            (s, t): vocabulary.ortholog_map(a, b, orthologs)
            for s, a in enumerate(names) for t, b in enumerate(names) if s != t
        }  # fmt: skip
        self.maps = {pair: table for pair, table in maps.items() if (table >= 0).any()}
        for table in self.maps.values():
            table[:NUM_SPECIALS] = np.arange(NUM_SPECIALS)
        if not self.maps:
            msg = "objective: orthologs asked for, but vocab.orthologs links no two species of the corpus; name a table"
            raise UserError(msg)

    def __call__(
        self, sentences: Packed, visits_B: I64, species_B: npt.ArrayLike, key: tuple[int, ...]
    ) -> tuple[Packed, npt.NDArray[np.bool_]]:
        """Translate sentences; with several target species one is drawn for each cell.

        Returns:
            Packed sentences, and bool (B,): which cells have a translation. Genes without an ortholog are left out; cells
            without any stay as they are.
        """
        tokens_T, offsets = sentences
        codes, out_T = np.asarray(species_B), np.full(len(tokens_T), -1, dtype=np.int32)
        code_T, draw_B = np.repeat(codes, np.diff(offsets)), rng.uniform(*key, visits_B, _TARGET)
        draw_T = np.repeat(draw_B, np.diff(offsets))
        for code in np.unique(codes):
            targets = [t for s, t in self.maps if s == code]
            for i, target in enumerate(targets):
                mine = (code_T == code) & (draw_T >= i / len(targets)) & (draw_T < (i + 1) / len(targets))
                out_T[mine] = self.maps[int(code), target][tokens_T[mine]]
        genes = np.concatenate([[0], np.cumsum((out_T >= 0) & (tokens_T >= NUM_SPECIALS))])[offsets]
        found = np.diff(genes) > 0
        keep = (out_T >= 0) | ~np.repeat(found, np.diff(offsets))
        return keep_tokens((np.where(out_T >= 0, out_T, tokens_T), offsets), keep), found
