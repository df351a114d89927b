"""Which ports are the control plane's: those that this process itself serves."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from instavm.node.network.space import IP_TRANSPARENT


def own_ports() -> list[int]:
    """TCP ports that this process serves: the control plane's."""
    ports = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            if stat.S_ISSOCK(link.stat().st_mode):
                with socket.socket(fileno=os.dup(int(link.name))) as one:
                    ports |= _served(one)
        except OSError:
            continue  # closed meanwhile
    return sorted(ports)


def _served(one: socket.socket) -> set[int]:
    if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
        return set()
    if one.getsockopt(socket.SOL_IP, IP_TRANSPARENT) if one.family == socket.AF_INET else 0:
        return set()  # a sandbox's own
    try:
        one.getpeername()
    except OSError:
        return {one.getsockname()[1]}
    return set()
