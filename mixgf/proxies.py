"""Proxies of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY) on the way to a tracker or to object storage.

The clients (requests, botocore) take a proxy for every host that NO_PROXY does not name, this machine included. Ray's own connections
take none.
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


def hint(uri: str, host: str) -> str:
    """What to say of a request to `uri` that got no answer: the proxy that it takes; empty where it takes none.

    `host` is what the server is called for the user, such as "the tracker's host".
    """
    proxy = proxy_of(uri)
    return f"; requests take the proxy {proxy}: set NO_PROXY to {host} if it is in your own network" if proxy else ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
