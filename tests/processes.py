"""Servers that tests start."""

import shutil
import socket


def die_with_us(command):
    """The same command, killed by the kernel when this process ends, whatever ends it (where `setpriv` is there)."""
    return ["setpriv", "--pdeathsig", "KILL", *command] if shutil.which("setpriv") else command


def free_port():
    """A port on loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
