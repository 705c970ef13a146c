"""The encoders that classification models may use, by name.

"" is the run's own checkpoint. `untrained` is that checkpoint before training: token vectors by `model.start`, other weights random.
Further encoders are named in `classify.encoders` (`mlm=URI of a checkpoint`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mixgf.config.classification import Classify
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import Encoder
from mixgf.errors import UserError
from mixgf.storage import artifacts
from mixgf.storage.artifacts import Record

CHECKPOINT, UNTRAINED = "", "untrained"
"""Names of the run's own encoder and of the same one before training."""
EXPRESSION = "expression"
"""The space of 50 principal components of the variable genes, which stands beside those of encoders."""
_OWN_NAME = "trained"
"""Name of the run's own encoder in tables and folders."""
_RESERVED = (UNTRAINED, _OWN_NAME, EXPRESSION)
_UNTRAINED_SEED = 1_000_003


def space_name(encoder: str) -> str:
    """An encoder's name in tables and folders: `trained` for the run's own."""
    return encoder or _OWN_NAME


def named_uris(settings: Classify) -> dict[str, str]:
    """`classify.encoders` as name to URI.

    Raises:
        UserError: A name cannot be used, or has no URI.
    """
    for name, uri in settings.encoders.items():
        if not (uri and name.replace("_", "").isalnum()) or name in _RESERVED:
            msg = (f"classify.encoders: {name}={uri}: must be NAME=URI of a checkpoint, with a name of letters, digits and _ that "
                   f"is none of {', '.join(_RESERVED)}")  # fmt: skip
            raise UserError(msg)
    return dict(settings.encoders)


def records(checkpoint_uri: str, run: Config, corpus: Corpus, names: Iterable[str]) -> dict[str, Record]:
    """Records of the run's checkpoint ("") and of every encoder of `classify.encoders` among `names`.

    Raises:
        UserError: A checkpoint is not there, or was trained on other sentences than the corpus has.
    """
    uris = {CHECKPOINT: checkpoint_uri} | named_uris(run.classify)
    found: dict[str, Record] = {}
    for name in sorted({CHECKPOINT, *names} & set(uris)):
        found[name] = artifacts.require(uris[name], checkpoint.KIND, checkpoint.SCHEMA)
        checkpoint.require_sentences(found[name], corpus, _field(name, uris[name]))
    return found


def _field(name: str, uri: str) -> str:
    return f"classify.encoders: {name}={uri}" if name else "inputs.checkpoint"


def load(checkpoint_uri: str, encoder: str, run: Config, corpus: Corpus, device: torch.device | str = "cpu") -> Encoder:
    """An encoder by name.

    Args:
        checkpoint_uri: The run's checkpoint.
        encoder: "", `untrained` or a name in `classify.encoders`.
        run: The whole config.
        corpus: The cells that it will read.
        device: Where its weights are.

    Raises:
        UserError: The checkpoint was trained on other sentences than the corpus has.
    """
    others = named_uris(run.classify)
    uri = others.get(encoder, checkpoint_uri)
    if encoder == UNTRAINED:
        made, record = checkpoint.load_start(uri, seed=run.seed + _UNTRAINED_SEED, device=device)
    else:
        made, record = checkpoint.load_encoder(uri, device)
    checkpoint.require_sentences(record, corpus, _field(encoder if encoder in others else "", uri))
    return made
