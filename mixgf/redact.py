"""Removal of secrets from text that is printed, logged or stored.

A config may name a tracking server or a database with a password in its URI. Messages, records, reports and MLflow hold the
text that `redact` returns.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
"""Stands in the place of a secret."""
_USER = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.\-]*://)[^\s/'\"<>]*@")
_NAMES = r"(?:access[_-]?)?token|password|passwd|pwd|secret|(?:secret|access|api|account)[_-]?key|apikey|sig|signature|x-amz-[a-z\-]+"
_PARAMETER = re.compile(rf"(?P<name>(?:[?&;]|\b)(?:{_NAMES})=)[^\s&;'\"<>]+", re.IGNORECASE)
_BEARER = re.compile(r"(?P<name>\b(?:bearer|basic) )[A-Za-z0-9._~+/\-]{8,}=*", re.IGNORECASE)
_KEY = re.compile(r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|hf_[A-Za-z0-9]{20,})\b")
_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
)
"""Variables of the environment that hold secrets."""
_SHORTEST = 6
"""Values of these variables are looked for from this length on: shorter ones occur in ordinary text."""


def redact(text: str) -> str:
    """The text without user names and passwords in URIs, secret parameters, keys, and secrets of the environment.

    JSON stays JSON: what is replaced never contains a quotation mark.
    """
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    text = _USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<name>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<name>{HIDDEN}", text)
    return _KEY.sub(HIDDEN, text)


def is_redacted(uri: str) -> bool:
    """Whether a URI has lost its password to `redact`, so that it opens nothing."""
    return f"://{HIDDEN}@" in uri or f"={HIDDEN}" in uri
