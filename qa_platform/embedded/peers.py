"""The user at the other end of a loopback connection. On Linux, ``/proc/net/tcp`` has the user of every socket."""

import ipaddress
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ROOT = 0
_NO_INODE = "0"
# Other systems do not tell the user of a connection.
TELLS_USERS = sys.platform.startswith("linux")
# The kernel writes the table in pieces, and may miss a socket if others close meanwhile.
_READS = 5


def is_trusted(client: tuple[str, int], server_port: int) -> bool:
    """Whether the process that opened a connection to this machine runs as this user, or as root.

    Args:
        client: the address and port of the other end.
        server_port: the port of this end.

    Returns:
        Always true on systems other than Linux, which do not tell the user.
    """
    if not TELLS_USERS:
        return True
    host, port = client
    ends = {f"{form}:{port:04X}" for form in _forms(host)}
    for _ in range(_READS):
        users = {user for local, remote, user in _sockets() if local in ends and remote.endswith(f":{server_port:04X}")}
        if users:
            return users <= {os.geteuid(), _ROOT}
    return False


def _sockets() -> Iterator[tuple[str, str, int]]:
    """(local address, remote address, user) of every TCP socket that a process holds.

    A socket that its process has closed stays in the table for a while, without an inode and with root as its user, whoever opened it.
    """
    for table in _TABLES:
        if table.exists():
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                if fields[9] != _NO_INODE:
                    yield fields[1], fields[2], int(fields[7])


def _forms(host: str) -> Iterator[str]:
    """An address as the kernel writes it, in words of the machine's byte order. IPv4 may arrive through an IPv6 socket."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        yield _words(address.packed)
        address = ipaddress.IPv6Address(f"::ffff:{address}")
    yield _words(address.packed)


def _words(packed: bytes) -> str:
    return "".join(f"{int.from_bytes(packed[at : at + 4], sys.byteorder):08X}" for at in range(0, len(packed), 4))
