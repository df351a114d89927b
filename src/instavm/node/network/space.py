"""A network namespace with one end of a wire in it; the guest has the other end.

There is no route from it to anywhere: every packet is for the namespace itself, and the sockets in it belong to the
filter. It has no name. It lives as long as somebody holds something of it, which in the end is the VMM its tap, so it is
gone with the VMM whatever becomes of the server.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from instavm.errors import HostNotReady
from instavm.node.network import kernel_log, nft, rules
from instavm.node.network.addresses import GATEWAY, GATEWAY_MAC, PREFIX
from instavm.node.network.thread import LIBC, check, in_thread

log = logging.getLogger(__name__)
T = TypeVar("T")

TUN: Final = Path("/dev/net/tun")
CLONE_NEWNET: Final = 0x40000000
TUNSETIFF, TUNGETDEVNETNS = 0x400454CA, 0x54E3  # linux/if_tun.h
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IP_TRANSPARENT, IP_RECVORIGDSTADDR = 19, 20  # linux/in.h
ANY: Final = ""
SYS_PIDFD_GETFD: Final = 438
BACKLOG: Final = 256
OLD_SOCKETS_S: Final = 5.0
"""How long the sockets of a filter that ends may still be there when its successor takes over."""
SOCKETS: Final = ("connections", "names", "names_over_tcp", "datagrams", "answers", "refusals")
REFUSALS_BYTES: Final = 64 << 10


@dataclass(slots=True)
class Space:
    """`tap` is for the VMM to inherit and closed afterwards; `sockets` are for the filter, in the order of SOCKETS.

    kernel_log, filter_log: where kernel and filter tell of what they refuse. A kernel may have no such log.
    """

    fd: int
    tap: int = -1
    sockets: list[socket.socket] = field(default_factory=list)
    kernel_log: socket.socket | None = None
    filter_log: socket.socket | None = None

    def close_tap(self) -> None:
        if self.tap >= 0:
            os.close(self.tap)
            self.tap = -1

    def close(self) -> None:
        """Twice is fine."""
        self.close_tap()
        for one in (*self.sockets, self.kernel_log, self.filter_log):
            if one is not None:
                one.close()
        self.sockets = []
        self.kernel_log = self.filter_log = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def make() -> Space:
    """A new one, closed to everything. Blocking, some 10 ms. Raises HostNotReady."""
    return _translated(lambda: in_thread(_make))


def lacking() -> str | None:
    """What this host lacks to give sandboxes a network, in words; None when nothing. Tries it, within 2 ms."""

    def attempt() -> None:
        check(LIBC.unshare(CLONE_NEWNET), "unshare")
        os.close(_open_tap())
        nft.run(f"add table {rules.TABLE}")

    try:
        _translated(lambda: in_thread(attempt))
    except HostNotReady as exc:
        return str(exc)
    return None


def adopt(pid: int) -> Space | None:
    """The one whose tap the VMM process `pid` holds, closed to everything again; None: it has none. Raises HostNotReady."""
    return _translated(lambda: _adopt(pid))


def apply(space: Space, commands: str) -> str:
    """Run nft commands inside; what they answer. Raises HostNotReady."""
    return _translated(lambda: within(space, lambda: nft.run(commands)))


def within(space: Space, work: Callable[[], T]) -> T:
    """Do something inside."""

    def run() -> T:
        check(LIBC.setns(space.fd, CLONE_NEWNET), "setns")
        return work()

    return in_thread(run)


def _translated(work: Callable[[], T]) -> T:
    try:
        return work()
    except OSError as exc:
        raise HostNotReady(f"a sandbox's network could not be set up: {exc}") from exc


def _make() -> Space:
    check(LIBC.unshare(CLONE_NEWNET), "unshare")
    space = Space(os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
    try:
        space.tap = _open_tap()
        _close_ipv6()
        _address()
        space.kernel_log = _kernel_log()
        nft.run(rules.BASE if space.kernel_log is not None else rules.BASE_WITHOUT_LOG)
        space.sockets = _sockets()
        _tell_refusals(space)
    except BaseException:
        space.close()
        raise
    return space


def _open_tap() -> int:
    tap = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", rules.TAP.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except BaseException:
        os.close(tap)
        raise
    return tap


def _adopt(pid: int) -> Space | None:
    tap = _borrow_tap(pid)
    if tap is None:
        return None
    try:
        space = Space(fcntl.ioctl(tap, TUNGETDEVNETNS))
    finally:
        os.close(tap)
    try:
        within(space, lambda: nft.run(f"flush chain {rules.TABLE} allowed"))
        space.kernel_log = within(space, _kernel_log)
        space.sockets = within(space, _sockets_again)
        _tell_refusals(space)
    except BaseException:
        space.close()
        raise
    return space


def _borrow_tap(pid: int) -> int | None:
    """A copy of a process's descriptor of its tap, if it has one. Raises OSError."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if link.readlink() == TUN:
            pidfd = os.pidfd_open(pid)
            try:
                fd = int(LIBC.syscall(SYS_PIDFD_GETFD, pidfd, int(link.name), 0))
            finally:
                os.close(pidfd)
            check(min(fd, 0), "pidfd_getfd")
            return fd
    return None


def _close_ipv6() -> None:
    disable = Path("/proc/thread-self/net")  # there is no IPv6 on a host that was booted without it
    if (disable / "if_inet6").exists():
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")


def preload() -> None:
    """What takes a while to import, so that the first sandbox need not wait for it."""
    importlib.import_module("pyroute2")


def _address() -> None:
    from pyroute2 import IPRoute  # noqa: PLC0415 (0.2 s, see `preload`)

    with IPRoute() as route:
        (tap,) = route.link_lookup(ifname=rules.TAP)
        (loopback,) = route.link_lookup(ifname="lo")
        route.link("set", index=loopback, state="up")
        route.link("set", index=tap, address=GATEWAY_MAC, state="up")
        route.addr("add", index=tap, address=GATEWAY, prefixlen=PREFIX)
        # Every address is here: what the guest sends to anybody, the namespace receives itself.
        route.route("add", dst="0.0.0.0/0", type="local", oif=loopback, scope="host")


def _kernel_log() -> socket.socket | None:
    try:
        return kernel_log.listen()
    except OSError as exc:
        log.debug("this kernel does not tell of single packets that it refuses: %s", exc)
        return None


def _tell_refusals(space: Space) -> None:
    """A line from the filter to here. It never waits: what there is no room for is not told."""
    space.filter_log, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    space.sockets.append(theirs)
    space.filter_log.setblocking(False)
    theirs.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REFUSALS_BYTES)


def _sockets() -> list[socket.socket]:
    made: list[socket.socket] = []
    try:
        for kind, place in (
            (socket.SOCK_STREAM, (ANY, rules.TCP_PORT)),
            (socket.SOCK_DGRAM, (GATEWAY, 53)),
            (socket.SOCK_STREAM, (GATEWAY, 53)),
            (socket.SOCK_DGRAM, (ANY, rules.UDP_PORT)),
        ):
            one = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
            made.append(one)
            one.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
            if kind == socket.SOCK_STREAM:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                one.setsockopt(socket.SOL_IP, IP_RECVORIGDSTADDR, 1)
            one.bind(place)
            if kind == socket.SOCK_STREAM:
                one.listen(BACKLOG)
        made.append(socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW))
    except BaseException:
        for one in made:
            one.close()
        raise
    return made


def _sockets_again() -> list[socket.socket]:
    """Beside those of a filter that lost its server and is about to end."""
    deadline = time.monotonic() + OLD_SOCKETS_S
    while True:
        try:
            return _sockets()
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
