"""The exceptions of mixgf, and the check for optional packages.

    ValueError
    └── UserError         input that cannot be used; the command ends with exit code 2
    OSError
    └── StorageError      object storage or the network failed, after all retries; exit code 1
        └── AccessError   object storage denies access; exit code 2

Other exceptions are errors of the program. The command line prints each as one line, and the traceback with --debug.
"""

from __future__ import annotations

from importlib.util import find_spec


class UserError(ValueError):
    """Input that cannot be used: one line with the field, its value, what is allowed and what to do."""


class StorageError(OSError):
    """A request to object storage failed after all retries. The stored files are not known to be damaged."""


class AccessError(StorageError):
    """Object storage denies access: keys, rights or the bucket's name are wrong. Finished work is kept."""


def require_package(module: str, purpose: str, requirement: str) -> None:
    """Check that a package is installed, without importing it.

    Args:
        module: Top-level module of the package, as in `import module`.
        purpose: The field, command or URI scheme that needs it; the message begins with it.
        requirement: Name for `pip install`, for example `mixgf[s3]`.

    Raises:
        UserError: The package is not installed. The message says what to install.
    """
    if find_spec(module) is None:
        msg = f"{purpose}: needs the package {module}, which is not installed; run: pip install '{requirement}'"
        raise UserError(msg)
