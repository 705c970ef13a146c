"""The exceptions of mixgf, and the check for optional packages.

    ValueError
    └── UserError         input that cannot be used; the command ends with exit code 2
        └── DamagedError  a file that mixgf wrote is not what was written
    OSError
    └── StorageError      object storage or the network failed, after all retries; exit code 1
        └── AccessError   object storage denies access; exit code 2

Other exceptions are errors of the program. The command line prints each as one line, and the traceback with --debug.
"""

from __future__ import annotations

import errno
import os
from importlib.util import find_spec


class UserError(ValueError):
    """Input that cannot be used: one line with the field, its value, what is allowed and what to do."""


class DamagedError(UserError):
    """A file that mixgf wrote is not what was written, so no source is to blame."""


class StorageError(OSError):
    """A request to object storage failed after all retries. The stored files are not known to be damaged."""


class AccessError(StorageError):
    """Object storage denies access: keys, rights or the bucket's name are wrong. Finished work is kept."""


_FAULTS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "files may not be larger (ulimit -f)",
    errno.EROFS: "read-only file system",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files on this machine",
}
_FILES = "raise the limit (ulimit -n 4096), or use fewer workers (compute.num_workers)"
_SPACE = "free some, or choose another --output or TMPDIR"


def machine_fault(error: BaseException) -> str:
    """One line for a full disk or too few file handles behind an error, with the way out; empty for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        code = seen.errno if isinstance(seen, OSError) else None
        if code not in _FAULTS:  # libraries put the system's words into errors of their own
            code = next((one for one in _FAULTS if os.strerror(one) in str(seen)), None)
        if code is not None:
            name = getattr(seen, "filename", None)
            way_out = _FILES if code in {errno.EMFILE, errno.ENFILE} else _SPACE
            return f"{name or 'the disk'}: {_FAULTS[code]}; {way_out}. Finished work is kept, and the same command continues"
        seen = seen.__cause__ or seen.__context__
    return ""


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
