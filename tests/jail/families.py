"""Runs in a process that is confined, and tells as JSON which kinds of sockets it can make."""

import ctypes
import json
import mmap
import os
import socket
import sys

FAMILIES = {
    "unix": 1, "inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "alg": 38, "vsock": 40, "xdp": 44,
    "can": 29, "tipc": 30, "bluetooth": 31, "rds": 21, "key": 15, "kcm": 41, "smc": 43, "qipcrtr": 42,
}
INT_80 = bytes.fromhex("b814000000cd80c3")
"""getpid as a 32-bit program asks for it: mov eax, 20; int 0x80; ret"""
X32 = 0x40000000 + 39


def made():
    """Families of which a socket can be made, and of which a pair."""
    found = []
    for protocol in range(1, 23):
        try:
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        except OSError:
            continue
        found.append(f"netlink {protocol}")
    for name, family in FAMILIES.items():
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            for make in (socket.socket, socket.socketpair):
                try:
                    make(family, kind)
                except OSError:
                    continue
                found.append(name if make is socket.socket else f"{name} pair")
    return sorted(set(found))


def ended_by(call):
    """The signal that ends a child which does that, or what it returned."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(into, str(call()).encode())
        os._exit(0)
    os.close(into)
    _, status = os.waitpid(pid, 0)
    return -os.waitstatus_to_exitcode(status) or os.read(out, 100).decode()


def as_32_bits():
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(INT_80)
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


def tell():
    x32 = ended_by(lambda: ctypes.CDLL(None).syscall(X32))
    uring = ctypes.CDLL(None, use_errno=True)
    ring = uring.syscall(425, 8, ctypes.create_string_buffer(120))
    print(json.dumps({"made": made(), "x32": x32, "i386": ended_by(as_32_bits), "io_uring": ring >= 0}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["filter"]:
        from instavm.node.network.filter.__main__ import _drop, _load

        _load()
        _drop()
    tell()
