"""The few system calls that Python 3.11 has no name for. Every failure is an OSError that names what was tried."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
PR_SET_PDEATHSIG = 1
_SYS_PIVOT_ROOT = 155  # x86_64
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h
_PIT_CHANNEL_0, _PIT_MODE = 0x40, 0x43
_OUTB = b"\x89\xfa\x89\xf0\xee\xc3"  # mov edx, edi; mov eax, esi; out dx, al; ret
_SIOCSIFHWADDR, _ARPHRD_ETHER = 0x8924, 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    _check(
        _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount {source} on {target}",
    )


def unmount(target: str, flags: int = 0) -> None:
    _check(_libc.umount2(target.encode(), flags), f"umount {target}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def pivot_root_here() -> None:
    """Make the working directory, a mount point, the root; the old root is let go."""
    _check(_libc.syscall(_SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    unmount(".", MNT_DETACH)
    os.chdir("/")


def die_with_parent(signal: int) -> None:
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def reseed(random: int, entropy: bytes) -> None:
    """Mix `entropy` into the kernel's pool and rekey its generator now, not at its next turn a minute later.

    random: a descriptor of /dev/random. RNDADDENTROPY alone does not rekey a generator that is already seeded.
    Source: random(4).
    """
    fcntl.ioctl(random, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
    fcntl.ioctl(random, _RNDRESEEDCRNG, 0)


def stop_interval_timer() -> None:
    """Silence the old interval timer (PIT), which firmware leaves ticking 18 times a second for a kernel that uses the APIC's.

    An emulator wakes for each edge of it, in every idle sandbox. Channel 0, mode 0 (one shot), count 0, as the kernel's own
    pit_shutdown() writes it where it has used that timer. Raises OSError.
    """
    _check(_libc.ioperm(ctypes.c_ulong(_PIT_CHANNEL_0), ctypes.c_ulong(4), 1), "ioperm")
    try:
        with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(_OUTB)
            code = ctypes.c_char.from_buffer(page)
            outb = ctypes.CFUNCTYPE(None, ctypes.c_uint, ctypes.c_uint)(ctypes.addressof(code))
            for port, value in ((_PIT_MODE, 0x30), (_PIT_CHANNEL_0, 0), (_PIT_CHANNEL_0, 0)):
                outb(port, value)
            del code
    finally:
        _check(_libc.ioperm(ctypes.c_ulong(_PIT_CHANNEL_0), ctypes.c_ulong(4), 0), "ioperm")


def set_mac(wire: socket.socket, interface: str, mac: bytes) -> None:
    """Give a network interface another address, up as it is. One that the user has taken away has none to change."""
    try:
        fcntl.ioctl(wire, _SIOCSIFHWADDR, struct.pack("16sH6s8x", interface.encode(), _ARPHRD_ETHER, mac))
    except OSError as exc:
        if exc.errno != errno.ENODEV:
            raise
