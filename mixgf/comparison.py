"""Tables of `mixgf compare`: transfer between species and what fails in it, corresponding types in each space, matched shifts.

Transfer and spaces are read from a classification of the same cells (`mixgf.evaluation`, `mixgf.integration`), never worked out
again. An encoder of another vocabulary has a corpus and a classification of its own, a `World`; tables hold all worlds, and
an encoder's name says which is which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest

from mixgf import artifacts, baselines, contenders, integration, matching, parts, selection, storage
from mixgf.baselines import BASELINES
from mixgf.config import Config, Inputs, UserError, split_named, to_dict
from mixgf.dataset import Corpus
from mixgf.matching import Shift
from mixgf.parts import Places
from mixgf.splits import UNKNOWN, Labelled, keyed_order, names_of

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
Names = npt.NDArray[np.str_]
Bools = npt.NDArray[np.bool_]

RANKS = "ranks"
"""The space of within-cell rank scores of one-to-one orthologs."""
MIN_STRATUM = 3
"""Fewest cells of either condition of a stratum that takes part in a shift."""
MIN_DETECTED = 0.01
"""Genes in a smaller share of a shift's cells do not count in spaces of genes."""
HALF = "half"
FAILED = 0.5
"""Recall below which a type is said to fail."""
FEW = 20
"""Training cells below which a type's failure is put down to their number."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Encoders on one corpus."""

    name: str
    """Of its first encoder; empty = the run's own corpus and checkpoint."""
    config: Config
    """Of its classification; `inputs` names the corpus and the checkpoint."""
    classification: str
    """URI."""
    places: Places
    """Of the parts that this comparison makes of it."""

    @property
    def encoders(self) -> list[str]:
        """Names by which `contenders.load` knows them."""
        return contenders.of_encoders(self.config.classify.models, contenders.HEADS)

    @property
    def trained(self) -> dict[str, Places]:
        """Trained encoders by their names in the tables."""
        others = contenders.named(self.config.classify)
        uris = {contenders.CHECKPOINT: self.places.checkpoint} | others
        return {self.called(name): replace(self.places, checkpoint=uri) for name, uri in uris.items()}

    @cached_property
    def shifts(self) -> list[Shift]:
        """`chosen` among its cells."""
        return chosen(self.config, Corpus(self.places.corpus).obs())

    def called(self, encoder: str) -> str:
        """An encoder's name in the tables."""
        if not self.name or encoder in (self.name, parts.EXPRESSION):
            return contenders.called(encoder)
        return f"{self.name}_{encoder}" if encoder and encoder != contenders.called("") else self.name

    def model(self, name: str) -> str:
        """A model's name in the tables."""
        head, encoder = contenders.parse(name)
        if name in BASELINES or not self.name:
            return name
        return f"{head}@{self.called(encoder)}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the parts of a comparison work on."""

    config: Config
    uri: str
    """The artifact's folder."""
    worlds: tuple[World, ...]
    """The run's own first."""


def worlds(config: Config, uri: str) -> tuple[World, ...]:
    """The run's corpus with every encoder of its vocabulary, then one world for each encoder with a corpus of its own.

    Raises:
        UserError: An entry of `compare.encoders` is not NAME=CHECKPOINT or NAME=CHECKPOINT@CORPUS.
    """
    given, settings = config.inputs, config.compare
    own = Inputs(
        corpus=given.corpus or storage.join(config.output, "corpus"), embeddings=given.embeddings,
        checkpoint=given.checkpoint or storage.join(config.output, "pretrain"),
    )  # fmt: skip
    same, others = list[str](), dict[str, Inputs]()
    for entry in settings.encoders:
        name, where = split_named(entry)
        weights, at, corpus = where.partition("@")
        if not at:
            same.append(f"{name}={weights}")
            continue
        contenders.named(replace(config.classify, encoders=(f"{name}={weights}",)))  # the same rules for names
        if not corpus or name in others:
            msg = f"compare.encoders: {entry!r} must be NAME=CHECKPOINT or NAME=CHECKPOINT@CORPUS, each name once"
            raise UserError(msg)
        others[name] = Inputs(corpus=corpus, checkpoint=weights)
    found = [_world(config, uri, "", own, tuple(same))]
    if config.inputs.classification:
        found = [replace(found[0], classification=config.inputs.classification)]
    elif _has(there := storage.join(config.output, "classify"), found[0]):
        found = [replace(found[0], classification=there)]
    return (
        *found,
        *(_world(config, storage.join(uri, "encoders", name), name, inputs, ()) for name, inputs in others.items()),
    )


def _world(config: Config, folder: str, name: str, inputs: Inputs, encoders: tuple[str, ...]) -> World:
    names = contenders.named(replace(config.classify, encoders=encoders))
    heads = [
        f"{head}@{encoder}".rstrip("@")
        for encoder in ("", contenders.UNTRAINED, *names)
        for head in config.compare.models
    ]
    controls = () if name else config.compare.controls
    asked = replace(
        config.classify, splits=("species",), models=(*heads, *controls), encoders=encoders, label_shares=(), unseen_types=0,
        curve_models=(), integration_cells=config.compare.cells, keep=False,
    )  # fmt: skip
    places = Places(corpus=inputs.corpus, checkpoint=inputs.checkpoint, output=folder, embeddings="")
    run = replace(config, output=folder, inputs=inputs, classify=asked)
    return World(name=name, config=run, classification=storage.join(folder, "classify"), places=places)


def _has(uri: str, world: World) -> bool:
    """Whether a finished classification there has everything that a world's would, of the same cells."""
    there, run = artifacts.find(uri), world.config
    if there is None or "species" not in there.config["asked"]["splits"]:
        return False
    asked = to_dict(run.classify)
    if any(asked[name] != value for name, value in ({"merge": []} | there.config["cells"]).items()):
        return False
    encoders = contenders.records(run.inputs.checkpoint, run, Corpus(run.inputs.corpus))
    mine = {f"encoder {name}" if name else "checkpoint": one.fingerprint for name, one in encoders.items()}
    return {*run.classify.models, "integration"} <= set(
        there.config["models"]
    ) and mine.items() <= there.parents.items()


# Transfer, and what fails in it


def transfer(setting: Setting) -> dict[str, pd.DataFrame]:
    """`transfer`: scores of every model by task and direction; `failures`: every type of every direction, and into what it goes."""
    found: dict[str, list[pd.DataFrame]] = {"scores": [], "per_class": [], "confusion": []}
    for world in setting.worlds:
        for name, several in found.items():
            frame = _read(world, name)
            frame = frame[frame["split"] == "species"]
            several.append(frame.assign(model=[world.model(m) for m in frame["model"]]))
    scores, per_class, confusion = (pd.concat(several, ignore_index=True) for several in found.values())
    keys = ["group", "direction", "model", "metric"]
    means = scores.groupby(keys, sort=False)[["value", "low", "high"]].mean()
    sizes = scores.groupby(keys, sort=False)[["num_train", "num_test", "num_classes", "seed"]].agg(
        {"num_train": "first", "num_test": "first", "num_classes": "first", "seed": "nunique"}
    )
    table = means.join(sizes.rename(columns={"seed": "seeds"})).reset_index()
    return {"transfer": table, "failures": failures(per_class, confusion)}


def failures(per_class: pd.DataFrame, confusion: pd.DataFrame) -> pd.DataFrame:
    """Each type that is carried over: its recall, the type that most of the missed cells are called, and a first reason.

    Args:
        per_class: `results.tables`' one, of splits between species.
        confusion: The same.

    Returns:
        group, direction, model, type, num_train, num_test, recall over all seeds with Wilson's 95 % interval (cells count as
        independent, and once however many seeds test them), `into`
        and `into_share` (of all cells of the type; empty and 0 where none is missed), `best_control` and
        `control_f1` (the baseline with the highest F1 of this type; one that calls every cell so tells nothing), and `why`: in words,
        empty unless it fails.
    """
    keys = ["group", "direction", "model"]
    right = confusion["true"] == confusion["predicted"]
    count = confusion.groupby([*keys, "true"])["count"].sum().rename("cells")
    hit = confusion[right].groupby([*keys, "true"])["count"].sum().rename("right")
    wrong = confusion[~right].groupby([*keys, "true", "predicted"])["count"].sum().reset_index()
    first = wrong.sort_values(["count", "predicted"], ascending=[False, True]).drop_duplicates([*keys, "true"])
    into = first.set_index([*keys, "true"])[["predicted", "count"]]
    seeds = confusion.groupby(keys)["seed"].nunique()
    sizes = per_class.groupby([*keys, "class"])[["num_train", "num_test"]].max()
    called = confusion.groupby([*keys, "predicted"])["count"].sum()
    f1 = {key: 2 * float(hit.get(key, 0)) / (float(cells) + float(called.get(key, 0))) for key, cells in count.items()}
    control = {
        (group, direction, kind): max(
            ((f1[group, direction, m, kind], m) for m in BASELINES if (group, direction, m, kind) in f1), default=(float("nan"), "")
        )
        for group, direction, _, kind in count.index
    }  # fmt: skip
    rows = []
    for key, cells in count.items():
        group, direction, model, kind = key
        num = int(hit.get(key, 0))
        once = max(1, round(int(cells) / seeds[group, direction, model]))
        range_ = binomtest(round(num / int(cells) * once), once).proportion_ci(method="wilson")
        recall, best = num / int(cells), control[group, direction, kind]
        other, missed = (str(into.loc[key, "predicted"]), int(into.loc[key, "count"])) if key in into.index else ("", 0)
        size = sizes.loc[key]
        rows.append({
            "group": group, "direction": direction, "model": model, "type": kind, "num_train": int(size["num_train"]),
            "num_test": int(size["num_test"]), "recall": recall, "low": range_.low, "high": range_.high, "into": other,
            "into_share": missed / int(cells), "best_control": best[1], "control_f1": best[0],
            "why": _why(model, recall, best, int(size["num_train"])),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _why(model: str, recall: float, best: tuple[float, str], num_train: int) -> str:
    """What the other models and the number of cells say about a type that fails."""
    if recall >= FAILED:
        return ""
    if num_train < FEW:
        return f"only {num_train} training cells"
    if model in BASELINES or not best[1]:
        return "not said: a control itself" if model in BASELINES else "not said: no control was scored"
    if best[0] >= FAILED:
        return f"the genes tell it ({best[1]}: F1 {best[0]:.2f}), this model does not"
    return f"every control fails too (best {best[1]}: F1 {best[0]:.2f}): labels, markers or states differ between the data sets"


def _read(world: World, name: str) -> pd.DataFrame:
    return storage.read_table(storage.join(world.classification, f"{name}.parquet")).to_pandas()


# Spaces


def spaces(setting: Setting) -> dict[str, pd.DataFrame]:
    """`integration`: measures of every space; `maps`: two coordinates of every cell with its donor; `corresponding`: types of both species."""
    measures, maps, types = [], [], []
    for world in setting.worlds:
        table = _read(world, "integration")
        if world.name:
            table = table[table["space"] != parts.EXPRESSION]
        measures.append(table.assign(space=[world.called(s) for s in table["space"]]))
        obs = Corpus(world.places.corpus).obs()
        of_cell = dict(zip(obs["cell"], _donors(world, obs), strict=True))
        found = _read(world, "maps")
        for space, frame in found.groupby("space", sort=False):
            called = world.called(str(space))
            if world.name and space == parts.EXPRESSION:
                continue
            maps.append(frame.assign(space=called, donor=[of_cell[c] for c in frame["cell"]]))
            vectors_ND, xy_N2 = _drawn(world, str(space))
            kinds, species = frame["type"].to_numpy(str), frame["species"].to_numpy(str)
            types.append(integration.corresponding(vectors_ND, xy_N2, kinds, species).assign(space=called))
    return {"integration": pd.concat(measures, ignore_index=True), "maps": pd.concat(maps, ignore_index=True),
            "corresponding": pd.concat(types, ignore_index=True)}  # fmt: skip


def _donors(world: World, obs: pd.DataFrame) -> Names:
    """The donor of every row of `obs`."""
    settings = world.config.classify
    if settings.donor not in obs:
        return np.full(len(obs), UNKNOWN)
    return names_of(obs[settings.donor].tolist(), unknown=settings.unlabelled)


def _drawn(world: World, space: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and map coordinates of a classification's sample in one space, in the order of its `maps`."""
    folder = storage.join(world.classification, "parts", "integration")
    names = [n for n in storage.list_dir(folder) if n.rpartition("-")[0] == space]
    sizes = [int(n.rpartition("-")[2].removesuffix(".parquet")) for n in names]
    part = storage.read_table(storage.join(folder, names[int(np.argmax(sizes))]))
    return parts.vector_column(part), part.select(["x", "y"]).to_pandas().to_numpy()


# Model matching


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An entry of `compare.shifts`."""

    name: str
    tag: str
    before: str
    after: str
    whole: bool = False
    """Compared as they are, not within strata."""


def wanted(entries: Sequence[str]) -> list[Wanted]:
    """`compare.shifts`, read.

    Raises:
        UserError: An entry is not NAME=BEFORE -> AFTER, or a name is there twice.
    """
    found: dict[str, Wanted] = {}
    for entry in entries:
        head, eq, rest = entry.partition("=")
        whole = "=>" in rest
        before, arrow, after = rest.partition("=>" if whole else "->")
        name, _, tag = (part.strip() for part in head.partition("#"))
        if not (eq and arrow and name and before.strip() and after.strip()) or name in found:
            msg = f"compare.shifts: {entry!r} must be NAME=BEFORE -> AFTER, NAME#TAG=BEFORE -> AFTER or one of these with =>, each name once; give several as a JSON list"
            raise UserError(msg)
        found[name] = Wanted(name=name, tag=tag, before=before.strip(), after=after.strip(), whole=whole)
    return list(found.values())


def chosen(config: Config, obs: pd.DataFrame) -> list[Shift]:
    """The shifts that are asked for, as rows of `obs` (all cells of a corpus).

    Raises:
        UserError: An expression chooses nothing, cells of two species, or cells of both conditions; a condition is too small; or all
            shifts are of one species.
    """
    settings, label, found = config.compare, config.classify.label, list[Shift]()
    missing = [c for c in settings.within if c not in obs.columns]
    if missing:
        msg = f"compare.within: the corpus has no column {missing[0]!r}; it has {', '.join(map(str, obs.columns))}"
        raise UserError(msg)
    names = obs["cell"].to_numpy().astype(np.str_)
    for one in wanted(settings.shifts):
        species, both, after_N = _conditions(config, one, obs, names)
        strata = _text(config, obs, both, () if one.whole else settings.within)
        made = _shift(config, one, species, names[both], after_N, strata)
        if made is None:
            sizes = f"{int((~after_N).sum())} cells before and {int(after_N.sum())} after"
            msg = (f"compare.shifts: {one.name}: of {sizes} fewer than compare.min_cells = {settings.min_cells} of either side are of strata that "
                   f"both have (compare.within = {','.join(settings.within)}); lower it, or --set compare.within=[]")  # fmt: skip
            raise UserError(msg)
        found.append(replace(made, rows_N=both[made.rows_N]))
        types = (
            _text(config, obs, both, (label,))
            if settings.by_type and not one.whole and label in obs.columns
            else strata[:0]
        )
        for kind in np.unique(types[types != UNKNOWN]).tolist() if len(np.unique(types)) > 1 else ():
            mine = np.flatnonzero(types == kind)
            part = replace(one, name=f"{one.name}: {kind}")
            made = _shift(config, part, species, names[both[mine]], after_N[mine], strata[mine])
            if made is not None:
                found.append(replace(made, rows_N=both[mine][made.rows_N]))
    if found and len({s.species for s in found}) < 2:
        msg = f"compare.shifts: all are of {found[0].species}; matching needs shifts of two species"
        raise UserError(msg)
    return found


def _conditions(config: Config, one: Wanted, obs: pd.DataFrame, names: Names) -> tuple[str, Ints, Bools]:
    """Species of a shift, rows of both conditions, and which of them are of the second."""
    field = f"compare.shifts: {one.name}"
    before = selection.select(obs, one.before, field)
    if one.after == HALF:
        order = before[keyed_order(names[before], "half", config.seed, one.name)]
        before, after = np.sort(order[::2]), np.sort(order[1::2])
    else:
        after = selection.select(obs, one.after, field)
    both = np.concatenate([before, after])
    kinds = sorted(set(obs["species"].iloc[both].astype(str)))
    if len(kinds) > 1 or len(np.intersect1d(before, after)):
        why = f"cells of {' and '.join(kinds)}" if len(kinds) > 1 else "cells that are in both conditions"
        msg = f"{field}: must choose two different sets of cells of one species, not {why}"
        raise UserError(msg)
    return kinds[0], both, np.arange(len(both)) >= len(before)


def _text(config: Config, obs: pd.DataFrame, rows: Ints, columns: Sequence[str]) -> Names:
    """Values of some columns as one text a row."""
    texts = [names_of(obs[c].iloc[rows].tolist(), unknown=config.classify.unlabelled) for c in columns]
    return np.array([" / ".join(row) for row in zip(*texts, strict=True)] or [""] * len(rows), dtype=np.str_)


def _shift(config: Config, one: Wanted, species: str, names: Names, after_N: Bools, strata: Names) -> Shift | None:  # noqa: PLR0917 (columns)
    """At most `shift_cells` cells of either condition, in strata that have both; None where too few are left."""
    settings = config.compare
    kinds, stratum_N = np.unique(strata, return_inverse=True)
    sizes = np.stack([np.bincount(stratum_N[after_N == side], minlength=len(kinds)) for side in (False, True)])
    enough = np.flatnonzero((sizes >= MIN_STRATUM).all(0))
    rows = []
    for side in (False, True):
        mine = np.flatnonzero((after_N == side) & np.isin(stratum_N, enough))
        order = mine[keyed_order(names[mine], "shift", config.seed)]
        rows.append(order[: settings.shift_cells or len(order)])
    kept = np.sort(np.concatenate(rows))
    both = [k for k in enough if len(np.unique(after_N[kept[stratum_N[kept] == k]])) == 2]
    kept = kept[np.isin(stratum_N[kept], both)]
    if min(int((after_N[kept] == side).sum()) for side in (False, True)) < settings.min_cells:
        return None
    return Shift(name=one.name, tag=one.tag, species=species, rows_N=kept, after_N=after_N[kept],
                 strata_N=stratum_N[kept].astype(np.int64))  # fmt: skip


def cells_of(shifts: Sequence[Shift]) -> Ints:
    """All cells of some shifts, ascending."""
    return np.unique(np.concatenate([s.rows_N for s in shifts])) if shifts else np.empty(0, dtype=np.int64)


def table_of(world: World, obs: pd.DataFrame, cells: Ints) -> Labelled:
    """Cells as `parts.counts_of` wants them."""
    few = obs.iloc[cells]
    none = np.full(len(few), UNKNOWN)
    return Labelled(
        cells=cells, names=few["cell"].to_numpy().astype(np.str_), labels=none, species=few["species"].to_numpy().astype(np.str_),
        groups=none, donors=none, datasets=none, transfer=none, sources=few["source"].to_numpy().astype(np.str_),
    )  # fmt: skip


def matched(setting: Setting) -> dict[str, pd.DataFrame]:
    """`pairs`, `shifts` and `together` (`mixgf.matching`) in every space: each encoder, expression and ranks of one-to-one orthologs."""
    found: dict[str, list[pd.DataFrame]] = {"pairs": [], "shifts": [], "together": []}
    if not setting.config.compare.shifts:
        return {}
    settings, seed = setting.config.compare, setting.config.seed
    for world in setting.worlds:
        corpus = Corpus(world.places.corpus)
        obs, shifts = corpus.obs(), world.shifts
        cells = cells_of(shifts)
        placed = [replace(s, rows_N=np.searchsorted(cells, s.rows_N)) for s in shifts]
        about = pd.DataFrame([_about(world, obs, corpus.lengths_N, s) for s in shifts])
        for space, vectors_ND, seen_KD in _spaces(setting, world, obs, cells, placed):
            pairs, table = matching.match(
                placed, vectors_ND, num_permutations=settings.num_permutations, seed=seed, seen_KD=seen_KD
            )
            table = table.merge(about, on="shift")
            tags = matching.together(pairs, num_permutations=settings.num_permutations, seed=seed)
            for name, frame in (("pairs", pairs), ("shifts", table), ("together", tags)):
                found[name].append(frame.assign(space=space))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items()}


def _spaces(
    setting: Setting, world: World, obs: pd.DataFrame, cells: Ints, shifts: Sequence[Shift]
) -> Iterator[tuple[str, Floats, Bools | None]]:
    """Name, vectors (N, D) and columns that count for each shift, space by space."""
    for encoder in world.encoders:
        yield world.called(encoder), parts.vectors(world.places, encoder, cells), None
    if world.name or not setting.config.compare.controls:
        return
    counts = parts.counts_of(world.config, world.places, table_of(world, obs, cells), np.arange(len(cells)))
    detected = [np.asarray((counts[s.rows_N] > 0).mean(0)).ravel() >= MIN_DETECTED for s in shifts]
    genes = np.flatnonzero(np.any(detected, axis=0))
    seen_KD = np.stack(detected)[:, genes]
    yield parts.EXPRESSION, baselines.log_normalise(counts)[:, genes].toarray(), seen_KD
    yield RANKS, baselines.rank_scores(counts, genes), seen_KD


def _about(world: World, obs: pd.DataFrame, lengths_N: npt.NDArray[np.int32], shift: Shift) -> dict[str, object]:
    """What may explain a shift beside its name: donors of either side, and how much longer sentences get."""
    known = _donors(world, obs.iloc[shift.rows_N])
    before, after = (set(known[shift.after_N == side].tolist()) - {UNKNOWN} for side in (False, True))
    weights_N = matching.contrast(shift.after_N, shift.strata_N)
    return {
        "shift": shift.name, "donors_before": len(before), "donors_after": len(after), "donors_shared": len(before & after),
        "log2_length": float(weights_N @ np.log2(lengths_N[shift.rows_N])),
    }  # fmt: skip
