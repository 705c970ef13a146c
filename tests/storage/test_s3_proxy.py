"""Object storage behind a proxy, as HTTP_PROXY, HTTPS_PROXY and NO_PROXY say. The store's name is known to the proxy alone."""

import contextlib
import datetime as dt
import http.client
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from processes import free_port

from mixgf.errors import StorageError
from mixgf.storage import files, retry, s3
from tests.field import make_cases
from tests.field.prepared import run_prepare

STORE = "minio.storage.svc.cluster.local"
"""A name of Kubernetes: moto takes the first word of most others for a bucket."""
NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


class ForwardProxy(BaseHTTPRequestHandler):
    """Sends requests of any host to the store: plain ones by their absolute URI, those of TLS through a tunnel (CONNECT)."""

    protocol_version = "HTTP/1.1"

    def forward(self):
        self.server.asked.append((self.command, urlsplit(self.path).netloc))
        size = int(self.headers.get("Content-Length", 0))
        store = http.client.HTTPConnection(*self.server.store)
        parts = urlsplit(self.path)
        store.request(
            self.command, parts._replace(scheme="", netloc="").geturl(), self.rfile.read(size), dict(self.headers)
        )
        answer = store.getresponse()
        body = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def do_CONNECT(self):
        """The tunnel ends here: its TLS is that of the store."""
        self.server.asked.append(("CONNECT", self.path))
        self.send_response_only(200)
        self.end_headers()
        with contextlib.suppress(OSError), socket.create_connection(self.server.store) as store:
            near = self.server.context.wrap_socket(self.connection, server_side=True)
            back = threading.Thread(target=pipe, args=(store, near), daemon=True)
            back.start()
            pipe(near, store)
            back.join()
        self.close_connection = True

    def log_message(self, *_):
        pass


def pipe(source, to):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key, and a certificate of the store's name that it signs itself."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, STORE)]),
    )
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - dt.timedelta(1)).not_valid_after(now + dt.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(STORE)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "store.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def proxy(s3_server, certificate):
    server = ThreadingHTTPServer(("127.0.0.1", 0), ForwardProxy)
    parts = urlsplit(s3_server)
    server.store, server.asked = (parts.hostname, parts.port), []
    server.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.context.load_cert_chain(certificate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def bucket(s3_server):
    """Name of a bucket that was made past any proxy."""
    keys = {"region_name": "us-east-1", "aws_access_key_id": "k", "aws_secret_access_key": "s"}
    name = f"behind-{time.monotonic_ns()}"
    boto3.client("s3", endpoint_url=s3_server, **keys).create_bucket(Bucket=name)
    return name


@pytest.fixture
def no_proxies(monkeypatch):
    for name in NAMES:
        for one in (name, name.lower()):
            monkeypatch.setenv(one, "")
            monkeypatch.delenv(one)
    s3.forget_connections()
    yield monkeypatch
    s3.forget_connections()


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("http", "HTTP_PROXY"), ("http", "http_proxy"), ("https", "HTTPS_PROXY"), ("https", "https_proxy")],
)
def test_a_store_is_read_and_written_through_the_proxy_of_the_environment(  # noqa: PLR0917 (parameters and fixtures)
    scheme, name, bucket, proxy, certificate, no_proxies, s3_settings, tmp_path
):
    make_cases.cells().write_h5ad(tmp_path / "in.h5ad")
    s3_settings(f"{scheme}://{STORE}")
    no_proxies.setenv(name, f"http://127.0.0.1:{proxy.server_address[1]}")
    no_proxies.setenv("NO_PROXY", "example.org")
    no_proxies.setenv("AWS_CA_BUNDLE", str(certificate))
    files.upload(tmp_path / "in.h5ad", f"s3://{bucket}/cells/in.h5ad")
    assert files.list_dir(f"s3://{bucket}/cells") == ["in.h5ad"]
    found = run_prepare(tmp_path / "run", f"human=s3://{bucket}/cells/in.h5ad")  # ranges of it
    assert (found.code, found.sums[:2]) == (0, (60, 25_262)), found.lines
    hosts = {host.removeprefix(f"{bucket}.").removesuffix(":443") for _, host in proxy.asked}
    assert hosts == {STORE}
    assert ("CONNECT" in {command for command, _ in proxy.asked}) == (scheme == "https")


def test_a_store_that_no_proxy_names_or_that_is_on_this_machine_is_reached_past_it(no_proxies, s3_server, s3_settings):
    for hosts in ("127.0.0.1", ""):
        s3_settings(s3_server)
        no_proxies.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")  # nothing listens there
        no_proxies.setenv("NO_PROXY", hosts)
        s3.forget_connections()
        assert not files.exists("s3://no-such-bucket/x")


def test_the_line_about_a_store_that_does_not_answer_names_the_proxy(no_proxies, s3_settings):
    from botocore.exceptions import EndpointConnectionError

    s3_settings(f"https://{STORE}")
    no_proxies.setenv("HTTPS_PROXY", "http://user:secret@proxy:3128")
    error = retry.storage_error("s3://b/x", EndpointConnectionError(endpoint_url=f"https://{STORE}"))
    assert isinstance(error, StorageError)
    assert str(error).endswith("; requests take the proxy http://***@proxy:3128: set NO_PROXY to the host of the store if it is in your own network")  # fmt: skip
    no_proxies.setenv("NO_PROXY", STORE)
    assert "proxy" not in str(retry.storage_error("s3://b/x", EndpointConnectionError(endpoint_url=f"https://{STORE}")))
