"""`export`: a trained encoder to a Hugging Face folder that `transformers` loads as `BertForMaskedLM`."""

from __future__ import annotations

from safetensors.torch import save as save_tensors

from mixgf.config.parse import to_dict
from mixgf.config.run import Config
from mixgf.console import say
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint, huggingface
from mixgf.encoder.bert import MaskedModel
from mixgf.encoder.huggingface import CONFIG_FIELDS, DICTIONARIES, WEIGHT_FILES
from mixgf.genes.vocabulary import PAD, SPECIALS, Vocabulary
from mixgf.stages.import_weights import SCHEMA
from mixgf.storage import artifacts, files


def export(settings: Config) -> str:
    """`mixgf export`: a checkpoint as a folder that `transformers` loads as `BertForMaskedLM`; returns its URI.

    Beside the weights lies token_dictionary.json, gene to id.
    """
    uri = files.join(settings.output, "bert")
    model, made = checkpoint.load_model(settings.inputs.checkpoint or files.join(settings.output, "pretrain"))
    corpus = Corpus(settings.inputs.corpus or files.join(settings.output, "corpus"))
    checkpoint.require_vocabulary(made, corpus.vocabulary.hash, f"{corpus.uri}, whose dictionary goes with it,")
    record = artifacts.plan("bert", SCHEMA, {}, {"checkpoint": made.fingerprint})
    if not artifacts.begin(uri, record):
        say(f"export: {uri} is already there")
        return uri
    artifacts.finish(uri, record, files=artifacts.checksums_of(uri, write_bert(model, corpus.vocabulary, uri)))
    return uri


def write_bert(model: MaskedModel, vocabulary: Vocabulary, to: str) -> list[str]:
    """Write a model as `transformers` reads it (`BertForMaskedLM`), with its token dictionary; returns names of files."""
    row = model.encoder.sizes
    sizes = {theirs: to_dict(row)[ours] for ours, theirs in CONFIG_FIELDS.items()} | {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": model.encoder.vocab_size, "pad_token_id": PAD,
        "attention_probs_dropout_prob": row.attention_dropout, "type_vocab_size": 1, "tie_word_embeddings": True,
        "position_embedding_type": "absolute", "dtype": "float32",
    }  # fmt: skip
    state = {
        k: v.cpu().contiguous()
        for k, v in huggingface.to_bert(model).items()
        if not k.startswith("cls.predictions.decoder")
    }
    files.write_bytes(files.join(to, WEIGHT_FILES[0]), save_tensors(state, metadata={"format": "pt"}))
    genes = zip(vocabulary.table["gene"].to_pylist(), vocabulary.table["token"].to_pylist(), strict=True)
    files.write_json(files.join(to, DICTIONARIES[0]), {name: i for i, name in enumerate(SPECIALS)} | dict(genes))
    files.write_json(files.join(to, "config.json"), sizes)
    return [WEIGHT_FILES[0], DICTIONARIES[0], "config.json"]
