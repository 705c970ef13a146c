"""Proxies of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY) on the way to a tracker.

MLflow sends its requests by `requests`, which takes a proxy for every host that NO_PROXY does not name, this machine included.
Ray's own connections take none. Object storage does as its clients do (botocore, fsspec).
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from mixgf.redact import redact

_NAMES = ("no_proxy", "NO_PROXY")
"""The first one wins where both are set."""


def go_past(uri: str) -> None:
    """Let requests to a server on this machine go past the proxy: only the machine itself can reach its loopback."""
    host = urlsplit(uri).hostname or ""
    if not _is_loopback(host) or proxy_of(uri) == "":
        return
    before = next((os.environ[name] for name in _NAMES if os.environ.get(name)), "")
    for name in _NAMES:
        os.environ[name] = ",".join(filter(None, (before, host)))


def proxy_of(uri: str) -> str:
    """The proxy that requests to a URI take, without its password; empty where they take none."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    found = getproxies()
    return redact(found.get(parts.scheme) or found.get("all") or "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
