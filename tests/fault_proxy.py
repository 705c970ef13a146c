"""A proxy on loopback between an S3 client and an S3 server that counts what passes, and breaks it by rule.

It forwards HTTP/1.1 with the client's own `Host`, so signatures stay valid. A rule names requests (a pattern over
"METHOD /bucket/key") and says which of them, counted from 1 in the order in which they come, meet its fault. The counters
make a test deterministic; nothing depends on a clock.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

_SLOW_DOWN = (
    b"<?xml version='1.0' encoding='UTF-8'?>"
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_INTERNAL = (
    b"<?xml version='1.0' encoding='UTF-8'?>"
    b"<Error><Code>InternalError</Code><Message>We encountered an internal error. Please try again.</Message></Error>"
)


def always(_: int) -> bool:
    return True


def first(n: int) -> Callable[[int], bool]:
    return lambda i: i <= n


def every(n: int) -> Callable[[int], bool]:
    """The n-th, 2n-th, ... request: a client that asks again has luck if n > 1."""
    return lambda i: i % n == 0


@dataclass
class Rule:
    """One fault.

    `drop`: the connection is reset before an answer; `lose`: the request reaches the server, its answer is lost; `break`:
    half of the body, then a reset; `cut`: the header promises all bytes, the connection ends in good order after half;
    `short`: half of the body, and a header that says so; `busy`: 503 SlowDown; `error`: 500 InternalError;
    `stall`: half of the body, then silence of `seconds`; `delay`: an answer after `seconds`;
    `hold`: the request waits, unforwarded, until the test says `go`, and is then dropped.
    """

    kind: str
    match: str
    when: Callable[[int], bool] = always
    seconds: float = 0.0
    seen: int = 0
    """Requests that matched."""
    hits: int = 0
    """Requests that met the fault."""
    on_hit: Callable[[], object] = lambda: None
    held: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Passed:
    """One request that was forwarded."""

    what: str
    range: str
    status: int
    sent: int
    """Bytes of the body that the client got."""
    region: str
    """What the request is signed for; empty for a request without a signature."""
    payer: str = ""
    """Who pays for the request, where not the owner of the bucket."""


@dataclass
class Proxy:
    upstream: str
    """host:port of the S3 server."""
    rules: list[Rule] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def __enter__(self) -> Self:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fresh(self, *rules: Rule) -> list[Rule]:
        """Other rules, and nothing counted yet."""
        with self.lock:
            self.rules, self.passed = list(rules), []
        return self.rules

    def fault(self, what: str) -> Rule | None:
        with self.lock:
            for rule in self.rules:
                if re.search(rule.match, what):
                    rule.seen += 1
                    if rule.when(rule.seen):
                        rule.hits += 1
                        return rule
        return None

    def body_bytes(self, match: str) -> int:
        """Bytes of the bodies of GETs that match."""
        return sum(p.sent for p in self.passed if p.what.startswith("GET ") and re.search(match, p.what))


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do(self) -> None:
        what = f"{self.command} {self.path}"
        body = self._body()
        rule = self.proxy.fault(what)
        kind = rule.kind if rule else ""
        if kind == "hold":
            rule.held.set()
            rule.go.wait(300)
        if kind in ("drop", "hold"):
            return self._reset()
        if kind == "busy":
            return self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN, len(_SLOW_DOWN))
        if kind == "error":
            return self._answer(500, {"Content-Type": "application/xml"}, _INTERNAL, len(_INTERNAL))
        if rule:
            rule.on_hit()
        if kind == "delay":
            time.sleep(rule.seconds)
        answer, data = self._forward(body)
        if kind == "lose":
            return self._reset()
        promised = int(answer.headers.get("Content-Length") or len(data))
        headers = {
            name: value
            for name, value in answer.headers.items()
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "keep-alive")
        }
        part = data[: len(data) // 2] if kind in ("break", "cut", "short", "stall") and data else data
        if kind == "short":
            promised = len(part)
        with self.proxy.lock:
            region = (self.headers.get("Authorization", "").split("/s3/aws4_request")[0].split("/") or [""])[-1]
            payer = self.headers.get("x-amz-request-payer", "")
            self.proxy.passed.append(
                Passed(what, self.headers.get("Range", ""), answer.status, len(part), region, payer)
            )
        self._answer(answer.status, headers, part, promised)
        if part is not data and kind != "short":
            if kind == "stall":
                time.sleep(rule.seconds)
            self._reset() if kind == "break" else self._end()
        return None

    do_GET = do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = do

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", "transfer-encoding", "content-length"):
                    upstream.putheader(name, value)
            if self.command in ("PUT", "POST") or body:
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        return answer, data

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], part: bytes, promised: int) -> None:
        try:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(promised))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(part)
        except OSError:
            self.close_connection = True  # the client went away

    def _end(self) -> None:
        self.close_connection = True
        self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # at once, not when the last of its files is closed
