"""`import-weights`: published weights, or a checkpoint of mixgf, become the encoder of a run.

A checkpoint of mixgf may be grown to a vocabulary with more species.

A folder is config.json and model.safetensors, or a pytorch_model.bin, which is read by torch's restricted reader (tensors
only). Published models of the family (Geneformer V1 and V2, Mouse-Geneformer) have ids of their own, given by a token
dictionary; the vectors of their genes move to the ids of a corpus' vocabulary. A corpus that was prepared with their medians
(`vocab.medians`) and `tokens.cls` as they had it then gives them the sentences they know, with one exception: sentences here
have no <eos>, which Geneformer V2 has at their ends.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixgf.config.parse import to_dict
from mixgf.config.run import Config
from mixgf.console import say, warn
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.huggingface import (
    CONVENTIONS,
    PretrainedBert,
    find_dictionary,
    place_embeddings,
    read_pretrained,
    remap_to_vocabulary,
)
from mixgf.errors import UserError
from mixgf.genes import species
from mixgf.genes.vocabulary import NUM_SPECIALS
from mixgf.storage import artifacts, files
from mixgf.tracking import mlflow_runs, model_card, packaged_model

SCHEMA = 1


def grow(settings: Config, folder: str) -> str:
    """`mixgf import-weights` of a checkpoint of ours: the same for a corpus whose vocabulary was grown from that checkpoint's.

    Old ids keep their vectors, so old species' cells their embeddings. A new gene starts with the vector of its one-to-one
    ortholog, else with a random one; all new ids are untrained until `pretrain` (`inputs.start`) sees them.

    Raises:
        UserError: the vocabulary was not grown from the checkpoint's, or the sentences are of another kind.
    """
    uri = files.join(settings.output, "pretrain")
    corpus = Corpus(settings.inputs.corpus or files.join(settings.output, "corpus"))
    model, made = checkpoint.load_model(folder)
    vocabulary = corpus.vocabulary
    older = vocabulary.ancestor(made.details["vocabulary"])
    if older is None:
        msg = f"{folder}: its vocabulary is no beginning of that of {corpus.uri}; prepare that with vocab.reuse = the vocabulary of this checkpoint"
        raise UserError(msg)
    checkpoint.require_tokens(made, corpus, f"{folder}:")
    pairs = species.orthologs(settings.vocab.orthologs)
    chosen = {"seed": settings.seed, "orthologs": [files.sha256(table) for table in settings.vocab.orthologs]}
    parents = {"corpus": corpus.record.fingerprint, "grown from": made.fingerprint}
    record = artifacts.plan(checkpoint.KIND, checkpoint.SCHEMA, chosen, parents)
    if not artifacts.begin(uri, record):
        say(f"import-weights: {uri} is already there")
        return uri
    with mlflow_runs.stage(settings, "import-weights", chosen, record.fingerprint) as tracked:
        source = vocabulary.warm_start_ids(older, pairs)
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        grown = place_embeddings(PretrainedBert(model.encoder.sizes, tensors, ""), source, settings.seed)
        counts: dict[str, Any] = {"steps": 0}
        for name in vocabulary.species[len(older.species) :]:
            tokens = vocabulary.species_tokens(name)
            own = tokens[tokens >= older.size]
            counts[f"genes_{name}"], counts[f"from_orthologs_{name}"] = len(tokens), int((source[own] >= 0).sum())
            say(
                f"import-weights: {name}: {len(tokens):,} genes; {len(tokens) - len(own):,} share an id, {counts[f'from_orthologs_{name}']:,} "
                f"start with their ortholog's vector, {int((source[own] < 0).sum()):,} with a random one"
            )
        untrained = np.concatenate([checkpoint.untrained_ids(made), np.arange(older.size, vocabulary.size)])
        done = checkpoint.publish_checkpoint(
            uri,
            record,
            grown,
            vocabulary=vocabulary.hash,
            tokens=corpus.token_settings,
            counts=counts,
            untrained=untrained,
        )
        _track_model(settings, tracked, uri, done, corpus)
    return uri


def _track_model(
    settings: Config, tracked: mlflow_runs.Run, uri: str, done: artifacts.Record, corpus: Corpus
) -> None:  # fmt: skip
    """Log the corpus that the weights are for, and the encoder as a model."""
    tracked.corpus(corpus.uri, "vocabulary")
    card = model_card.encoder(done, corpus.record, {})
    tracked.model("encoder", packaged_model.encoder(uri, corpus.uri, card), register=settings.tracking.register)


def bring(settings: Config, folder: str) -> str:
    """`mixgf import-weights`: a published model as the checkpoint of a run, for the corpus of that run; returns its URI.

    One of ours: see `grow`.
    """
    if artifacts.find(folder) is not None:
        return grow(settings, folder)
    uri = files.join(settings.output, "pretrain")
    corpus = Corpus(settings.inputs.corpus or files.join(settings.output, "corpus"))
    published, dictionary = read_pretrained(folder), find_dictionary(settings, folder)
    if corpus.cls and "<cls>" not in dictionary.specials:
        msg = "tokens.cls = true: this model knows no <cls>; prepare the corpus with --set tokens.cls=false"
        raise UserError(msg)
    if "<cls>" in dictionary.specials and not corpus.cls:
        warn(
            "import-weights: this model has <cls> before every sentence, the corpus has not (prepare --set tokens.cls=true)"
        )
    chosen = {
        "weights": published.sha256, "dictionary": files.sha256(dictionary.uri), "seed": settings.seed,
        "model": to_dict(published.sizes),
    }  # fmt: skip
    record = artifacts.plan(checkpoint.KIND, checkpoint.SCHEMA, chosen, {"corpus": corpus.record.fingerprint})
    model, counts, untrained = remap_to_vocabulary(
        published, dictionary, corpus.vocabulary, settings.species, settings.seed
    )
    if not artifacts.begin(uri, record):
        say(f"import-weights: {uri} is already there")
        return uri
    with mlflow_runs.stage(settings, "import-weights", chosen, record.fingerprint) as tracked:
        for name, found in counts.items():
            total = len(corpus.vocabulary.species_genes(name).genes)
            tracked.log({f"genes/{name}": found})
            tell = say if found > total / 2 else warn
            tell(
                f"import-weights: {name}: {found:,} of {total:,} genes have the model's vectors, the others random ones"
            )
        done = checkpoint.publish_checkpoint(
            uri, record, model, vocabulary=corpus.vocabulary.hash, tokens=corpus.token_settings,
            counts={"steps": 0, **{f"genes_{name}": found for name, found in counts.items()}},
            untrained=untrained[untrained >= NUM_SPECIALS],
        )  # fmt: skip
        _track_model(settings, tracked, uri, done, corpus)
    for line in CONVENTIONS:
        warn(f"import-weights: {line}")
    return uri
