"""Where a pretrained encoder could win: vectors of cells beside the fair best without an encoder, in five regimes.

    python jobs/ladder.py OUTPUT --data FOLDER              # prepare, pretrain, score, and print the tables
    python jobs/ladder.py OUTPUT --data FOLDER --seeds 1 --steps 200 --only "5 % labels"

FOLDER has the .h5ad files of `SELECT` and `CONFIRM`, which were fixed before any result. Encoders of one half are trained on the
cells of the other half alone, so no scored study was part of a training ("unseen"); beside them stand encoders that were trained on
all cells, without labels ("seen"). The rungs: `random` (random token vectors), `start` (`model.start=svd`, no training), `N`
(`objective.view=neighbour` from that start). `+PCA` is a vector beside the study's own principal components.

| regime | labelled cells | what is known |
|---|---|---|
| 1, 5, 10 % labels | that share of a study, and one of each type at least | its test cells, without labels |
| 50, 100, 200 cells | half of them | nothing else of the study |
| panel of 300, 1,000 genes | 5 % | its most variable genes |
| other study, other species | cells of the other one, 1,000 at most | its test cells, without labels |

Scores are macro F1. Components and centres are fitted to the training and test cells of a task, without labels. "PCA of the study" has those
of all its cells: it stands beside the encoders that were trained on them. Each vector, and the principal components, have three
heads: 5-NN and centroid by cosine, balanced logistic regression. The best head and rung are chosen on `SELECT` and confirmed on
`CONFIRM`, beside the best baseline of `CONFIRM` itself. Intervals are 95 % of Student's t over data sets.

Inputs: the files. Outputs: runs and rows.jsonl in OUTPUT, which are not made again; tables on standard output. Resources: one core
for about an hour.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats
from sklearn.metrics import f1_score

from mixgf.classification import linear_start
from mixgf.classification.features import log_normalise, principal_components, variable_genes
from mixgf.classification.simple_classifiers import (
    STRENGTH,
    logistic_regression,
    nearest_centroid,
    nearest_neighbours,
    unit,
)
from mixgf.config import recipes
from mixgf.config.data import QC, Source, Vocab
from mixgf.config.run import Compute, Config, Tracking
from mixgf.corpus import raw_counts
from mixgf.corpus.packed import Packed, keep_tokens
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import Encoder
from mixgf.encoder.embed import embed_cells
from mixgf.execution import LocalExecutor
from mixgf.genes import species
from mixgf.stages import prepare, pretrain

SELECT = (
    "brain_mouse_marques", "cellline_human_hashing", "gut_mouse_mca", "pancreas_human_baron", "pancreas_mouse_baron",
    "pbmc_human_pbmc3k",
)  # fmt: skip
CONFIRM = (
    "cellline_human_scmixology", "immune_mouse_tabulamuris", "kidney_mouse_tabulamuris", "lung_mouse_zilionis",
    "pbmc_human_kang_ifnb", "spleen_mouse_jaitin",
)  # fmt: skip
UNLABELLED = {
    "select": ("pbmc_human_eccite_hto",), "confirm": ("pbmc_human_10xv3_unlabelled", "immune_human_celltypist_demo"),
}  # fmt: skip
STUDIES = (("spleen_mouse_jaitin", "immune_mouse_tabulamuris"), ("pbmc_human_pbmc3k", "pbmc_human_kang_ifnb"))
SPECIES = (
    (("pancreas_human_baron",), ("pancreas_mouse_baron",)),
    (("pbmc_human_pbmc3k", "pbmc_human_kang_ifnb"), ("spleen_mouse_jaitin", "immune_mouse_tabulamuris")),
)
MOST_CELLS = 2000
SPLITS = 3
UNKNOWN = ("", "unknown", "nan", "None")
BASELINES = "baselines"
"""Name of the methods that read no encoder, and of cells only those of the task."""
STUDY = "study"
"""Name of the methods that read no encoder, and all cells of the study, as encoders have that were trained on them."""


def species_of(name: str) -> str:
    """Species in the name of a file."""
    return name.split("_")[1]


def base_config(folder: Path, names: tuple[str, ...], data: str, *, reuse: str = "") -> Config:
    """The config of a run on some files."""
    sources = tuple(Source(uri=str(Path(data) / f"{n}.h5ad"), species=species_of(n), name=n) for n in names)
    return replace(
        recipes.neighbours(), output=str(folder), sources=sources, qc=QC(doublets="off"),
        vocab=Vocab(sharing="ortholog", reuse=reuse), tracking=Tracking(uri="off"), compute=Compute(num_workers=1),
    )  # fmt: skip


def prepared(output: Path, data: str) -> dict[str, str]:
    """URIs of the corpora of all files and of each half, which share one vocabulary."""
    halves = {"select": SELECT + UNLABELLED["select"], "confirm": CONFIRM + UNLABELLED["confirm"]}
    whole = base_config(output / "all", tuple(sorted(halves["select"] + halves["confirm"])), data)
    found = {"all": prepare.run(whole, executor=LocalExecutor())}
    for half, names in halves.items():
        config = base_config(output / half, names, data, reuse=str(output / "all" / "vocabulary"))
        found[half] = prepare.run(config, executor=LocalExecutor())
    return found


def neighbour_config(corpus: str, output: Path, *, steps: int, seed: int) -> Config:
    """Recipe N: the recipe `neighbours`."""
    base = recipes.neighbours()
    return replace(
        base, output=str(output), seed=seed, inputs=replace(base.inputs, corpus=corpus),
        train=replace(base.train, epochs=1000, max_steps=steps), tracking=Tracking(uri="off"), compute=Compute(num_workers=1),
    )  # fmt: skip


def checkpoints(output: Path, corpora: Mapping[str, str], *, steps: int, seeds: int) -> dict[str, dict[str, str]]:
    """Checkpoint of each rung and seed, by the part of the data it was trained on."""
    found: dict[str, dict[str, str]] = {}
    for seed in range(seeds):
        for part, corpus in corpora.items():
            config = neighbour_config(corpus, output / "models" / f"{part}-{steps}-{seed}", steps=steps, seed=seed)
            found.setdefault(f"N/{seed}", {})[part] = pretrain.run(config, executor=LocalExecutor())
    return found


class Panel:
    """Sentences of a corpus with some genes only (a `SentenceSource`); a cell without any keeps its first token."""

    def __init__(self, corpus: Corpus, genes: np.ndarray) -> None:
        self.corpus, self.cls = corpus, corpus.cls
        self._keep_V = np.zeros(corpus.vocabulary.size, dtype=bool)
        self._keep_V[genes] = True

    @cached_property
    def lengths_N(self) -> np.ndarray:
        """Upper bounds of the lengths, by which cells are ordered."""
        return self.corpus.lengths_N

    def tokens(self, cells: object) -> Packed:
        """Packed sentences."""
        tokens_T, offsets = self.corpus.tokens(np.asarray(cells))
        keep_T = self._keep_V[tokens_T]
        kept = np.concatenate([[0], np.cumsum(keep_T)])
        keep_T[offsets[:-1][np.diff(kept[offsets]) == 0]] = True
        return keep_tokens((tokens_T, offsets), keep_T)


class World:
    """Labelled cells, their counts, and encoders."""

    def __init__(self, corpora: Mapping[str, str], models: dict[str, dict[str, str]]) -> None:
        self.corpus = Corpus(corpora["all"], max_len=2048)
        obs = self.corpus.obs(["source", "cell_type"])
        self.sources = obs["source"].to_numpy().astype(str)
        self.labels = obs["cell_type"].to_numpy().astype(str)
        self.models = models
        self.orthologs = species.orthologs(("resource:orthologs.parquet",))
        self._encoders: dict[str, Encoder] = {}

    def cells(self, name: str) -> np.ndarray:
        """Labelled cells of a study, of types with five cells or more."""
        mine = np.flatnonzero((self.sources == name) & ~np.isin(self.labels, UNKNOWN))
        types, counts = np.unique(self.labels[mine], return_counts=True)
        return mine[np.isin(self.labels[mine], types[counts >= 5])]

    @cache  # noqa: B019 (one world per process)
    def counts(self, name: str) -> tuple[np.ndarray, raw_counts.Counts]:
        """All cells of a study, and their counts over the vocabulary's genes of the species."""
        mine, found = raw_counts.read_cells(self.corpus, np.flatnonzero(self.sources == name), block_cells=128)
        genes = self.corpus.vocabulary.species_genes(species_of(name)).genes
        return mine, raw_counts.Counts(matrix=found, genes=genes.astype(np.str_), species=species_of(name))

    def expression(self, names: tuple[str, ...], cells: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Log-normalised counts of cells of some studies over genes that all of them detect, and the genes' token ids."""
        blocks, numbers = [], []
        for name in names:
            have, block = self.counts(name)
            keep = np.isin(have, cells)
            numbers.append(have[keep])
            blocks.append(replace(block, matrix=block.matrix[keep]))
        matrices, genes = raw_counts.shared_gene_space(blocks, self.orthologs)
        there = np.all([np.asarray(m.sum(0)).ravel() > 0 for m in matrices], axis=0)
        have, whole = np.concatenate(numbers), sparse.csr_matrix(sparse.vstack(matrices, format="csr")[:, there])
        order = np.argsort(have)
        chosen = order[np.searchsorted(have[order], cells)]
        first = self.corpus.vocabulary.species_genes(sorted({b.species for b in blocks})[0])
        token = dict(zip(first.genes.astype(str).tolist(), first.tokens.tolist(), strict=True))
        return log_normalise(sparse.csr_matrix(whole[chosen])), np.array([token[g] for g in genes[there].tolist()])

    def encoder(self, rung: str, part: str) -> Encoder:
        """An encoder: `random`, `start`, or a trained one."""
        key = f"{rung} {part}"
        if key not in self._encoders:
            uri = self.models.get(rung, next(iter(self.models.values())))[part]
            if rung == "random":
                made = checkpoint.load_encoder(uri)[0]
                self._encoders[key] = Encoder(replace(made.sizes, start="random"), made.vocab_size, seed=1_000_003)
            else:
                self._encoders[key] = (
                    checkpoint.load_start(uri, seed=0) if rung == "start" else checkpoint.load_encoder(uri)
                )[0]
        return self._encoders[key]

    @cache  # noqa: B019
    def vectors(self, rung: str, part: str) -> np.ndarray:
        """Vectors of all cells by an encoder."""
        return embed_cells(self.encoder(rung, part), self.corpus, np.arange(self.corpus.num_cells), "ranked")

    @property
    def rungs(self) -> list[str]:
        """Names of all encoders, and of what stands beside them."""
        return [BASELINES, STUDY, "random", "start", *self.models]


@dataclass(frozen=True)
class Task:
    """Cells that train a head, and cells to label."""

    regime: str
    name: str
    half: str
    split: int
    studies: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray
    panel: int = 0
    """Number of genes; 0 = all."""


def tasks(world: World) -> Iterator[Task]:
    """All tasks, in a fixed order."""
    for split in range(SPLITS):
        for name in sorted(SELECT + CONFIRM):
            half = "select" if name in SELECT else "confirm"
            rng = np.random.default_rng([split, zlib.crc32(name.encode())])
            cells = rng.permutation(world.cells(name))[:MOST_CELLS]
            labels = world.labels[cells]
            firsts = np.array([np.flatnonzero(labels == t)[0] for t in np.unique(labels)])
            pool = np.setdiff1d(np.arange(len(cells) // 2), firsts)
            test = np.setdiff1d(np.arange(len(cells) // 2, len(cells)), firsts)

            def few(
                share: float, firsts: np.ndarray = firsts, pool: np.ndarray = pool, num: int = len(cells)
            ) -> np.ndarray:
                return np.concatenate([firsts, pool[: max(0, round(share * num) - len(firsts))]])

            for percent in (1, 5, 10):
                yield Task(f"{percent} % labels", name, half, split, (name,), cells[few(percent / 100)], cells[test])
            for genes in (300, 1000):
                yield Task(
                    f"panel of {genes:,} genes", name, half, split, (name,), cells[few(0.05)], cells[test[:600]], genes
                )
            for number in (50, 100, 200):
                some = rng.permutation(cells)[:number]
                known = np.isin(world.labels[some[number // 2 :]], world.labels[some[: number // 2]])
                yield Task(
                    f"{number} cells", name, half, split, (name,), some[: number // 2], some[number // 2 :][known]
                )
        for regime, pairs in (
            () if split else (("other study", [((a,), (b,)) for a, b in STUDIES]), ("other species", SPECIES))
        ):
            for pair in pairs:
                for one, two in (pair, pair[::-1]):
                    rng = np.random.default_rng([split, zlib.crc32(f"{one} {two}".encode())])
                    sides = [np.concatenate([world.cells(n) for n in side]) for side in (one, two)]
                    counts = [pd.Series(world.labels[side]).value_counts() for side in sides]
                    types = [t for t in counts[0].index if counts[0][t] >= 10 and counts[1].get(t, 0) >= 10]
                    chosen = [rng.permutation(s[np.isin(world.labels[s], types)])[: MOST_CELLS // 2] for s in sides]
                    half = "select" if two[0] in SELECT else "confirm"
                    yield Task(regime, f"{one[0]} > {two[0]}", half, split, (*one, *two), chosen[0], chosen[1])


def centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values without the mean of each study."""
    out = np.array(values, dtype=np.float64)
    for group in np.unique(groups):
        out[groups == group] -= out[groups == group].mean(0)
    return out


def heads(values: np.ndarray, num_train: int, labels: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Class ids of the cells behind the training cells, by each head."""
    rows = unit(values)
    train, test = rows[:num_train], rows[num_train:]
    made: dict[str, Any] = {
        "5-NN": nearest_neighbours(train, labels, classes, number=5), "centroid": nearest_centroid(train, labels, classes),
        "probe": logistic_regression(train, labels, classes, strength=STRENGTH, balanced=True),
    }  # fmt: skip
    return {name: head(test).argmax(1) for name, head in made.items()}


def of_panel(logged: sparse.csr_matrix, chosen: np.ndarray) -> sparse.csr_matrix:
    """Log-normalised counts of some genes, where no other gene's counts are known: the depth is that of the panel."""
    counts = logged[:, chosen]
    counts.data = np.expm1(counts.data)
    return log_normalise(counts)


def components(logged: sparse.csr_matrix, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most variable genes, centred per study, and their principal components."""
    expression = centred(logged[:, variable_genes(logged, 2000)].toarray(), groups)
    directions = principal_components(expression.astype(np.float32), 0)[:, : max(1, len(groups) - 1)]
    return expression, expression @ directions


def score(world: World, task: Task, wanted: Sequence[str]) -> dict[str, dict[str, float]]:
    """Macro F1 of every method in a task, by rung; `BASELINES` is a rung, too."""
    cells = np.concatenate([task.train, task.test])
    num = len(task.train)
    types, ids = np.unique(world.labels[cells], return_inverse=True)
    labels, groups = ids[:num], world.sources[cells]
    logged, tokens = world.expression(task.studies, cells)
    if task.panel:
        chosen = variable_genes(logged, task.panel)
        logged, tokens = of_panel(logged, chosen), tokens[chosen]
    expression, pca = components(logged, groups)
    source = Panel(world.corpus, tokens) if task.panel else world.corpus

    def f1(said: np.ndarray) -> float:
        return float(f1_score(ids[num:], said, average="macro", labels=np.unique(ids[num:]), zero_division=0))

    def scores(name: str, values: np.ndarray) -> dict[str, float]:
        return {f"{name} {head}": f1(said) for head, said in heads(values, num, labels, len(types)).items()}

    found: dict[str, dict[str, float]] = {}
    for rung in wanted:
        if rung == STUDY:
            others = np.setdiff1d(np.flatnonzero(np.isin(world.sources, task.studies)), cells)
            every = np.concatenate([cells, others])
            whole, known = world.expression(task.studies, every)
            if task.panel:
                whole = of_panel(whole, np.flatnonzero(np.isin(known, tokens)))
            found[rung] = scores("PCA of the study", components(whole, world.sources[every])[1][: len(cells)])
            continue
        if rung == BASELINES:
            rows = unit(expression)
            ranks = linear_start.gene_rows(*source.tokens(cells), world.corpus.vocabulary.size)
            start = linear_start.fit_best(np.zeros((num, 0)), ranks[:num], labels, len(types), seed=0, shares=(1.0,))
            regression = logistic_regression(rows[:num], labels, len(types), strength=STRENGTH, balanced=True)
            found[rung] = scores("PCA", pca) | {
                "genes centroid": f1(nearest_centroid(rows[:num], labels, len(types))(rows[num:]).argmax(1)),
                "genes regression": f1(regression(rows[num:]).argmax(1)),
                "genes_ranks": f1(np.asarray(ranks[num:] @ start.genes_CV.T + start.bias_C).argmax(1)),
            }
            continue
        found[rung] = {}
        for part, word in (({"select": "confirm", "confirm": "select"}[task.half], "unseen"), ("all", "seen")):
            if rung == "random" and word == "seen":
                continue
            encoder = world.encoder(rung, part) if task.panel else None
            vectors = embed_cells(encoder, source, cells, "ranked") if encoder else world.vectors(rung, part)[cells]
            vectors = centred(vectors, groups)
            sides = [v / max(np.sqrt((v**2).sum(1).mean()), 1e-9) for v in (vectors, pca)]
            name = rung.split("/")[0]
            found[rung] |= scores(f"{name} {word}", vectors) | scores(f"{name}+PCA {word}", np.hstack(sides))
    return found


def measured(world: World, output: Path, only: str) -> pd.DataFrame:
    """Scores of all tasks: regime, name, half, split, rung, method, score."""
    log = output / "rows.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    have = {(row["regime"], row["name"], row["split"], row["rung"]) for row in done}
    with log.open("a") as file:
        for task in tasks(world):
            wanted = [r for r in world.rungs if (task.regime, task.name, task.split, r) not in have]
            if only not in task.regime or not wanted or len(np.unique(world.labels[task.test])) < 2:
                continue
            about = {"regime": task.regime, "name": task.name, "half": task.half, "split": task.split}
            for rung, values in score(world, task, wanted).items():
                done.append(about | {"rung": rung, "scores": values})
                file.write(json.dumps(done[-1]) + "\n")
            file.flush()
    rows = [
        (*(row[name] for name in ("regime", "name", "half", "split", "rung")), method, value)
        for row in done for method, value in row["scores"].items() if only in row["regime"]
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["regime", "name", "half", "split", "rung", "method", "score"])


def interval(differences: np.ndarray) -> str:
    """Mean with its 95 % interval over data sets."""
    mean = differences.mean()
    if len(differences) < 3:
        return f"{mean:+.3f}"
    reach = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    return f"{mean:+.3f} [{mean - reach:+.3f}, {mean + reach:+.3f}]"


def is_baseline(method: str) -> bool:
    """Whether a method reads no encoder."""
    return method.startswith(("PCA", "genes"))


def verdicts(frame: pd.DataFrame, say: Callable[[str], object]) -> None:
    """By regime and way of training: what SELECT chooses, confirmed on CONFIRM."""
    say(
        "| regime | chosen on SELECT | SELECT: it, best baseline | CONFIRM: it | best baseline of CONFIRM | difference, CONFIRM | all data sets |"
    )
    say("|---|---|---|---|---|---|---|")
    for regime, part in frame.groupby("regime", sort=False):
        means = part.groupby(["half", "name", "method"])["score"].mean().unstack("method")
        for word in ("unseen", "seen"):
            ours = [m for m in means.columns if f" {word} " in m and m.startswith("N")]
            base = [
                m for m in means.columns if is_baseline(m) and (word == "seen" or not m.startswith("PCA of the study"))
            ]
            halves = [half for half in ("select", "confirm") if half in means.index.get_level_values("half")]
            if len(halves) < 2:
                continue
            chosen = means.loc["select", ours].mean().idxmax()
            best = means.loc["confirm", base].mean().idxmax()
            first = means.loc["select", base].mean()
            every = means[base].mean().idxmax()
            say(
                f"| {regime}, {word} | {chosen.replace(f' {word}', '')} | {means.loc['select', chosen].mean():.3f}, {first.max():.3f} | "
                f"{means.loc['confirm', chosen].mean():.3f} | {best} {means.loc['confirm', best].mean():.3f} | "
                f"{interval((means.loc['confirm', chosen] - means.loc['confirm', best]).to_numpy())} | "
                f"{interval((means[chosen] - means[every]).to_numpy())} ({every}) |"
            )


def print_tables(frame: pd.DataFrame, say: Callable[[str], object]) -> None:
    """Mean scores by half, and what SELECT chooses."""
    for half in ("select", "confirm", "all"):
        part = frame if half == "all" else frame[frame["half"] == half]
        table = part.groupby(["method", "regime"], sort=False)["score"].mean().unstack("regime")
        say(f"\n{half}: macro F1, mean over data sets\n")
        say("| method | " + " | ".join(table.columns) + " |")
        say("|" + "---|" * (len(table.columns) + 1))
        for method, row in table.iterrows():
            say(f"| {method} | " + " | ".join("" if v != v else f"{v:.3f}" for v in row) + " |")  # noqa: PLR0124 (NaN)
    say("")
    verdicts(frame, say)


def main(say: Callable[[str], object] = print) -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    corpora = prepared(args.output, args.data)
    models = checkpoints(args.output, corpora, steps=args.steps, seeds=args.seeds)
    frame = measured(World(corpora, models), args.output, args.only)
    print_tables(frame, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
