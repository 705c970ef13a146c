"""The classification stage in pieces that can run anywhere, in any order, any number of times.

A piece reads artifacts, computes one thing and writes one part file, atomically: raw counts of one source, vectors of one
block of cells, predictions of one model on one split. What is there is not made again. `tables` puts the parts together.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from scipy import sparse

from mixgf import (
    artifacts,
    baselines,
    classifier,
    classify,
    config,
    counts,
    embed,
    keyed,
    scores,
    species,
    storage,
    train,
)
from mixgf.baselines import BASELINES
from mixgf.classify import HEADS, UNTRAINED
from mixgf.config import Config, Source, SpeciesRow, UserError
from mixgf.counts import Counts
from mixgf.dataset import Corpus
from mixgf.model import Encoder
from mixgf.splits import Labelled, Split

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]

TRAINED = "trained"
BLOCK_CELLS = 2_000
"""Cells whose vectors are one part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """URIs of what is read and of the folder of parts."""

    corpus: str
    checkpoint: str
    output: str
    """The artifact's folder."""
    embeddings: str
    """Vectors of all cells by this checkpoint; empty = made here, as parts."""

    @property
    def parts(self) -> str:
        """The folder of parts."""
        return storage.join(self.output, "parts")


def slug(text: str) -> str:
    """A file name that people can read; not unique."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-")[:60]


# Counts and vectors


def counts_part(places: Places, source: str) -> str:
    """URI of the raw counts of one source."""
    return storage.join(places.parts, "counts", f"{slug(source)}-{config.fingerprint(source)[:8]}.parquet")


def read_counts(run: Config, places: Places, source: str, cells: Ints) -> None:
    """Keep raw counts of these cells (global numbers, ascending), all of one source."""
    corpus = Corpus(places.corpus)
    entry = next(dict(s) for s in corpus.record.config["sources"] if s["name"] == source)
    entry.pop("size", None)
    row_of = next(
        config.from_dict(SpeciesRow, s) for s in corpus.record.config["species"] if s["name"] == entry["species"]
    )
    rows = corpus.obs(["source_row"])["source_row"].to_numpy()[cells]
    order = np.argsort(rows, kind="stable")
    genes = corpus.vocabulary.of(entry["species"])
    found = counts.read(
        config.from_dict(Source, entry), row_of, genes, rows[order], block_cells=run.prepare.block_cells
    )
    counts.save(counts_part(places, source), cells[order], found)


def vectors_part(places: Places, encoder: str, number: int) -> str:
    """URI of the vectors of one block of cells by the `trained` or the `untrained_` encoder."""
    return storage.join(places.parts, "vectors", slug(encoder), f"{number:05d}.parquet")


def embed_block(run: Config, places: Places, encoder: str, number: int, cells: Ints) -> None:
    """Keep vectors of these cells."""
    corpus = Corpus(places.corpus)
    model = classify.load_encoder(places.checkpoint, encoder, run, corpus.vocabulary.hash, device(run))
    vectors_ND = embed.embed_cells(
        model,
        corpus,
        cells,
        run.embed.pooling,
        run.embed.layer,
        run.train.micro_tokens,
        max_len=model.row.max_positions,
    )
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
    storage.write_table(vectors_part(places, encoder, number), pa.table({"cell": cells, "vector": flat}))


def vectors(places: Places, encoder: str, cells: Ints) -> npt.NDArray[np.float32]:
    """Frozen vectors of these cells, in their order: from the embeddings artifact, else from parts."""
    if encoder == TRAINED and places.embeddings:
        return _from_artifact(places, cells)
    folder = storage.join(places.parts, "vectors", slug(encoder))
    found: list[tuple[Ints, npt.NDArray[np.float32]]] = []
    for name in storage.list_dir(folder):
        table = storage.read_table(storage.join(folder, name))
        mine = np.isin(table["cell"].to_numpy(), cells)
        if mine.any():
            found.append((table["cell"].to_numpy()[mine], _matrix(table)[mine]))
    have = np.concatenate([c for c, _ in found])
    order = np.argsort(have)
    return np.concatenate([v for _, v in found])[order][np.searchsorted(have[order], cells)]


def _from_artifact(places: Places, cells: Ints) -> npt.NDArray[np.float32]:
    corpus = Corpus(places.corpus)
    names = storage.list_dir(storage.join(places.embeddings, "shards"))
    assert len(names) == len(corpus.shards), "embeddings lie beside the shards of their corpus"
    parts: dict[int, npt.NDArray[np.float32]] = {}
    shard_of = np.searchsorted(corpus.starts, cells, side="right") - 1
    for shard in np.unique(shard_of).tolist():
        matrix = _matrix(storage.read_table(storage.join(places.embeddings, "shards", names[shard]), ["vector"]))
        parts[shard] = matrix[cells[shard_of == shard] - corpus.starts[shard]]
    out = np.empty((len(cells), next(iter(parts.values())).shape[1]), dtype=np.float32)
    for shard, matrix in parts.items():
        out[shard_of == shard] = matrix
    return out


def _matrix(table: pa.Table) -> npt.NDArray[np.float32]:
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def device(run: Config) -> torch.device:
    """Where this process computes."""
    return torch.device("cuda" if run.compute.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu")


# Classifiers


def classifier_part(places: Places, group: str, model: str) -> str:
    """Folder of a classifier that may be kept for a group."""
    return storage.join(places.parts, "classifiers", f"{slug(group)}-{config.fingerprint([group, model])[:8]}")


def _keep(  # noqa: PLR0917 (as `predict`, which calls it)
    run: Config, places: Places, corpus: Corpus, table: Labelled, split: Split, model: str, encoder: Encoder,
    head: tuple[Floats, Floats, Floats] | None,
) -> None:  # fmt: skip
    """Write a trained classifier as a part. A tuned head pools `classify.layer`, a probe `embed.layer`."""
    frozen = head is None
    max_len = encoder.row.max_positions if frozen else classify.longest(encoder, run.classify)
    layer = run.embed.layer if frozen else run.classify.layer

    def of_cells(cells: Ints) -> Floats:
        if frozen:  # those that the probe is scored on are there already
            return vectors(places, TRAINED, cells)
        return embed.embed_cells(
            encoder, corpus, cells, run.embed.pooling, layer, run.train.micro_tokens, max_len=max_len
        )

    made = classifier.of_split(
        encoder,
        head,
        of_cells,
        model=model,
        corpus=corpus,
        table=table,
        split=split,
        run=run,
        max_len=max_len,
        layer=layer,
    )
    classifier.save(classifier_part(places, split.group, model), made, corpus.vocabulary)


def named(group: str, splits: Sequence[Split]) -> str:
    """A group's folder: its name as a slug, with a key where two groups have the same slug."""
    alike = {s.group for s in splits if slug(s.group) == slug(group)}
    return slug(group) if len(alike) == 1 else f"{slug(group)}-{config.fingerprint(group)[:8]}"


def keep_best(run: Config, places: Places, splits: Sequence[Split], parents: dict[str, str]) -> list[dict[str, Any]]:
    """Publish the classifier with the lowest validation loss of each group; returns what is known of each."""
    kept = []
    for split in [s for s in splits if classifier.wanted(run, s)]:
        parts = [
            classifier_part(places, split.group, model) for model in run.classify.models if model in classifier.TRAINED
        ]
        if not parts:
            continue
        best = min(parts, key=lambda part: float(classifier.facts(part)["about"]["validation"]["loss"]))
        uri = storage.join(places.output, classifier.FOLDER, named(split.group, splits))
        classifier.publish(uri, best, parents)
        about = classifier.facts(uri)["about"]
        kept.append({"uri": uri, **{name: about[name] for name in ("group", "model", "validation", "test")}})
    return kept


# Predictions


def prediction_part(places: Places, split: Split, model: str) -> str:
    """URI of the predictions of one model on one split."""
    key = config.fingerprint([split.group, split.kind, split.direction, split.seed, model])[:10]
    name = slug(f"{split.kind} {split.group} {split.direction} {split.seed} {model}")
    return storage.join(places.parts, "predictions", f"{name}-{key}.parquet")


def predict(run: Config, places: Places, table: Labelled, split: Split, model: str) -> None:
    """Keep predictions of one model on the test cells of one split, with their scores."""
    began = time.perf_counter()
    details: dict[str, Any] = {}
    if model == "probe" and classifier.wanted(run, split):
        corpus = Corpus(places.corpus)
        start = classify.load_encoder(places.checkpoint, model, run, corpus.vocabulary.hash, device(run))
        _keep(run, places, corpus, table, split, model, start, None)
    if model in BASELINES:
        probabilities_MC = BASELINES[model](problem(run, places, table, split))
    elif model.removeprefix(UNTRAINED) in HEADS:
        encoder = UNTRAINED if model.startswith(UNTRAINED) else TRAINED
        train_ND, test_MD = (vectors(places, encoder, table.cells[rows]) for rows in (split.train, split.test))
        probabilities_MC = classify.frozen(
            model.removeprefix(UNTRAINED), train_ND, test_MD, table=table, split=split, settings=run.classify
        )
    else:
        corpus = Corpus(places.corpus)
        start = classify.load_encoder(places.checkpoint, model, run, corpus.vocabulary.hash, device(run))
        run = classify.recipe(run, model)
        tuned = classify.finetune(start, corpus, table, split, run=run, context=train.LocalContext(device(run)))
        probabilities_MC, details = tuned.probabilities, classify.notes(tuned)
        if model in classifier.TRAINED and classifier.wanted(run, split):
            _keep(run, places, corpus, table, split, model, tuned.model.encoder, tuned.model.linear())
    true_M, predicted_M = split.ids(table.labels[split.test]), probabilities_MC.argmax(1).astype(np.int64)
    confidence_M = probabilities_MC.max(1).astype(np.float64)
    rng = np.random.default_rng([run.seed, split.seed, 7])
    found, by = scores.score(true_M, predicted_M, confidence_M, table.donors[split.test], len(split.classes), rng=rng)
    classes = np.asarray(split.classes)
    made = pa.table({
        "cell": table.cells[split.test], "true": classes[true_M], "predicted": classes[predicted_M],
        "probability": confidence_M.astype(np.float32),
    })  # fmt: skip
    meta = details | {
        "seconds": time.perf_counter() - began, "interval_by": by,
        "scores": {name: [one.value, one.low, one.high] for name, one in found.items()},
    }  # fmt: skip
    storage.write_table(
        prediction_part(places, split, model), made.replace_schema_metadata({"mixgf": json.dumps(meta)})
    )


def problem(run: Config, places: Places, table: Labelled, split: Split) -> baselines.Problem:
    """A split as the baselines see it, from the kept raw counts."""
    rows = np.concatenate([split.train, split.test])
    vocabulary = Corpus(places.corpus).vocabulary
    blocks, numbers = [], []
    for source in np.unique(table.sources[rows]).tolist():
        mine = rows[table.sources[rows] == source]
        name = str(table.species[mine[0]])
        genes = vocabulary.of(name).genes.astype(np.str_)
        cells, matrix = counts.load(counts_part(places, source), len(genes))
        keep = np.isin(cells, table.cells[mine])
        numbers.append(cells[keep])
        blocks.append(Counts(matrix=matrix[keep], genes=genes, species=name))
    orthologs = species.orthologs(run.vocab.orthologs) if len({b.species for b in blocks}) > 1 else {}
    matrices, _ = counts.shared_space(blocks, orthologs)
    whole, have = sparse.vstack(matrices, format="csr"), np.concatenate(numbers)
    order = np.argsort(have)
    place = order[np.searchsorted(have[order], table.cells[rows])]
    num_train = len(split.train)
    return baselines.Problem(
        train=sparse.csr_matrix(whole[place[:num_train]]), test=sparse.csr_matrix(whole[place[num_train:]]),
        labels=split.ids(table.labels[split.train]), num_classes=len(split.classes), train_species=table.species[split.train],
        test_species=table.species[split.test], num_hvgs=run.classify.num_hvgs, num_neighbours=run.classify.knn,
        seed=int(keyed.hashed(run.seed, split.seed)) & 0x7FFFFFFF,
    )  # fmt: skip


# Tables


def tables(
    run: Config, places: Places, table: Labelled, splits: Sequence[Split], names: Iterable[str]
) -> dict[str, pd.DataFrame]:
    """All parts as tables, by file name.

    Args:
        run: The whole config.
        places: Where the parts are.
        table: The labelled cells.
        splits: All splits.
        names: Name of each labelled cell in the corpus.

    Returns:
        `scores`, `per_class`, `confusion`, `predictions`, `comparisons` (against the best baseline of each task), `epochs`
        (of fine-tunings) and `splits` (which cell was what), in long form.
    """
    name_of = dict(zip(table.cells.tolist(), names, strict=True))
    rows: dict[str, list[Any]] = {name: [] for name in ("scores", "epochs")}
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in ("per_class", "confusion", "predictions", "splits")}
    for split in splits:
        key = {"group": split.group, "split": split.kind, "direction": split.direction, "seed": split.seed}
        for part, of in (
            ("train", np.setdiff1d(split.train, split.validation)),
            ("validation", split.validation),
            ("test", split.test),
        ):
            frames["splits"].append(
                pd.DataFrame(key | {"part": part, "cell": [name_of[c] for c in table.cells[of].tolist()]})
            )
        for model in run.classify.models:
            part_table = storage.read_table(prediction_part(places, split, model))
            meta = json.loads(part_table.schema.metadata[b"mixgf"])
            mine = key | {"model": model}
            sizes = {"num_train": len(split.train), "num_test": len(split.test), "num_classes": len(split.classes)}
            rows["scores"] += [
                mine
                | {"metric": metric, "value": value, "low": low, "high": high}
                | sizes
                | {"interval_by": meta["interval_by"]}
                for metric, (value, low, high) in meta["scores"].items()
            ]
            rows["epochs"] += [
                mine | epoch | {"chosen": epoch["epoch"] == meta["epoch"]} for epoch in meta.get("history", [])
            ]
            frame = part_table.to_pandas()
            matrix = scores.confusion(split.ids(frame["true"].to_numpy().astype(np.str_)),
                                      split.ids(frame["predicted"].to_numpy().astype(np.str_)), len(split.classes))  # fmt: skip
            frames["per_class"].append(pd.DataFrame(
                mine | {"class": split.classes} | scores.class_scores(matrix)
                | {"num_test": matrix.sum(1), "num_train": np.bincount(split.ids(table.labels[split.train]), minlength=len(split.classes))}
            ))  # fmt: skip
            true, predicted = np.nonzero(matrix)
            classes = np.asarray(split.classes)
            frames["confusion"].append(pd.DataFrame(
                mine | {"true": classes[true], "predicted": classes[predicted], "count": matrix[true, predicted]}
            ))  # fmt: skip
            frames["predictions"].append(frame.assign(number=frame["cell"], cell=frame["cell"].map(name_of), **mine))
    out = {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}
    out |= {name: pd.DataFrame(found) for name, found in rows.items()}
    order = ["group", "split", "direction", "seed", "model", "cell", "number", "true", "predicted", "probability"]
    out["predictions"] = out["predictions"][order]
    out["comparisons"] = comparisons(run, table, splits, out)
    return out


TASK = ["group", "split", "direction"]


def comparisons(run: Config, table: Labelled, splits: Sequence[Split], found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Every model of the encoder against the best baseline of each task, on the same cells, over all seeds.

    The best baseline is the one with the highest mean macro F1 on the test cells, which favours the baselines.
    """
    macro = found["scores"][found["scores"]["metric"] == "macro_f1"]
    donor_of = dict(zip(table.cells.tolist(), table.donors.tolist(), strict=True))
    classes: dict[tuple[str, str, str], set[str]] = {}
    for s in splits:  # seeds that hold out other donors may have other types
        classes.setdefault((s.group, s.kind, s.direction), set()).update(s.classes)
    rows = []
    for task, part in macro.groupby(TASK, sort=False):
        means = part.groupby("model", sort=False)["value"].mean()
        rivals = [m for m in means.index if m in BASELINES]
        if not rivals:
            continue
        baseline = max(rivals, key=lambda m: (means[m], m))
        here = found["predictions"]
        here = here[(here["group"] == task[0]) & (here["split"] == task[1]) & (here["direction"] == task[2])]
        by_model = {m: frame.sort_values(["seed", "number"]) for m, frame in here.groupby("model", sort=False)}
        rival = by_model[baseline]
        code = {name: i for i, name in enumerate(sorted(classes[task]))}
        for model in [m for m in means.index if m not in BASELINES]:
            mine = by_model[model]
            duel = scores.compare(
                true_M=mine["true"].map(code).to_numpy(np.int64), model_M=mine["predicted"].map(code).to_numpy(np.int64),
                baseline_M=rival["predicted"].map(code).to_numpy(np.int64), cells_M=mine["number"].to_numpy(np.int64),
                donors_M=np.array([donor_of[c] for c in mine["number"]], dtype=np.str_), seeds_M=mine["seed"].to_numpy(np.int64),
                num_classes=len(code), rng=np.random.default_rng([run.seed, 11]),
            )  # fmt: skip
            rows += [
                dict(zip(TASK, task, strict=True)) | {
                    "model": model, "baseline": baseline, "metric": metric, "difference": one.value, "low": one.low,
                    "high": one.high, "p": duel.p, "outcome": duel.outcome, "seeds": mine["seed"].nunique(), "interval_by": duel.by,
                }
                for metric, one in (("accuracy", duel.accuracy), ("macro_f1", duel.macro_f1))
            ]  # fmt: skip
    return pd.DataFrame(rows)


def write_cells(uri: str, run: Config, table: Labelled, found: dict[str, pd.DataFrame], names: Sequence[str]) -> str:
    """AnnData of the labelled cells with what the best model of the encoder predicts for the test cells of seed 0.

    Returns:
        The model's name; empty when none of the encoder's models was scored.
    """
    import anndata  # noqa: PLC0415 (slow to import)

    board = found["scores"]
    easy = board[
        (board["metric"] == "macro_f1")
        & (board["split"] == run.classify.splits[0])
        & ~board["model"].isin(list(BASELINES))
    ]
    easy = easy[~easy["model"].str.startswith(UNTRAINED)]
    if easy.empty:
        return ""
    model = str(easy.groupby("model")["value"].mean().sort_values().index[-1])
    one = found["predictions"]
    one = one[(one["model"] == model) & (one["seed"] == 0) & (one["split"] == run.classify.splits[0])].drop_duplicates(
        "number"
    )
    obs = pd.DataFrame(
        {"species": table.species, "source": table.sources, run.classify.label: table.labels},
        index=pd.Index(list(names), dtype=str),
    )
    place = one.set_index("cell")
    obs["predicted"] = place["predicted"].reindex(obs.index).astype("category")
    obs["probability"] = place["probability"].reindex(obs.index)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        anndata.AnnData(obs=obs, uns={"mixgf": {"model": model, "split": run.classify.splits[0]}}).write_h5ad(path)
        storage.upload(path, uri)
    return model


def embeddings(
    run: Config, corpus: artifacts.Record, checkpoint_: artifacts.Record
) -> tuple[str, artifacts.Record | None]:
    """The embeddings artifact of this corpus and checkpoint, where there is one; else vectors are made here."""
    uri = run.inputs.embeddings or storage.join(run.output, "embed")
    record = artifacts.find(uri)
    parents = {corpus.fingerprint, checkpoint_.fingerprint}
    if record is not None and record.config == config.to_dict(run.embed) and parents <= set(record.parents.values()):
        return uri, record
    if run.inputs.embeddings:
        msg = (f"inputs.embeddings = {uri}: not of this corpus, checkpoint and embed.* settings; make them with `mixgf embed`, "
               "or leave inputs.embeddings empty")  # fmt: skip
        raise UserError(msg)
    return "", None
