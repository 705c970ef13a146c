"""What a training needs beside the corpus: gene vectors (`model.start`) and neighbours of cells (`objective.view=neighbour`).

Each is an artifact in the folder of the run, made by passes over the corpus whose parts stay until it is finished.
"""

from __future__ import annotations

from dataclasses import replace

from mixgf.config.run import Config
from mixgf.console import say
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.execution import Executor, Task
from mixgf.genes import species
from mixgf.stages.fan_out import fan_out
from mixgf.storage import artifacts, files
from mixgf.training import gene_vectors, neighbours
from mixgf.training.pretraining import reads_neighbours


def prepared(config: Config, corpus: Corpus, executor: Executor, *, folder: str = "", worker: str = "") -> Config:
    """The config with `inputs.gene_vectors` and `inputs.neighbours` set to artifacts of this corpus, which are made if they are missing.

    Args:
        config: of the training.
        corpus: that it reads.
        executor: runs the passes.
        folder: URI of a folder for the artifacts of several trainings, which are told apart by their fingerprints; empty = the
            run's.
        worker: name of one of several processes that may make the same artifact at a time.

    Raises:
        UserError: an artifact that the config names is of another corpus or width.
    """
    inputs = config.inputs
    if config.model.start == "svd" and not inputs.start:
        inputs = replace(inputs, gene_vectors=make_gene_vectors(config, corpus, executor, folder=folder, worker=worker))
    if reads_neighbours(config.objective) and inputs.neighbours:
        _require_of_corpus(inputs.neighbours, corpus)
    elif reads_neighbours(config.objective):
        inputs = replace(inputs, neighbours=make_neighbours(config, corpus, executor, folder=folder))
    return replace(config, inputs=inputs)


def parents(config: Config, corpus: Corpus) -> dict[str, str]:
    """Fingerprints of what the training of a config needs beside the corpus, made or not."""
    found = {}
    if config.model.start == "svd" and not config.inputs.start:
        found["gene_vectors"] = planned_vectors(config, corpus).fingerprint
    elif config.model.start == "table" and not config.inputs.start:
        gene_vectors.read_vectors(config.inputs.gene_vectors)
        found["gene_vectors"] = files.sha256(config.inputs.gene_vectors)
    if reads_neighbours(config.objective):
        given = config.inputs.neighbours
        record = _require_of_corpus(given, corpus) if given else planned_neighbours(config, corpus)
        found["neighbours"] = record.fingerprint
    return found


def _require_of_corpus(uri: str, corpus: Corpus) -> artifacts.Record:
    record = artifacts.require(uri, neighbours.KIND, neighbours.SCHEMA)
    if record.parents["corpus"] != corpus.record.fingerprint:
        msg = f"inputs.neighbours = {uri!r}: of another corpus; leave it empty to make them"
        raise UserError(msg)
    return record


def planned_vectors(config: Config, corpus: Corpus) -> artifacts.Record:
    """The record of the singular vectors of a corpus."""
    chosen = {
        "dim": config.model.dim, "passes": gene_vectors.PASSES, "genes": gene_vectors.READ_GENES,
        "orthologs": [files.sha256(table) for table in config.vocab.orthologs],
    }  # fmt: skip
    return artifacts.plan(gene_vectors.KIND, gene_vectors.SCHEMA, chosen, {"corpus": corpus.record.fingerprint})


def _folder(config: Config, record: artifacts.Record, folder: str) -> str:
    if not folder:
        return files.join(config.output, record.kind)
    return files.join(folder, f"{record.kind}-{record.fingerprint[:12]}")


def make_gene_vectors(
    config: Config, corpus: Corpus, executor: Executor, *, folder: str = "", worker: str = ""
) -> str:  # fmt: skip
    """Make the singular vectors of a corpus, unless they are there; returns the URI of their table. Arguments as of `prepared`."""
    record = planned_vectors(config, corpus)
    uri = _folder(config, record, folder)
    made = files.join(uri, gene_vectors.TABLE)
    if not artifacts.begin(uri, record):
        return made
    work = files.join(uri, f"work{worker and '-'}{worker}")
    state = ""
    with executor.session():
        for number in range(gene_vectors.PASSES + 1):
            following = files.join(work, f"state-{number}.safetensors")
            if not files.exists(following):
                _pass(corpus, executor, work, number=number, state=state, following=following, dim=config.model.dim)
            state = following
    pairs = species.orthologs(config.vocab.orthologs)
    vectors = gene_vectors.species_vectors(state, dim=config.model.dim)
    tokens_VD, turned = gene_vectors.align_species(vectors, corpus.vocabulary, corpus.species, pairs)
    checksums = artifacts.write_tables(uri, {"vectors": gene_vectors.table_of(tokens_VD, corpus.vocabulary)})
    counts = {"genes": int(tokens_VD.any(1).sum()), "orthologs": turned}
    artifacts.finish(uri, record, counts=counts, files=checksums)
    files.remove(work)
    links = "".join(
        f"; {name} turned by {num:,} orthologs"
        if num >= config.model.dim
        else f"; {name} not turned: {num:,} orthologs"
        for name, num in turned.items()
    )
    say(f"pretrain: vectors of {counts['genes']:,} genes from the corpus{links}: {made}")
    return made


def _pass(
    corpus: Corpus, executor: Executor, work: str, *, number: int, state: str, following: str, dim: int
) -> None:  # fmt: skip
    """One pass over the sentences, and the state after it."""
    tasks = []
    for i, shards in enumerate(gene_vectors.plan_parts(corpus)):
        part = files.join(work, f"pass-{number}", f"{i:05d}.safetensors")
        plan = gene_vectors.SumPlan(corpus=corpus.uri, shards=shards, state=state, part=part)
        weight = float(corpus.shard_rows[list(shards)].sum())
        tasks.append(Task(part=part, function=gene_vectors.sum_sentences, args=(plan,), weight=weight))
    what = f"pretrain: gene vectors, pass {number + 1} of {gene_vectors.PASSES + 1}"
    fan_out(what, tasks, executor.run, unit="cells")
    parts = [task.part for task in tasks]
    if number:
        gene_vectors.next_state(parts, state, following)
    else:
        gene_vectors.first_state(parts, following, dim=dim)
    files.remove(files.join(work, f"pass-{number}"))


def planned_neighbours(config: Config, corpus: Corpus) -> artifacts.Record:
    """The record of the neighbours of a corpus' cells."""
    chosen = {"number": config.objective.neighbours, **neighbours.SETTINGS}
    return artifacts.plan(neighbours.KIND, neighbours.SCHEMA, chosen, {"corpus": corpus.record.fingerprint})


def make_neighbours(config: Config, corpus: Corpus, executor: Executor, *, folder: str = "") -> str:
    """Find neighbours of all cells of a corpus, unless they are there; returns the URI of the artifact. Arguments as of `prepared`."""
    record = planned_neighbours(config, corpus)
    uri = _folder(config, record, folder)
    if not artifacts.begin(uri, record):
        return uri
    tasks = []
    for shard in range(len(corpus.shards)):
        part = neighbours.part_uri(uri, shard)
        args = (corpus.uri, shard, config.objective.neighbours, part)
        tasks.append(
            Task(part=part, function=neighbours.find_in_shard, args=args, weight=float(corpus.shard_rows[shard]))
        )
    with executor.session():
        fan_out("pretrain: neighbours", tasks, executor.run, unit="cells")
    groups, names = neighbours.groups_of([task.part for task in tasks])
    checksums = artifacts.checksums_of(uri, [f"shards/{task.part.rsplit('/', 1)[1]}" for task in tasks])
    checksums |= artifacts.write_tables(uri, {"groups": groups})
    artifacts.finish(uri, record, counts={"cells": corpus.num_cells, "groups": names}, files=checksums)
    say(f"pretrain: neighbours of {corpus.num_cells:,} cells in {len(names):,} data sets: {uri}")
    return uri
