"""Labels of donors, studies and species that took no part in training: the kept classifier beside three baselines.

    python jobs/bench_annotate.py OUTPUT                    # human donors of the bundled pancreas, left out in turn; both species
    python jobs/bench_annotate.py OUTPUT --data FOLDER      # also studies of a folder of .h5ad files that share labels
    python jobs/bench_annotate.py OUTPUT --only donor       # rows whose name contains a text

For each row a run is made in OUTPUT: `prepare`, an encoder of two steps, `classify` with the models that train no encoder, and
`annotate` for the held-out cells. Baselines are fitted to the same training cells and scored on the same held-out cells: those of
types with two cells or more in training (`--least` of them on each side). They are a logistic regression on z-scored variable genes,
cosine 5-NN on a truncated SVD, and pseudobulk; between studies and species, each is z-scored within the study, the SVD is of one-to-one
orthologs, and joint PCA with 5-NN stands beside them. Finished rows are in OUTPUT/rows.jsonl and are not made again. The exit code is 1
where a row misses its bar: never more than .01 macro F1 below the best of the three; between species, not below the best of all four.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import anndata
import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

import mixgf as mg
from mixgf.genes.species import orthologs
from mixgf.storage import files

MODELS = (
    "genes_vote", "genes_logreg", "hvg_logreg", "pseudobulk", "pca_knn", "genes_centroid", "pca_logreg", "joint_pca", "genes_ranks",
)  # fmt: skip
STUDIES = (
    ("spleen_mouse_jaitin", "immune_mouse_tabulamuris"),
    ("pbmc_human_pbmc3k", "pbmc_human_kang_ifnb"),
    ("pancreas_human_baron", "pancreas_mouse_baron"),
)
"""Files that share labels, two by two; each is left out in turn."""
MARGIN = 0.01


@dataclass(frozen=True)
class Row:
    """Cells that train and cells that are labelled."""

    name: str
    train: anndata.AnnData
    test: anndata.AnnData
    least: int
    """Fewest cells of a scored type in training and among the labelled cells."""

    @property
    def species(self) -> tuple[str, str]:
        """Of the training cells and of the labelled ones."""
        return str(self.train.obs["species"].iloc[0]), str(self.test.obs["species"].iloc[0])


def bundled(name: str) -> anndata.AnnData:
    """Bundled cells with labels."""
    return _labelled(anndata.read_h5ad(files.local_path(f"resource:pancreas_{name}_baron.h5ad")))


def _labelled(data: anndata.AnnData) -> anndata.AnnData:
    keep = ~data.obs["cell_type"].astype(str).isin(["", "unknown", "nan"])
    if "label_source" in data.obs:
        keep &= data.obs["label_source"] == "published"
    data = data[keep.to_numpy()].copy()
    data.obs = data.obs[["cell_type", "species", "donor", "organ"]].astype(str)
    data.X = sparse.csr_matrix(data.X).astype(np.float32)
    return data


def rows(folder: str) -> Iterator[Row]:
    """All rows."""
    human, mouse = bundled("human"), bundled("mouse")
    for donor in sorted(set(human.obs["donor"])):
        out = (human.obs["donor"] == donor).to_numpy()
        yield Row(f"donor {donor}", human[~out].copy(), human[out].copy(), 2)
    yield Row("species human > mouse", human, mouse, 10)
    yield Row("species mouse > human", mouse, human, 10)
    for pair in STUDIES if folder else ():
        data = {name: _labelled(anndata.read_h5ad(Path(folder) / f"{name}.h5ad")) for name in pair}
        for source, target in permutations(pair):
            yield Row(f"study {source} > {target}", data[source], data[target], 10)


def scored_types(row: Row) -> list[str]:
    """Types with enough cells on both sides."""
    sides = [data.obs["cell_type"].value_counts() for data in (row.train, row.test)]
    least = (row.least, row.least if row.least > 2 else 1)
    return sorted(
        set.intersection(*({t for t, n in side.items() if n >= few} for side, few in zip(sides, least, strict=True)))
    )


def macro_f1(true: np.ndarray, said: np.ndarray, types: Sequence[object]) -> float:
    """Mean F1 of the types."""
    return float(f1_score(true, said, average="macro", labels=types, zero_division=0))


# Baselines, by code of their own


def _log(data: anndata.AnnData) -> np.ndarray:
    depth = np.asarray(data.X.sum(1)).ravel()
    return np.log1p(data.X.multiply(1e4 / np.maximum(depth, 1)[:, None]).toarray()).astype(np.float32)


def baselines(row: Row) -> dict[str, np.ndarray]:
    """Labels of the held-out cells by each baseline."""
    import scanpy

    train, test = row.train, row.test
    genes = [data.var["ensembl_id"].astype(str).to_numpy() for data in (train, test)]
    if row.species[0] != row.species[1]:
        pairs = orthologs(("resource:orthologs.parquet",))[row.species[1], row.species[0]]
        genes[1] = np.array([pairs.get(gene, "") for gene in genes[1].tolist()])
    firsts = [dict(reversed([(g, i) for i, g in enumerate(own.tolist()) if g])) for own in genes]
    shared = sorted(set(firsts[0]) & set(firsts[1]))
    train, test = (data[:, [first[g] for g in shared]] for data, first in zip((train, test), firsts, strict=True))
    there = (np.asarray(train.X.sum(0)).ravel() > 0) & (np.asarray(test.X.sum(0)).ravel() > 0)
    train, test = train[:, there].copy(), test[:, there].copy()
    a, b = _log(train), _log(test)
    found = anndata.AnnData(a.copy(), var=train.var[[]])
    scanpy.pp.highly_variable_genes(found, n_top_genes=min(2000, a.shape[1]))
    chosen = found.var["highly_variable"].to_numpy()
    a, b, labels = a[:, chosen], b[:, chosen], train.obs["cell_type"].to_numpy()
    new = not row.name.startswith("donor")

    def z(values: np.ndarray, by: np.ndarray) -> np.ndarray:
        sd = by.std(0)
        return (values - by.mean(0)) / np.where(sd > 1e-8, sd, 1)

    za, zb = z(a, a), z(b, b if new else a)
    ca, cb = a - a.mean(0), b - (b if new else a).mean(0)
    svd = TruncatedSVD(50, random_state=0).fit(np.vstack([ca, cb]) if new else a)
    sa, sb = (svd.transform(one) for one in ((ca, cb) if new else (a, b)))
    types = np.unique(labels)
    means = np.stack([za[labels == t].mean(0) for t in types])
    cosine = (zb / np.linalg.norm(zb, axis=1, keepdims=True)) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    out = {
        "regression": LogisticRegression(max_iter=1000).fit(za, labels).predict(zb),
        "5-NN, SVD": KNeighborsClassifier(5, metric="cosine", algorithm="brute").fit(sa, labels).predict(sb),
        "pseudobulk": types[cosine.argmax(1)],
    }
    if new:
        pca = PCA(50, svd_solver="randomized", random_state=0).fit(np.vstack([ca, cb]))
        near = KNeighborsClassifier(5, metric="cosine", algorithm="brute").fit(pca.transform(ca), labels)
        out["joint PCA"] = near.predict(pca.transform(cb))
    return out


def kept(row: Row, folder: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Labels of the held-out cells by the classifier that `mixgf classify` keeps, and facts about it."""
    paths = {side: folder / f"{side}.h5ad" for side in ("train", "test")}
    folder.mkdir(parents=True, exist_ok=True)
    row.train.write_h5ad(paths["train"])
    row.test.write_h5ad(paths["test"])
    settings = {"vocab.sharing": "ortholog", "perturb.start": "", "perturb.goal": "", "perturb.alternatives": []}
    output = str(folder / "run")
    sources = {row.species[0]: [str(paths["train"])]}
    if row.species[0] != row.species[1]:  # the vocabulary has genes of both; no cell of the second trains
        sources[row.species[1]] = [str(paths["test"])]
    mg.prepare(sources, recipe="demo", output=output, settings=settings)
    mg.pretrain(recipe="demo", output=output, settings=settings | {"train.max_steps": 2})
    asked = {"classify.models": list(MODELS), "classify.splits": ["random"], "classify.cells": "source == 'train'"}
    mg.classify(recipe="demo", output=output, settings=settings | asked)
    classifier = mg.load_classifier(f"{output}/classify/classifiers/train")
    labels = classifier.annotate(str(paths["test"]), species=row.species[1])
    facts = {"model": labels.attrs["form_model"], "why": classifier.about["why"], "form": labels.attrs["form"],
             "doubted": f"{(~labels['mixgf_trusted']).mean():.3f}"}  # fmt: skip
    return labels["mixgf_label"].astype(str).to_numpy(), facts


def measure(row: Row, folder: Path) -> dict[str, object]:
    """One row of the table."""
    began = time.process_time()
    said, facts = kept(row, folder / row.name.replace(" ", "_").replace(">", "to"))
    seconds, types = time.process_time() - began, scored_types(row)
    true = row.test.obs["cell_type"].to_numpy()
    mine = np.isin(true, types)
    others = {name: macro_f1(true[mine], labels[mine], types) for name, labels in baselines(row).items()}
    score = macro_f1(true[mine], said[mine], types)
    if row.species[0] != row.species[1]:
        bar = max(others.values())
    else:
        bar = max(value for name, value in others.items() if name != "joint PCA") - MARGIN
    return {
        "name": row.name, "types": len(types), "cells": int(mine.sum()), "kept": score, **others, "bar": bar, "reached": score >= bar,
        "cpu_seconds": round(seconds, 1), **facts,
    }  # fmt: skip


def main(say: Callable[[str], object] = print) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "rows.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for row in rows(args.data):
        if args.only in row.name and row.name not in {one["name"] for one in done}:
            done.append(measure(row, args.output))
            with log.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            say(json.dumps(done[-1]))
    columns = ("kept", "regression", "5-NN, SVD", "pseudobulk", "joint PCA", "bar")
    say(f"| held out | types | cells | {' | '.join(columns)} | model | form | reached |")
    say("|" + "---|" * (len(columns) + 6))
    for one in done:
        numbers = " | ".join(f"{one[name]:.3f}" if name in one else "" for name in columns)
        say(
            f"| {one['name']} | {one['types']} | {one['cells']:,} | {numbers} | {one['model']} | {one['form']} | {one['reached']} |"
        )
    return 0 if all(one["reached"] for one in done) else 1


if __name__ == "__main__":
    sys.exit(main())
