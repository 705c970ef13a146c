"""Design of a perturbation: cells, genes and states, as a pure function of corpus and config.

Letters: N perturbed cells, K targets, M genes of a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mixgf.arrays import Float64s, Ints
from mixgf.config.data import SpeciesRow
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Config
from mixgf.corpus.obs_query import equals, select_cells
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.perturbation import controls, operations
from mixgf.perturbation.sampling import match_rows, sample_cells, split_cells

MIN_STATE_CELLS = 20
"""Fewest cells of an unrelated state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One gene, or several that are perturbed together."""

    gene: str
    """Ensembl ids, joined by `+`."""
    symbol: str
    species: str
    tokens: tuple[int, ...]
    coverage: float
    """Share of the perturbed cells of its species whose sentences hold all its genes."""
    null: bool = False
    """Scored only so that others can be compared with it."""
    drawn: bool = False
    """Drawn at random, not chosen by its effect: the other genes are compared with such genes, if there are any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A state: all cells that match an expression."""

    name: str
    """`start`, `goal`, `alternative_0`, ..."""
    expression: str
    cells: Ints


@dataclass(frozen=True, kw_only=True)
class Design:
    """Cells, targets and states of a perturbation."""

    cells_N: Ints
    """Cells that are perturbed, longest sentence first, then by number."""
    states: tuple[State, ...]
    targets: tuple[Target, ...]
    donors: tuple[str, ...]
    donor_of: Ints
    """Donor code of every cell of the corpus."""
    warnings: tuple[str, ...]
    responding: tuple[Target, ...] = ()
    """Genes whose responses to every perturbation are recorded."""
    halves: tuple[State, ...] = ()
    """Halves of the start cells, of which false goals are made (`controls`)."""
    screened_N: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Cells on which a screen chooses genes, ordered as `cells_N`; the reported shifts are of `cells_N`, other cells."""

    @cached_property
    def embedded(self) -> tuple[State, ...]:
        """The states, then the halves: all that is embedded, and towards which shifts are taken."""
        return self.states + self.halves

    def on_screened_cells(self) -> Design:
        """The same design on the cells of the screen."""
        return replace(self, cells_N=self.screened_N) if len(self.screened_N) else self

    @cached_property
    def responding_R(self) -> Ints:
        """Tokens of the responding genes."""
        return np.array([target.tokens[0] for target in self.responding], dtype=np.int64)

    @cached_property
    def goal(self) -> int | None:
        """Index of the goal among the states."""
        return next((i for i, state in enumerate(self.states) if state.name == "goal"), None)

    @cached_property
    def genes_KM(self) -> Ints:
        """Tokens of the targets, padded with `NO_GENE`."""
        width = max(len(target.tokens) for target in self.targets)
        rows = [[*target.tokens, *[operations.NO_GENE] * (width - len(target.tokens))] for target in self.targets]
        return np.array(rows, dtype=np.int64)


def build_design(corpus: Corpus, config: Config) -> Design:
    """Choose cells, states and genes; a pure function of the corpus and the config."""
    settings, obs = config.perturb, corpus.obs()
    warnings: list[str] = []
    if settings.donor in obs.columns:
        codes, names = pd.factorize(obs[settings.donor].astype(str), sort=True)
        donor_of, donors = codes.astype(np.int64), tuple(map(str, names))
    else:
        donor_of, donors = np.zeros(len(obs), dtype=np.int64), ("all",)
        warnings.append(f"no column {settings.donor!r}: all cells count as one donor, and there is no donor-level test")
    wanted = [("start", settings.start), ("goal", settings.goal)]
    others = settings.alternatives or _unrelated(corpus, config, obs)
    wanted += [(f"alternative_{i}", text) for i, text in enumerate(others)]
    states = tuple(
        State(name=name, expression=text, cells=select_cells(obs, text, f"perturb.{name}"))
        for name, text in wanted
        if name == "start" or text.strip()
    )
    start = states[0].cells
    for state in states[1:]:
        shared = len(np.intersect1d(start, state.cells))
        if shared:
            warnings.append(f"{shared} of {len(start)} start cells are in {state.name}, too")
    cells = sample_cells(start, donor_of, settings.max_cells * (2 if settings.screen else 1), config.seed)
    screened = np.empty(0, dtype=np.int64)
    if settings.screen and len(cells) > 1:
        cells, screened = split_cells(cells, donor_of, config.seed)
        warnings.append(
            f"genes were chosen by a screen of {len(screened)} start cells; shifts are of {len(cells)} others"
        )
    cells, screened = (part[np.lexsort((part, -corpus.lengths_N[part].astype(np.int64)))] for part in (cells, screened))
    rows = {row.name: row for row in config.species}
    num_donors = len(np.unique(donor_of[cells]))
    if num_donors < 3 and settings.donor in obs.columns:
        warnings.append(f"the start cells come from {num_donors} donor(s): no donor-level test with fewer than 3")
    return Design(
        cells_N=cells,
        states=states,
        targets=tuple(
            _paired(corpus, settings, cells, _targets(corpus, settings, cells, rows, seed=config.seed), rows)
        ),
        donors=donors,
        donor_of=donor_of,
        warnings=tuple(warnings),
        responding=tuple(_responding_genes(corpus, settings, cells)),
        halves=_halves(start, donor_of, donors, config) if settings.controls and settings.goal.strip() else (),
        screened_N=screened,
    )


def _halves(start: Ints, donor_of: Ints, donors: tuple[str, ...], config: Config) -> tuple[State, ...]:
    """Halves of the start cells as states."""
    named = np.array([d for d, name in enumerate(donors) if name not in config.classify.unlabelled], dtype=np.int64)
    return tuple(
        State(name=f"{controls.FALSE}{i}", expression="half of the start cells", cells=cells)
        for i, cells in enumerate(controls.halves(start, donor_of, named, config.seed))
    )


def _unrelated(corpus: Corpus, config: Config, obs: pd.DataFrame) -> tuple[str, ...]:
    """Expressions of unrelated states: the `perturb.unrelated` most frequent labels that no cell of start or goal has."""
    settings, label = config.perturb, config.classify.label
    if not (settings.unrelated and settings.goal.strip() and label in obs.columns):
        return ()
    asked = np.zeros(len(obs), dtype=bool)
    start = select_cells(obs, settings.start, "perturb.start")
    asked[start], asked[select_cells(obs, settings.goal, "perturb.goal")] = True, True
    value_N = obs[label].astype(str)
    free_N = ~value_N.isin([*value_N[asked].unique(), *config.classify.unlabelled]).to_numpy()
    free_N &= np.isin(corpus.species_N, np.unique(corpus.species_N[start]))
    source_N = obs["source"].astype(str)
    sources = sorted(source_N[start].unique())
    own_N = source_N.isin(sources).to_numpy()
    for chosen_N, where in ((free_N & own_N, f" and source in {sources!r}"), (free_N, "")):
        counts = value_N[chosen_N].value_counts()
        names = sorted(counts.index[counts >= MIN_STATE_CELLS], key=lambda name: (-int(counts[name]), name))
        if len(names) >= 2 or not where:
            break
    kinds = np.unique(corpus.species_N[start])
    if len(np.unique(corpus.species_N[own_N if where else slice(None)])) > len(kinds):
        where += f" and species in {[corpus.species[code] for code in kinds]!r}"
    return tuple(equals(obs, label, name) + where for name in names[: settings.unrelated])


def _responding_genes(corpus: Corpus, settings: Perturb, cells: Ints) -> list[Target]:
    """The `perturb.response` genes in most of the perturbed cells, ordered by token."""
    if not settings.response:
        return []
    counts_V, _ = _occurrences(corpus, cells)
    genes, symbols = _names(corpus, list(corpus.species))
    owner = {token: name for name, token in sorted(genes, reverse=True)}  # a shared token goes by its first species
    there = [token for token in np.flatnonzero(counts_V).tolist() if token in owner]
    best = sorted(sorted(there, key=lambda token: (-int(counts_V[token]), token))[: settings.response])
    return [
        Target(
            gene=genes[owner[token], token],
            symbol=symbols[owner[token], token],
            species=owner[token],
            tokens=(token,),
            coverage=float(counts_V[token]) / len(cells),
        )
        for token in best
    ]


def matching_features(corpus: Corpus, plan: Design) -> Float64s:
    """Features by which genes are matched, (K, 2): mean position in the perturbed cells, and coverage; NaN for sets."""
    counts_V, places_V = _occurrences(corpus, plan.cells_N)
    first_K = plan.genes_KM[:, 0]
    with np.errstate(invalid="ignore"):
        place_K = np.nan_to_num(places_V[first_K] / counts_V[first_K], nan=float(corpus.lengths_N.max(initial=0)))
    coverage_K = np.array([target.coverage for target in plan.targets])
    single_K = np.array([len(target.tokens) == 1 for target in plan.targets])
    return np.where(single_K[:, None], np.stack([place_K, coverage_K], axis=1), np.nan)


def _targets(
    corpus: Corpus, settings: Perturb, cells: Ints, rows: Mapping[str, SpeciesRow], *, seed: int
) -> list[Target]:
    """Targets: the genes of `perturb.genes`, or all genes in at least `perturb.min_coverage` of the cells."""
    species_N = corpus.species_N[cells]
    present = [name for code, name in enumerate(corpus.species) if (species_N == code).any()]
    num = {name: int((species_N == corpus.species.index(name)).sum()) for name in present}
    genes, symbols = _names(corpus, present)
    if settings.genes:
        given = [target for text in settings.genes for target in _named(corpus, text, cells, num, rows)]
        named = list({(target.species, target.tokens): target for target in given}.values())  # each once
        if not settings.num_nulls or settings.screen:  # a screen draws its own later
            return named
        return named + [null for name in present for null in _nulls(corpus, settings, cells, named, name, seed=seed)]
    counts_V, _ = _occurrences(corpus, cells)
    found = []
    for token in np.flatnonzero(counts_V).tolist():
        owners = [name for name in present if (name, token) in genes]
        if not owners:
            continue  # a special token
        coverage = counts_V[token] / sum(num[name] for name in owners)
        if coverage >= settings.min_coverage:
            key = (owners[0], token)
            found.append(
                Target(gene=genes[key], symbol=symbols[key], species=owners[0], tokens=(token,), coverage=coverage)
            )
    if not found:
        msg = (
            f"perturb.min_coverage = {settings.min_coverage}: no gene is in so many of the {len(cells)} cells; lower it"
        )
        raise UserError(msg)
    if settings.max_genes:
        found.sort(key=lambda target: (-target.coverage, target.tokens))
        found = sorted(found[: settings.max_genes], key=lambda target: target.tokens)
    return found


def _paired(
    corpus: Corpus, settings: Perturb, cells: Ints, targets: list[Target], rows: Mapping[str, SpeciesRow]
) -> list[Target]:
    """With `perturb.anchor`: the anchor alone, and together with every target of its species. Else the targets unchanged."""
    if not settings.anchor:
        return targets
    species = sorted({target.species for target in targets})
    found: list[Target] = []
    error: UserError | None = None
    for name in species:
        mine = cells[corpus.species_N[cells] == corpus.species.index(name)]
        try:
            token = corpus.vocabulary.find(settings.anchor, name, rows.get(name))
        except UserError as unknown:
            error = error or unknown
            continue
        holding = np.array([cell for cell in mine.tolist() if token in corpus.tokens([cell])[0]], dtype=np.int64)
        genes, symbols = _names(corpus, [name])
        alone = Target(
            gene=genes[name, token], symbol=symbols[name, token], species=name, tokens=(token,),
            coverage=len(holding) / len(mine),
        )  # fmt: skip
        found.append(alone)
        counts_V, _ = _occurrences(corpus, holding)
        for target in targets:
            if target.species != name or token in target.tokens:
                continue
            single = len(target.tokens) == 1  # the usual case: counted for all targets at once
            both = int(counts_V[target.tokens[0]]) if single else _holding(corpus, holding, target.tokens)
            coverage = both / len(mine)
            if settings.genes or coverage >= settings.min_coverage:
                pair = Target(
                    gene=f"{alone.gene}+{target.gene}", symbol=f"{alone.symbol}+{target.symbol}", species=name,
                    tokens=(token, *target.tokens), coverage=coverage, null=target.null, drawn=target.drawn,
                )  # fmt: skip
                found.append(pair)
    if not found:
        msg = f"perturb.anchor: {error}"
        raise UserError(msg)
    return found


def _names(corpus: Corpus, species: list[str]) -> tuple[dict[tuple[str, int], str], dict[tuple[str, int], str]]:
    """Ensembl id and symbol by (species, token)."""
    table = corpus.vocabulary.table
    rows = zip(*(table[c].to_pylist() for c in ("species", "token", "gene", "symbol")), strict=True)
    kept = [row for row in rows if row[0] in species]
    return {(s, t): g for s, t, g, _ in kept}, {(s, t): symbol or g for s, t, g, symbol in kept}


def _named(
    corpus: Corpus, text: str, cells: Ints, num: dict[str, int], rows: Mapping[str, SpeciesRow]
) -> Iterator[Target]:
    """Targets of one entry of perturb.genes, one for each species of the cells that has all its genes."""
    parts = [part.strip() for part in text.split("+")]
    first_error: UserError | None = None
    found = False
    for species in num:
        try:
            tokens = tuple(corpus.vocabulary.find(part, species, rows.get(species)) for part in parts)
        except UserError as error:
            first_error = first_error or error
            continue
        if len(set(tokens)) < len(tokens):
            msg = f"perturb.genes: {text!r} names a gene twice; name each gene once"
            raise UserError(msg)
        found = True
        genes, symbols = _names(corpus, [species])
        mine = cells[corpus.species_N[cells] == corpus.species.index(species)]
        held = sum(_holding(corpus, block, tokens) for block in np.array_split(mine, max(1, len(mine) // 1024)))
        yield Target(
            gene="+".join(genes[species, token] for token in tokens),
            symbol="+".join(symbols[species, token] for token in tokens),
            species=species,
            tokens=tokens,
            coverage=held / len(mine),
        )
    if not found:
        msg = f"perturb.genes: {first_error}"
        raise UserError(msg)


def _nulls(
    corpus: Corpus, settings: Perturb, cells: Ints, named: list[Target], species: str, *, seed: int
) -> list[Target]:
    """Comparison genes of one species, like its named genes in rank and coverage; their number is its share of the named."""
    mine = cells[corpus.species_N[cells] == corpus.species.index(species)]
    counts_V, ranks_V = _occurrences(corpus, mine)
    tokens_G = corpus.vocabulary.species_tokens(species).astype(np.int64)
    with np.errstate(invalid="ignore"):
        rank_G = (ranks_V / counts_V)[tokens_G]
    features_GF = np.stack([np.nan_to_num(rank_G, nan=float(len(counts_V))), counts_V[tokens_G]], axis=1)
    own = [target for target in named if target.species == species]
    wanted = np.flatnonzero(np.isin(tokens_G, [token for target in own for token in target.tokens])).tolist()
    num = round(settings.num_nulls * len(own) / len(named))
    genes, symbols = _names(corpus, [species])
    return [
        Target(
            gene=genes[species, token],
            symbol=symbols[species, token],
            species=species,
            tokens=(token,),
            coverage=float(counts_V[token]) / len(mine),
            null=True,
            drawn=True,
        )
        for token in tokens_G[match_rows(features_GF, wanted, num, seed)].tolist()
    ]


def _occurrences(corpus: Corpus, cells: Ints) -> tuple[Ints, Float64s]:
    """By token: number of cells whose sentences hold it, and sum of its positions there."""
    size = corpus.vocabulary.size
    counts_V, places_V = np.zeros(size, dtype=np.int64), np.zeros(size)
    for part in np.array_split(cells, max(1, len(cells) // 1024)):
        ids_T, offsets_B1 = corpus.tokens(part)
        place_T = np.arange(len(ids_T)) - np.repeat(offsets_B1[:-1], np.diff(offsets_B1))
        counts_V += np.bincount(ids_T, minlength=size)
        places_V += np.bincount(ids_T, weights=place_T, minlength=size)
    return counts_V, places_V


def _holding(corpus: Corpus, cells: Ints, tokens: tuple[int, ...]) -> int:
    ids_T, offsets_B1 = corpus.tokens(cells)
    hits = np.concatenate([[0], np.cumsum(np.isin(ids_T, tokens))])
    return int((np.diff(hits[offsets_B1]) == len(tokens)).sum())


def targets_by_species(plan: Design, corpus: Corpus) -> NDArray[np.bool_]:
    """Mask (K, species): whether the species has all genes of the target (several do where orthologs share tokens)."""
    columns = [set(corpus.vocabulary.species_tokens(name).tolist()) for name in corpus.species]
    return np.array([[set(target.tokens) <= tokens for tokens in columns] for target in plan.targets])
