"""What the kernel refuses in a sandbox's namespace, told packet by packet as it happens (NFLOG).

linux/netfilter/nfnetlink_log.h; the library for it speaks to one namespace per process.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final

GROUP: Final = 7
NETLINK_NETFILTER: Final = 12
SOL_NETLINK, NETLINK_NO_ENOBUFS = 270, 5
CONFIG, PACKET = 4 << 8 | 1, 4 << 8 | 0
NLM_F_REQUEST, NLM_F_ACK, NLMSG_ERROR = 1, 4, 2
CFG_CMD, CFG_MODE, CFG_QTHRESH = 1, 2, 5
BIND, COPY_PACKET = 1, 2
PAYLOAD: Final = 9
HEADERS_MAX: Final = 64
"""Bytes of a packet that are told: the longest IP header, and two ports."""
BUFFER: Final = 64 << 10
PROTOCOLS: Final = {6: "tcp", 17: "udp"}


def listen() -> socket.socket:
    """For the namespace of the calling thread. Nobody need read it: what it has no room for is not told. Raises OSError."""
    line = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    try:
        line.bind((0, 0))
        line.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        mode = struct.pack("!IBB", HEADERS_MAX, COPY_PACKET, 0)
        attributes = _attribute(CFG_CMD, bytes([BIND])) + _attribute(CFG_MODE, mode)
        body = struct.pack("!BBH", 0, 0, GROUP) + attributes + _attribute(CFG_QTHRESH, struct.pack("!I", 1))
        line.send(struct.pack("=IHHII", 16 + len(body), CONFIG, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body)
        _, kind, _, _, _, error = struct.unpack_from("=IHHIIi", line.recv(4096))
        if kind != NLMSG_ERROR or error:
            raise OSError(-error, f"the kernel's log of packets: {os.strerror(-error)}")
        line.setblocking(False)
    except BaseException:
        line.close()
        raise
    return line


def read(data: bytes) -> Iterator[tuple[str, int, str]]:
    """Address, port and protocol of each packet that one message of the kernel tells of."""
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if length < 16:
            return
        if kind == PACKET:
            yield from _packet(data[20:length])
        data = data[length + 3 & ~3 :]


def _packet(attributes: bytes) -> Iterator[tuple[str, int, str]]:
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if length < 4:
            return
        if kind & 0x7FFF == PAYLOAD:
            yield from _destination(attributes[4:length])
        attributes = attributes[length + 3 & ~3 :]


def _destination(packet: bytes) -> Iterator[tuple[str, int, str]]:
    """The guest wrote it: it may be cut off, or no such thing at all."""
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return
    header, protocol = (packet[0] & 15) * 4, PROTOCOLS.get(packet[9])
    if protocol is not None and len(packet) >= header + 4:
        yield str(IPv4Address(packet[16:20])), int.from_bytes(packet[header + 2 : header + 4]), protocol


def _attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(content), kind) + content + b"\0" * (-len(content) % 4)
