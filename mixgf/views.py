"""Masked inputs and second views of cells, on packed sentences in numpy; every draw is keyed (paper section 3.3, spec section 6).

Shapes: T packed tokens, B cells, K masked positions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mixgf import keyed
from mixgf.config import UserError
from mixgf.vocab import MASK, NUM_SPECIALS, Vocabulary

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Packed = tuple[I32, I64]
"""Tokens (T,) and offsets (B + 1,)."""
_SELECT, _ACTION, _GENE, _THIN, _TARGET = range(5)  # streams of keyed draws


def mask(
    sentences: Packed,
    visits_B: I64,
    species_B: npt.ArrayLike,
    pools: list[I32],
    *,
    fraction: float,
    key: tuple[int, ...],
) -> tuple[I32, I64]:
    """Mask sentences: each gene is chosen with probability `fraction`; 80 % <mask>, 10 % a random gene, 10 % left.

    Args:
        sentences: tokens (T,) and offsets.
        visits_B: keys of the cells.
        species_B: species code of each cell.
        pools: genes by species code, from which replacements are drawn.
        fraction: share of genes chosen; specials never are.
        key: further parts of the key (seed, epoch, view).

    Returns:
        The input tokens (T,), and the chosen positions (K,).
    """
    tokens_T, offsets = sentences
    hash_T = keyed.of_places(keyed.hashed(*key, visits_B), offsets)
    at = np.flatnonzero(keyed.chance(hash_T, _SELECT, fraction) & (tokens_T >= NUM_SPECIALS))
    action, gene = (keyed.uniform(stream, after=hash_T[at]) for stream in (_ACTION, _GENE))
    species_K = np.repeat(np.asarray(species_B), np.diff(offsets))[at]
    replacement = np.empty(len(at), dtype=np.int32)
    for code in np.unique(species_K):
        pool_, mine = pools[int(code)], species_K == code
        replacement[mine] = pool_[(gene[mine] * len(pool_)).astype(np.int64)]
    inputs = tokens_T.copy()
    inputs[at] = np.where(action < 0.8, MASK, np.where(action < 0.9, replacement, tokens_T[at]))
    return inputs, at


def select(sentences: Packed, keep_T: npt.NDArray[np.bool_]) -> Packed:
    """Sentences with only the tokens that are kept; a sentence may become empty."""
    tokens_T, offsets = sentences
    kept = np.concatenate([[0], np.cumsum(keep_T)])
    return tokens_T[keep_T], kept[offsets].astype(np.int64)


def thin(sentences: Packed, visits_B: I64, fraction: float, key: tuple[int, ...]) -> Packed:
    """Keep each gene with probability `fraction`; specials and the first token stay."""
    tokens_T, offsets = sentences
    keep = keyed.chance(keyed.of_places(keyed.hashed(*key, visits_B), offsets), _THIN, fraction)
    keep[offsets[:-1][np.diff(offsets) > 0]] = True
    return select(sentences, keep | ((tokens_T < NUM_SPECIALS) & (tokens_T != MASK)))


def join(parts: list[Packed]) -> Packed:
    """Several packs as one."""
    lengths = np.concatenate([np.diff(offsets) for _, offsets in parts])
    return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


class Translator:
    """Sentences gene by gene into another species, through one-to-one orthologs (spec section 6).

    Args:
        vocabulary: of the corpus.
        orthologs: `species.orthologs`.
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
        """Translations, and which cells have one. Genes without a partner are left out; others stay untranslated."""
        tokens_T, offsets = sentences
        codes, out_T = np.asarray(species_B), np.full(len(tokens_T), -1, dtype=np.int32)
        code_T, draw_B = np.repeat(codes, np.diff(offsets)), keyed.uniform(*key, visits_B, _TARGET)
        draw_T = np.repeat(draw_B, np.diff(offsets))
        for code in np.unique(codes):
            targets = [t for s, t in self.maps if s == code]
            for i, target in enumerate(targets):
                mine = (code_T == code) & (draw_T >= i / len(targets)) & (draw_T < (i + 1) / len(targets))
                out_T[mine] = self.maps[int(code), target][tokens_T[mine]]
        genes = np.concatenate([[0], np.cumsum((out_T >= 0) & (tokens_T >= NUM_SPECIALS))])[offsets]
        found = np.diff(genes) > 0
        keep = (out_T >= 0) | ~np.repeat(found, np.diff(offsets))
        return select((np.where(out_T >= 0, out_T, tokens_T), offsets), keep), found
