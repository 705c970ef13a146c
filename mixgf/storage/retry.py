"""Retries of object storage requests, and one-line errors for what still fails.

botocore itself repeats requests without an answer (no connection, timeout, 429, 5xx). Two kinds of errors are left, and are
repeated here: an answer that breaks off, and a server that stays busy for longer. What fails after all retries becomes a
`StorageError` of one line. Tested against s3fs 2026.9 and aiobotocore 3.10, by `tests/storage/test_s3.py`.

Three layers retry, each what the one below cannot; no other layer does (s3fs's own retries are off):

| layer | repeats | after | times, pauses |
|---|---|---|---|
| botocore | one HTTP request | no connection, timeout, 429 or 5xx before the first byte of the answer | 3, at most 7 s |
| `with_retries` | one operation: read, write, list | an answer that breaks off, a server still busy | 3, 4.2 s |
| `RayExecutor` (Ray Data too), `ActorPool` | one task | a lost worker or node; an `OSError`, `StorageError` among them; in a pool any error | 3, none |

Repeating a task is safe because it writes one file, atomically and with the same bytes. A `LocalExecutor` does not repeat tasks.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

from mixgf import proxies
from mixgf.errors import AccessError, StorageError

T = TypeVar("T")

PAUSES = (0.2, 1.0, 3.0)
"""Seconds before each retry."""
_BUSY = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO)}  # what s3fs makes of 503 and of 500
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}


def with_retries(uri: str, call: Callable[[], T]) -> T:
    """Make a request to object storage, with retries after transient errors.

    Args:
        uri: Of the file, for messages.
        call: Makes the request.

    Raises:
        FileNotFoundError, FileExistsError: As with local files.
        AccessError: Keys, rights or the bucket's name are wrong; a retry would not help.
        StorageError: Any other failure of object storage or of the network.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError | FileExistsError) and error_code(error) != "NoSuchUpload":
                raise
            if pause is None or not is_transient(error):
                known = storage_error(uri, error)
                if known is None:
                    raise
                raise known from error
            time.sleep(pause)
    raise AssertionError


def is_transient(error: Exception) -> bool:
    """Whether a retry may succeed: the answer broke off, or the server is busy."""
    if _of_botocore(error, "ConnectionError"):
        return False  # no connection: botocore has retried already
    broken = isinstance(error, TimeoutError | ConnectionError | EOFError) or _of_clients(error, "aiohttp", "urllib3")
    if broken or (_of_clients(error) and _http_status(error) in (0, 408, 429, *range(500, 600))):
        return True
    if _of_botocore(error, "HTTPClientError", "IncompleteReadError"):
        return True
    if _of_botocore(error, "ClientError") and _status(error) >= 500:
        return True
    if error_code(error) == "NoSuchUpload":
        return True  # the answer to a completed upload was lost, or the upload was removed: write the whole file again
    return isinstance(error, OSError) and error.errno in _BUSY


def error_code(error: BaseException) -> str:
    """The S3 error code of an error of botocore or s3fs; "" if it has none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def endpoint() -> str:
    """URL of the S3 server that the environment names; empty for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def storage_error(uri: str, error: Exception) -> OSError | None:
    """The error with a one-line message that callers see; None for an error that is not of storage."""
    text = " ".join(str(error).split()) or type(error).__name__
    refusal = _permanent(uri, error)
    if refusal:
        return AccessError(f"{uri}: {refusal[0]} ({text}); {refusal[1]}")
    if error_code(error) in ("404", "NoSuchKey", "NoSuchBucket"):
        return FileNotFoundError(f"{uri}: {text}")
    where = endpoint() or "AWS"
    if not uri.startswith("s3://"):
        where = uri.partition("/")[0] + "//"
    if error_code(error) in ("412", "PreconditionFailed"):
        text = f"{uri}: was written again while it was read; start again"
    elif _of_botocore(error, "ConnectionError"):
        proxy = proxies.hint(endpoint() or "https://s3.amazonaws.com", "the host of the store")
        text = f"{uri}: no connection to {where}; check AWS_ENDPOINT_URL and the network ({text}){proxy}"
    elif (
        isinstance(error, OSError | EOFError)
        or _of_botocore(error, "BotoCoreError", "ClientError")
        or _of_clients(error)
    ):
        text = f"{uri}: the request to {where} failed ({text}); the same command tries again"
    else:
        return None
    return StorageError(text)


def _permanent(uri: str, error: Exception) -> tuple[str, str] | None:
    """Reason and way out of an error that no retry can mend; None for another error."""
    if uri.startswith(("gs://", "az://")):
        denied = isinstance(error, PermissionError) or (_of_clients(error) and _http_status(error) in (401, 403))
        return (
            (
                "access denied",
                f"check the credentials of {uri[:2]}://, or set FSSPEC_GS_TOKEN=anon, FSSPEC_AZ_ANON=true for a public bucket",
            )
            if denied
            else None
        )
    if isinstance(error, PermissionError) or error_code(error) in _DENIED:
        return "access denied", "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and that key's rights"
    if _of_botocore(error, "NoCredentialsError", "PartialCredentialsError"):
        how = (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket, FSSPEC_S3_ANON=true"
        )
        return "no keys", how
    if _of_botocore(error, "ParamValidationError"):
        return "not a valid address", "an S3 address is s3://BUCKET/KEY"
    return None


def _of_botocore(error: Exception, *names: str) -> bool:
    """Whether an error is of these classes of botocore, by their names: botocore may be missing where no S3 is used."""
    return any(c.__module__ == "botocore.exceptions" and c.__name__ in names for c in type(error).__mro__)


def _status(error: Exception) -> int:
    """The HTTP status of botocore's `ClientError`."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])  # type: ignore[attr-defined]


def _http_status(error: Exception) -> int:
    """HTTP status of an error of gcsfs or Azure; 0 where there was no answer."""
    for name in ("code", "status_code"):
        if str(code := getattr(error, name, "")).isdigit():
            return int(code)
    return 0


def _of_clients(error: Exception, *packages: str) -> bool:
    """By their modules' names: aiohttp takes a third of a second to import.

    aiohttp and urllib3 raise only what they meet on the wire. botocore lets errors of urllib3 pass that it meets while it reads the
    text of an error, such as that of a missing file.
    """
    return type(error).__module__.partition(".")[0] in (packages or ("aiohttp", "urllib3", "gcsfs", "google", "azure"))
