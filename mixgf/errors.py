"""UserError, StorageError, AccessError; `require_package` for packages that an installation may lack."""

from __future__ import annotations

from importlib.util import find_spec


class UserError(ValueError):
    """Something the user gave cannot be used. One line: field, value, what is allowed, way out."""


class StorageError(OSError):
    """Object storage, or the way to it, did not do what was asked, after patience. Nothing is wrong with what is stored."""


class AccessError(StorageError):
    """Object storage refuses: keys, rights, bucket. For the user to mend; no source is to blame, and no work is lost."""


def require_package(module: str, purpose: str, requirement: str) -> None:
    """Check that a package is installed, without importing it.

    Args:
        module: top-level module of the package, as in `import module`.
        purpose: what needs it: a field, a command or a URI scheme; first words of the message.
        requirement: what `pip install` installs it by, for example `mixgf[s3]`.

    Raises:
        UserError: it is not installed. The message says what to install.
    """
    if find_spec(module) is None:
        msg = f"{purpose}: needs the package {module}, which is not installed; run: pip install '{requirement}'"
        raise UserError(msg)
