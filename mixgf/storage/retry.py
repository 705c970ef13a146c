"""What of object storage's errors passes when one asks again, and what callers see of the rest.

botocore repeats requests that are not answered (no connection, a time limit, 429, 5xx). It leaves what happens after the
first byte of an answer, and servers that stay busy for longer. Those are tried again here, and what remains becomes a
`StorageError` of one line. Tested against s3fs 2026.9 and aiobotocore 3.10, by `tests/storage/test_s3.py`.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

from mixgf.errors import AccessError, StorageError

T = TypeVar("T")

PAUSES = (0.2, 1.0, 3.0)
"""Seconds before each further try."""
_BUSY = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO)}  # what s3fs makes of 503 and of 500
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}


def patiently(uri: str, call: Callable[[], T]) -> T:
    """Make a call of object storage, again where that may help.

    Raises:
        FileNotFoundError, FileExistsError: as local files do.
        AccessError: keys, rights or the bucket's name are wrong: asking again would not help.
        StorageError: anything else that object storage, or the way to it, did not do.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError | FileExistsError) and code(error) != "NoSuchUpload":
                raise
            if pause is None or not passes(error):
                known = fault(uri, error)
                if known is None:
                    raise
                raise known from error
            time.sleep(pause)
    raise AssertionError


def passes(error: Exception) -> bool:
    """Whether the same call may well succeed in a moment: its answer broke off, or the server is still busy."""
    if _of_botocore(error, "ConnectionError"):
        return False  # no connection at all: botocore has tried
    if isinstance(error, TimeoutError | ConnectionError | EOFError) or _of_aiohttp(error):
        return True
    if _of_botocore(error, "HTTPClientError", "IncompleteReadError"):
        return True
    if _of_botocore(error, "ClientError") and _status(error) >= 500:
        return True
    if code(error) == "NoSuchUpload":
        return True  # a completed upload whose answer was lost, or one cleaned away: write the whole again
    return isinstance(error, OSError) and error.errno in _BUSY


def code(error: BaseException) -> str:
    """The S3 error code of an error, of botocore or s3fs; "" if there is none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def fault(uri: str, error: Exception) -> OSError | None:
    """The one line that callers see of an error; None for an error that is not of storage."""
    text = " ".join(str(error).split()) or type(error).__name__
    refusal = _refusal(error)
    if refusal:
        return AccessError(f"{uri}: {refusal[0]} ({text}); {refusal[1]}")
    if code(error) in ("404", "NoSuchKey", "NoSuchBucket"):
        return FileNotFoundError(f"{uri}: {text}")
    where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    if code(error) in ("412", "PreconditionFailed"):
        text = f"{uri}: was written anew while it was read; start again"
    elif _of_botocore(error, "ConnectionError"):
        text = f"{uri}: no connection to {where}; check AWS_ENDPOINT_URL and the network ({text})"
    elif (
        isinstance(error, OSError | EOFError)
        or _of_botocore(error, "BotoCoreError", "ClientError")
        or _of_aiohttp(error)
    ):
        text = f"{uri}: {where} did not answer as it should ({text}); the same command tries again"
    else:
        return None
    return StorageError(text)


def _refusal(error: Exception) -> tuple[str, str] | None:
    """What object storage will not do however often it is asked, and the way out."""
    if isinstance(error, PermissionError) or code(error) in _DENIED:
        return "access denied", "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and that key's rights"
    if _of_botocore(error, "NoCredentialsError", "PartialCredentialsError"):
        return "no keys", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if _of_botocore(error, "ParamValidationError"):
        return "not an address that can be", "an S3 address is s3://BUCKET/KEY"
    return None


def _of_botocore(error: Exception, *names: str) -> bool:
    """Whether an error is of these classes of botocore, by their names: botocore may be missing where no S3 is used."""
    return any(c.__module__ == "botocore.exceptions" and c.__name__ in names for c in type(error).__mro__)


def _status(error: Exception) -> int:
    """The HTTP status of botocore's `ClientError`."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])  # type: ignore[attr-defined]


def _of_aiohttp(error: Exception) -> bool:
    """By its module's name: aiohttp takes a third of a second to import, and raises only what it meets on the wire."""
    return type(error).__module__.partition(".")[0] == "aiohttp"
