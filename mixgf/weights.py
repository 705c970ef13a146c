"""Published BERT checkpoints in (`mixgf import-weights`), ours out (`mixgf export`): Hugging Face folders on either side.

And our own checkpoints, grown to a vocabulary with more species (`grow`).

A folder is config.json and model.safetensors, or a pytorch_model.bin, which is read by torch's restricted reader (tensors
only). Published models of the family (Geneformer V1 and V2, Mouse-Geneformer) have ids of their own, given by a token
dictionary; the vectors of their genes move to the ids of a corpus' vocabulary. A corpus that was prepared with their medians
(`vocab.medians`) and `tokens.cls` as they had it then gives them the sentences they know, with one exception: sentences here
have no <eos>, which Geneformer V2 has at their ends.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mixgf import artifacts, checkpoint, config, species, storage, tracking
from mixgf.config import Config, UserError, split_named, to_dict
from mixgf.dataset import Corpus
from mixgf.dictionaries import PICKLE_ERRORS, Dictionary, genes_of, read_dictionary
from mixgf.interop import lookup
from mixgf.model import MaskedModel
from mixgf.progress import say, warn
from mixgf.vocab import CLS, MASK, NUM_SPECIALS, PAD, SPECIALS, Vocabulary

SCHEMA = 1
TOKENS = "encoder.tokens"
DICTIONARIES = ("token_dictionary.json", "token_dictionary.pkl")
_FILES = ("model.safetensors", "pytorch_model.bin")
_FIELDS = {
    "num_layers": "num_hidden_layers", "dim": "hidden_size", "num_heads": "num_attention_heads", "ffn_dim": "intermediate_size",
    "max_positions": "max_position_embeddings", "activation": "hidden_act", "dropout": "hidden_dropout_prob",
    "norm_eps": "layer_norm_eps", "init_sd": "initializer_range",
}  # fmt: skip
"""Ours by Hugging Face's name. Attention dropout is not imported: fused kernels want 0 (`model.attention_dropout`)."""


@dataclass(frozen=True, slots=True)
class Published:
    """A Hugging Face BERT as its folder has it, in our names and its ids."""

    row: config.Model
    tensors: dict[str, Tensor]
    """Our parameters, float32; those of the masked-gene head only if it has them."""
    sha256: str
    """Of the weights' file."""


def read(folder: str) -> Published:
    """Read a folder that Hugging Face's `save_pretrained` wrote.

    Raises:
        UserError: it is not there, no BERT that the encoder can hold, or damaged.
    """
    if not storage.is_folder(folder) or "config.json" not in storage.list_dir(folder):
        msg = f"{folder}: no folder with a config.json; give one with config.json and {' or '.join(_FILES)}"
        raise UserError(msg)
    row = _row(folder)
    names = [name for name in _FILES if name in storage.list_dir(folder)]
    if not names:
        msg = f"{folder}: no weights in it; there must be {' or '.join(_FILES)} (several files: save it again as one)"
        raise UserError(msg)
    uri = storage.join(folder, names[0])
    data = storage.read_bytes(uri)
    try:
        state = load_tensors(data) if uri.endswith(".safetensors") else torch.load(io.BytesIO(data), weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, *PICKLE_ERRORS) as error:
        msg = f"{uri}: not readable as tensors ({str(error).strip().splitlines()[0][:200]}); fetch it again"
        raise UserError(msg) from None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        msg = f"{uri}: holds something other than named tensors; save the model's state_dict"
        raise UserError(msg)
    tied, decoder = state.get("bert.embeddings.word_embeddings.weight"), state.get("cls.predictions.decoder.weight")
    if tied is not None and decoder is not None and not torch.equal(tied, decoder):
        msg = f"{uri}: its decoder is not tied to its embedding; only tied ones can be imported"
        raise UserError(msg)
    tensors = checkpoint.from_bert(state, row)
    if tensors[TOKENS].shape[1:] != (row.dim,):
        msg = f"{uri}: vectors of width {tensors[TOKENS].shape[-1]}, config.json says {row.dim}; they are of different models"
        raise UserError(msg)
    return Published(row, tensors, storage.sha256(uri))


def _row(folder: str) -> config.Model:
    where = storage.join(folder, "config.json")
    try:
        given: Any = storage.read_json(where)
    except ValueError as error:
        msg = f"{where}: not JSON ({error}); fetch it again"
        raise UserError(msg) from None
    kind = given.get("model_type") if isinstance(given, dict) else None
    positions = given.get("position_embedding_type") or "absolute" if isinstance(given, dict) else ""
    if kind != "bert" or positions != "absolute":
        msg = f"{where}: model_type {kind!r} with {positions or 'no'} positions; only 'bert' with absolute positions can be imported"
        raise UserError(msg)
    lacking = [theirs for theirs in list(_FIELDS.values())[:6] if theirs not in given]
    if lacking:
        msg = f"{where}: no {lacking[0]}; fetch it again"
        raise UserError(msg)
    sizes = {ours: given[theirs] for ours, theirs in _FIELDS.items() if theirs in given}
    try:
        return config.from_dict(config.Model, sizes)
    except UserError as error:
        msg = f"{where}: {error}"
        raise UserError(msg) from None


def find_dictionary(settings: Config, folder: str) -> Dictionary:
    """The token dictionary of a model: the one of `imports.dictionaries`, or the one in its folder."""
    uris = list(dict.fromkeys(uri for _, uri in map(split_named, settings.imports.dictionaries)))
    if len(uris) > 1:
        msg = f"imports.dictionaries: {len(uris)} files; a model has one dictionary, give that one"
        raise UserError(msg)
    inside = [storage.join(folder, name) for name in DICTIONARIES if name in storage.list_dir(folder)]
    if not uris + inside:
        msg = f"imports.dictionaries: none given and no {' or '.join(DICTIONARIES)} in {folder}; set it to the model's token dictionary"
        raise UserError(msg)
    return read_dictionary((uris + inside)[0], "imports.dictionaries")


def moved(
    published: Published, dictionary: Dictionary, vocabulary: Vocabulary, rows: tuple[config.SpeciesRow, ...], seed: int
) -> tuple[MaskedModel, dict[str, int], np.ndarray]:
    """The model with the vectors of its genes at the vocabulary's ids, how many genes of each species it knew, and the other ids.

    A gene that it did not know has a random vector of the key `seed`, as a new model has.

    Raises:
        UserError: the dictionary is of another model, or shares no gene with the vocabulary.
    """
    theirs = published.tensors[TOKENS]
    largest = max([*dictionary.genes.values(), *dictionary.specials.values()])
    if largest >= len(theirs):
        msg = f"imports.dictionaries = {dictionary.uri!r}: ids up to {largest:,}, but the model has {len(theirs):,}; name its own dictionary"
        raise UserError(msg)
    source = np.full(vocabulary.size, -1, dtype=np.int64)
    for name, ours in zip(SPECIALS, (PAD, MASK, CLS), strict=True):
        source[ours] = dictionary.specials.get(name, -1)
    known = {row.name: set(species.gene_table(row)["gene"].to_pylist()) for row in rows}
    counts = {}
    for name in vocabulary.species:
        genes = vocabulary.of(name)
        table = lookup(dictionary, genes_of(dictionary.genes, name, rows, known), genes)
        ids = np.flatnonzero(table >= 0)
        counts[name] = len(ids)
        fresh = ids[source[table[ids]] < 0]  # a token that two species share keeps the vector of the first
        source[table[fresh]] = fresh
    if not any(counts.values()):
        msg = f"imports.dictionaries = {dictionary.uri!r}: none of its genes is in the corpus' vocabulary; another species?"
        raise UserError(msg)
    return _placed(published, source, seed), counts, np.flatnonzero(source < 0)


def _placed(published: Published, source_V: np.ndarray, seed: int) -> MaskedModel:
    """The model with vectors and biases of its ids `source_V`; where that is -1, random ones of the key `seed`."""
    model = MaskedModel(published.row, len(source_V), seed=seed)
    theirs, bias = published.tensors[TOKENS], published.tensors.get("bias")
    at = np.flatnonzero(source_V >= 0)
    own = dict(model.named_parameters())
    tensors = {name: own[name].detach().clone() for name in (TOKENS, "bias")}
    tensors[TOKENS][at] = theirs[source_V[at]]
    if bias is not None:
        tensors["bias"][at] = bias[source_V[at]]
    heads = {name for name in own if not name.startswith("encoder.")} - published.tensors.keys()
    if heads:
        warn("import-weights: these weights have no masked-gene head; it starts untrained")
    untrained = {name: own[name] for name in heads}
    checkpoint.load_weights(model, untrained | published.tensors | tensors, "import-weights")
    return model


def grow(settings: Config, folder: str) -> str:
    """`mixgf import-weights` of a checkpoint of ours: the same for a corpus whose vocabulary was grown from that checkpoint's.

    Old ids keep their vectors, so old species' cells their embeddings. A new gene starts with the vector of its one-to-one
    ortholog, else with a random one; all new ids are untrained until `pretrain` (`inputs.start`) sees them.

    Raises:
        UserError: the vocabulary was not grown from the checkpoint's, or the sentences are of another kind.
    """
    uri = storage.join(settings.output, "pretrain")
    corpus = Corpus(settings.inputs.corpus or storage.join(settings.output, "corpus"))
    model, made = checkpoint.load_model(folder)
    vocabulary = corpus.vocabulary
    older = vocabulary.older(made.details["vocabulary"])
    if older is None:
        msg = f"{folder}: its vocabulary is no beginning of that of {corpus.uri}; prepare that with vocab.reuse = the vocabulary of this checkpoint"
        raise UserError(msg)
    checkpoint.require_tokens(made, corpus, f"{folder}:")
    pairs = species.orthologs(settings.vocab.orthologs)
    chosen = {"seed": settings.seed, "orthologs": [storage.sha256(table) for table in settings.vocab.orthologs]}
    parents = {"corpus": corpus.record.fingerprint, "grown from": made.fingerprint}
    record = artifacts.plan(checkpoint.KIND, checkpoint.SCHEMA, chosen, parents)
    if not artifacts.begin(uri, record):
        say(f"import-weights: {uri} is already there")
        return uri
    with tracking.stage(settings, "import-weights", chosen, record.fingerprint):
        source = vocabulary.models(older, pairs)
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        grown = _placed(Published(model.encoder.row, tensors, ""), source, settings.seed)
        counts: dict[str, Any] = {"steps": 0}
        for name in vocabulary.species[len(older.species) :]:
            tokens = vocabulary.species_tokens(name)
            own = tokens[tokens >= older.size]
            counts[f"genes_{name}"], counts[f"from_orthologs_{name}"] = len(tokens), int((source[own] >= 0).sum())
            say(
                f"import-weights: {name}: {len(tokens):,} genes; {len(tokens) - len(own):,} share an id, {counts[f'from_orthologs_{name}']:,} "
                f"start with their ortholog's vector, {int((source[own] < 0).sum()):,} with a random one"
            )
        untrained = np.concatenate([checkpoint.untrained(made), np.arange(older.size, vocabulary.size)])
        checkpoint.publish(
            uri, record, grown, vocabulary=vocabulary.hash, tokens=corpus.tokenised, counts=counts, untrained=untrained
        )
    return uri


def bring(settings: Config, folder: str) -> str:
    """`mixgf import-weights`: a published model as the checkpoint of a run, for the corpus of that run; returns its URI.

    One of ours: see `grow`.
    """
    if artifacts.find(folder) is not None:
        return grow(settings, folder)
    uri = storage.join(settings.output, "pretrain")
    corpus = Corpus(settings.inputs.corpus or storage.join(settings.output, "corpus"))
    published, dictionary = read(folder), find_dictionary(settings, folder)
    if corpus.cls and "<cls>" not in dictionary.specials:
        msg = "tokens.cls = true: this model knows no <cls>; prepare the corpus with --set tokens.cls=false"
        raise UserError(msg)
    if "<cls>" in dictionary.specials and not corpus.cls:
        warn(
            "import-weights: this model has <cls> before every sentence, the corpus has not (prepare --set tokens.cls=true)"
        )
    chosen = {
        "weights": published.sha256, "dictionary": storage.sha256(dictionary.uri), "seed": settings.seed,
        "model": to_dict(published.row),
    }  # fmt: skip
    record = artifacts.plan(checkpoint.KIND, checkpoint.SCHEMA, chosen, {"corpus": corpus.record.fingerprint})
    model, counts, untrained = moved(published, dictionary, corpus.vocabulary, settings.species, settings.seed)
    if not artifacts.begin(uri, record):
        say(f"import-weights: {uri} is already there")
        return uri
    with tracking.stage(settings, "import-weights", chosen, record.fingerprint) as tracked:
        for name, found in counts.items():
            total = len(corpus.vocabulary.of(name).genes)
            tracked.log({f"genes/{name}": found})
            tell = say if found > total / 2 else warn
            tell(
                f"import-weights: {name}: {found:,} of {total:,} genes have the model's vectors, the others random ones"
            )
        checkpoint.publish(
            uri, record, model, vocabulary=corpus.vocabulary.hash, tokens=corpus.tokenised,
            counts={"steps": 0, **{f"genes_{name}": found for name, found in counts.items()}},
            untrained=untrained[untrained >= NUM_SPECIALS],
        )  # fmt: skip
    return uri


def export(settings: Config) -> str:
    """`mixgf export`: a checkpoint as a folder that `transformers` loads as `BertForMaskedLM`; returns its URI.

    Beside the weights lies token_dictionary.json, gene to id.
    """
    uri = storage.join(settings.output, "bert")
    model, made = checkpoint.load_model(settings.inputs.checkpoint or storage.join(settings.output, "pretrain"))
    corpus = Corpus(settings.inputs.corpus or storage.join(settings.output, "corpus"))
    checkpoint.require_vocabulary(made, corpus.vocabulary.hash, f"{corpus.uri}, whose dictionary goes with it,")
    record = artifacts.plan("bert", SCHEMA, {}, {"checkpoint": made.fingerprint})
    if not artifacts.begin(uri, record):
        say(f"export: {uri} is already there")
        return uri
    row = model.encoder.row
    sizes = {theirs: to_dict(row)[ours] for ours, theirs in _FIELDS.items()} | {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": model.encoder.vocab_size, "pad_token_id": PAD,
        "attention_probs_dropout_prob": row.attention_dropout, "type_vocab_size": 1, "tie_word_embeddings": True,
        "position_embedding_type": "absolute", "dtype": "float32",
    }  # fmt: skip
    state = {
        k: v.cpu().contiguous()
        for k, v in checkpoint.to_bert(model).items()
        if not k.startswith("cls.predictions.decoder")
    }
    storage.write_bytes(storage.join(uri, _FILES[0]), save_tensors(state, metadata={"format": "pt"}))
    vocabulary = corpus.vocabulary
    genes = zip(vocabulary.table["gene"].to_pylist(), vocabulary.table["token"].to_pylist(), strict=True)
    storage.write_json(storage.join(uri, DICTIONARIES[0]), {name: i for i, name in enumerate(SPECIALS)} | dict(genes))
    storage.write_json(storage.join(uri, "config.json"), sizes)
    artifacts.finish(uri, record, files=artifacts.summed(uri, (_FILES[0], DICTIONARIES[0], "config.json")))
    return uri
