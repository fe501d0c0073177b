"""Where the scheduler listens: a free port of this machine, or the address of another one that answers."""
from __future__ import annotations

import errno
import secrets
import socket
import time

from ms_diffsynth.errors import ConfigError, DeviceError

PORT = 8118  # msrun's, for jobs on several machines, where all must know it beforehand
# Below the ports that systems give to outgoing connections (from 32768 on Linux): between this check and the moment the
# scheduler listens, some seconds later, only another server could take it.
_FIRST, _COUNT = 20000, 12000


def resolve(address: str) -> str:
    """The number of a host name. Raises: ConfigError when the name is unknown."""
    try:
        return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"master_address={address}: no host has this name here ({why}). Give the number of the first "
                          "machine, such as 192.168.0.10.") from error


def free_port(address: str) -> int:
    """A port on which no process listens. Raises: ConfigError when ``address`` is not one of this machine."""
    for _ in range(100):
        port = _FIRST + secrets.randbelow(_COUNT)
        if _is_free(address, port):
            return port
    raise DeviceError(f"none of 100 ports from {_FIRST} to {_FIRST + _COUNT} is free. Give one by --master_port.")


def check_port(address: str, port: int) -> None:
    """Raises: ConfigError when the scheduler cannot listen there."""
    if not _is_free(address, port):
        raise ConfigError(f"master_port={port} is taken on {address}: another job, or another program, listens there. "
                          "Give another one, on every machine the same.")


def wait_for_scheduler(address: str, port: int, seconds: float) -> None:
    """Return when a process listens there. Raises: DeviceError when none does for this long."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                why = error.strerror or error
                raise DeviceError(f"no process listens on {address}:{port} after {seconds:g} s ({why}). Start the "
                                  "machine with --node_rank 0 first, give all machines its address and port, and let "
                                  "the port through its firewall.") from error
            time.sleep(0.5)


def _is_free(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what the last job left behind does not listen
        try:
            server.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"master_address={address} is not an address of this machine, but --node_rank 0 is. "
                                  "Give one of its own, or the --node_rank this machine has.") from error
            if error.errno == errno.EACCES:
                raise ConfigError(f"master_port={port}: ports below 1024 are the administrator's. Give a higher "
                                  "one.") from error
            return False
    return True
