"""UserError, StorageError, AccessError."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used. One line: field, value, what is allowed, way out."""


class StorageError(OSError):
    """Object storage, or the way to it, did not do what was asked, after patience. Nothing is wrong with what is stored."""


class AccessError(StorageError):
    """Object storage refuses: keys, rights, bucket. For the user to mend; no source is to blame, and no work is lost."""
