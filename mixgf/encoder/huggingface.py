"""Weights of Hugging Face BERT models (published Geneformer models): import and export of names, ids and tensors."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from mixgf.config import parse, training
from mixgf.config.data import SpeciesRow
from mixgf.config.run import Config
from mixgf.console import warn
from mixgf.corpus.remap_ids import token_of_id
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.genes import species
from mixgf.genes.token_dictionaries import PICKLE_ERRORS, TokenDictionary, genes_of_species, read_token_dictionary
from mixgf.genes.vocabulary import CLS, MASK, PAD, SPECIALS, Vocabulary
from mixgf.storage import files

_LAYER = {
    "out": "attention.output.dense", "norm_attention": "attention.output.LayerNorm", "up": "intermediate.dense",
    "down": "output.dense", "norm_ffn": "output.LayerNorm",
}  # fmt: skip
_HEAD = {"dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm"}


def to_bert(model: MaskedModel) -> dict[str, Tensor]:
    """State dict of the equivalent Hugging Face `BertForMaskedLM` (one token type, with a zero embedding)."""
    own = {k: v.detach() for k, v in model.named_parameters()}
    dim = model.encoder.sizes.dim
    out = {
        "bert.embeddings.word_embeddings.weight": own["encoder.tokens"],
        "bert.embeddings.position_embeddings.weight": own["encoder.positions"],
        "bert.embeddings.token_type_embeddings.weight": torch.zeros(1, dim, device=own["encoder.tokens"].device),
        "cls.predictions.bias": own["bias"],
        "cls.predictions.decoder.weight": own["encoder.tokens"],
        "cls.predictions.decoder.bias": own["bias"],
    }
    for kind in ("weight", "bias"):
        out[f"bert.embeddings.LayerNorm.{kind}"] = own[f"encoder.norm.{kind}"]
        for ours, theirs in _HEAD.items():
            out[f"{theirs}.{kind}"] = own[f"{ours}.{kind}"]
        for i in range(model.encoder.sizes.num_layers):
            layer = f"bert.encoder.layer.{i}"
            parts = own[f"encoder.layers.{i}.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                out[f"{layer}.attention.self.{name}.{kind}"] = part
            for ours, theirs in _LAYER.items():
                out[f"{layer}.{theirs}.{kind}"] = own[f"encoder.layers.{i}.{ours}.{kind}"]
    return out


def from_bert(state: Mapping[str, Tensor], sizes: training.Model) -> dict[str, Tensor]:
    """Parameters of a `MaskedModel` from the state dict of a Hugging Face `BertForMaskedLM` or `BertModel` (no head).

    The first token-type embedding is added to every position. Names may have the prefix `bert.` or not.
    """
    given = {k.removeprefix("bert."): v.float() for k, v in state.items()}
    try:
        out = {
            "encoder.tokens": given["embeddings.word_embeddings.weight"],
            "encoder.positions": given["embeddings.position_embeddings.weight"]
            + given["embeddings.token_type_embeddings.weight"][0],
        }
        for kind in ("weight", "bias"):
            out[f"encoder.norm.{kind}"] = given[f"embeddings.LayerNorm.{kind}"]
            for i in range(sizes.num_layers):
                layer = f"encoder.layer.{i}"
                parts = [given[f"{layer}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
                out[f"encoder.layers.{i}.qkv.{kind}"] = torch.cat(parts)
                for ours, theirs in _LAYER.items():
                    out[f"encoder.layers.{i}.{ours}.{kind}"] = given[f"{layer}.{theirs}.{kind}"]
            for ours, theirs in _HEAD.items():
                if f"{theirs}.{kind}" in given:
                    out[f"{ours}.{kind}"] = given[f"{theirs}.{kind}"]
    except KeyError as error:
        msg = f"weights without {error.args[0]!r}: need a BERT with at least {sizes.num_layers} layers"
        raise UserError(msg) from None
    if "cls.predictions.bias" in given:
        out["bias"] = given["cls.predictions.bias"]
    return out


TOKENS = "encoder.tokens"
DICTIONARIES = ("token_dictionary.json", "token_dictionary.pkl")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CONFIG_FIELDS = {
    "num_layers": "num_hidden_layers", "dim": "hidden_size", "num_heads": "num_attention_heads", "ffn_dim": "intermediate_size",
    "max_positions": "max_position_embeddings", "activation": "hidden_act", "dropout": "hidden_dropout_prob",
    "norm_eps": "layer_norm_eps", "init_sd": "initializer_range",
}  # fmt: skip
"""Fields of `training.Model` and their Hugging Face names. Attention dropout is not imported: fused kernels need 0."""

CONVENTIONS = (
    "layer -1 is the last one here; the Geneformer family calls the second last so: take second_last, -2 (embed.layer, perturb.layer)",
    "a cell is the mean over its genes; poolers and projection heads are not imported (embed.pooling=first is what a pooler reads)",
)
"""Where published models read vectors in another way: lines for their users."""


@dataclass(frozen=True, slots=True)
class PretrainedBert:
    """A Hugging Face BERT from its folder, with the names of `MaskedModel` and its own token ids."""

    sizes: training.Model
    tensors: dict[str, Tensor]
    """Parameters, float32; without those of the masked-gene head if the model has none."""
    sha256: str
    """SHA-256 of the weights' file."""


def read_pretrained(folder: str) -> PretrainedBert:
    """Read a folder that Hugging Face's `save_pretrained` wrote.

    Raises:
        UserError: no such folder, not a BERT with absolute positions and tied embeddings, or a damaged file.
    """
    if not files.is_folder(folder) or "config.json" not in files.list_dir(folder):
        msg = f"{folder}: no folder with a config.json; give one with config.json and {' or '.join(WEIGHT_FILES)}"
        raise UserError(msg)
    sizes = _read_sizes(folder)
    names = [name for name in WEIGHT_FILES if name in files.list_dir(folder)]
    if not names:
        msg = f"{folder}: no weights in it; there must be {' or '.join(WEIGHT_FILES)} (several files: save it again as one)"
        raise UserError(msg)
    uri = files.join(folder, names[0])
    data = files.read_bytes(uri)
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
    tensors = from_bert(state, sizes)
    if tensors[TOKENS].shape[1:] != (sizes.dim,):
        msg = f"{uri}: vectors of width {tensors[TOKENS].shape[-1]}, config.json says {sizes.dim}; they are of different models"
        raise UserError(msg)
    return PretrainedBert(sizes, tensors, files.sha256(uri))


def _read_sizes(folder: str) -> training.Model:
    where = files.join(folder, "config.json")
    try:
        given: Any = files.read_json(where)
    except ValueError as error:
        msg = f"{where}: not JSON ({error}); fetch it again"
        raise UserError(msg) from None
    kind = given.get("model_type") if isinstance(given, dict) else None
    positions = given.get("position_embedding_type") or "absolute" if isinstance(given, dict) else ""
    if kind != "bert" or positions != "absolute":
        msg = f"{where}: model_type {kind!r} with {positions or 'no'} positions; only 'bert' with absolute positions can be imported"
        raise UserError(msg)
    lacking = [theirs for theirs in list(CONFIG_FIELDS.values())[:6] if theirs not in given]
    if lacking:
        msg = f"{where}: no {lacking[0]}; fetch it again"
        raise UserError(msg)
    sizes = {ours: given[theirs] for ours, theirs in CONFIG_FIELDS.items() if theirs in given}
    try:
        return parse.from_dict(training.Model, sizes)
    except UserError as error:
        msg = f"{where}: {error}"
        raise UserError(msg) from None


def find_dictionary(settings: Config, folder: str) -> TokenDictionary:
    """Token dictionary of a model: the one of `imports.dictionaries`, else the one in its folder."""
    uris = list(dict.fromkeys(settings.imports.dictionaries.values()))
    if len(uris) > 1:
        msg = f"imports.dictionaries: {len(uris)} files; a model has one dictionary, give that one"
        raise UserError(msg)
    inside = [files.join(folder, name) for name in DICTIONARIES if name in files.list_dir(folder)]
    if not uris + inside:
        msg = f"imports.dictionaries: none given and no {' or '.join(DICTIONARIES)} in {folder}; set it to the model's token dictionary"
        raise UserError(msg)
    return read_token_dictionary((uris + inside)[0], "imports.dictionaries")


def remap_to_vocabulary(
    pretrained: PretrainedBert,
    dictionary: TokenDictionary,
    vocabulary: Vocabulary,
    rows: tuple[SpeciesRow, ...],
    seed: int,
) -> tuple[MaskedModel, dict[str, int], np.ndarray]:
    """Model with the pretrained embeddings at the ids of another vocabulary.

    A gene that the pretrained model lacks has a random embedding, drawn with `seed` as for a new model.

    Args:
        pretrained: the pretrained model.
        dictionary: its token dictionary.
        vocabulary: the vocabulary of the result.
        rows: all species.
        seed: of the random embeddings.

    Returns:
        The model, the number of genes with a pretrained embedding by species, and the ids without one.

    Raises:
        UserError: the dictionary belongs to another model, or shares no gene with the vocabulary.
    """
    theirs = pretrained.tensors[TOKENS]
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
        genes = vocabulary.species_genes(name)
        table = token_of_id(dictionary, genes_of_species(dictionary.genes, name, rows, known), genes)
        ids = np.flatnonzero(table >= 0)
        counts[name] = len(ids)
        fresh = ids[source[table[ids]] < 0]  # a token that two species share keeps the vector of the first
        source[table[fresh]] = fresh
    if not any(counts.values()):
        msg = f"imports.dictionaries = {dictionary.uri!r}: none of its genes is in the corpus' vocabulary; another species?"
        raise UserError(msg)
    return place_embeddings(pretrained, source, seed), counts, np.flatnonzero(source < 0)


def place_embeddings(pretrained: PretrainedBert, source_V: np.ndarray, seed: int) -> MaskedModel:
    """Model whose id v has the embedding and bias of pretrained id `source_V[v]`; -1 = random, drawn with `seed`."""
    model = MaskedModel(pretrained.sizes, len(source_V), seed=seed)
    theirs, bias = pretrained.tensors[TOKENS], pretrained.tensors.get("bias")
    at = np.flatnonzero(source_V >= 0)
    own = dict(model.named_parameters())
    tensors = {name: own[name].detach().clone() for name in (TOKENS, "bias")}
    tensors[TOKENS][at] = theirs[source_V[at]]
    if bias is not None:
        tensors["bias"][at] = bias[source_V[at]]
    heads = {name for name in own if not name.startswith("encoder.")} - pretrained.tensors.keys()
    if heads:
        warn("import-weights: these weights have no masked-gene head; it starts untrained")
    untrained = {name: own[name] for name in heads}
    checkpoint.load_weights(model, untrained | pretrained.tensors | tensors, "import-weights")
    return model
