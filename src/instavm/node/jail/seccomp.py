"""The system calls that a jailed VMM may make: a list, compiled by libseccomp; every other one fails with EPERM.

QEMU's own policy (`-sandbox`) comes on top of it and takes away more, such as starting programs. This one holds for
whatever runs in the jail, from before the VMM's first instruction. The list is what QEMU was seen to do over boot, save,
restore and work, and its close relatives (docs/decisions/0006-jail.md).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
import tempfile

from instavm.errors import HostNotReady

LIBRARY = "libseccomp.so.2"

_ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek
open openat close close_range dup dup2 dup3 fcntl flock fstat stat lstat newfstatat statx statfs fstatfs
access faccessat faccessat2 readlink readlinkat getcwd getdents64 chdir fchdir umask
ftruncate fallocate fsync fdatasync sync_file_range fadvise64 copy_file_range unlink
poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2 signalfd4 pipe2
timerfd_create timerfd_settime timerfd_gettime timer_create timer_settime timer_gettime timer_getoverrun timer_delete
listen accept accept4 recvmsg sendmsg recvfrom sendto recvmmsg sendmmsg shutdown getsockname getpeername getsockopt setsockopt
mmap munmap mremap mprotect madvise brk mincore mlock munlock msync membarrier memfd_create
futex set_robust_list get_robust_list rseq set_tid_address sched_yield sched_getaffinity sched_setaffinity
sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait rt_sigpending rt_sigsuspend sigaltstack restart_syscall
tgkill tkill gettid getpid getppid getpgrp getuid geteuid getgid getegid getgroups getresuid getresgid
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getitimer setitimer alarm pause
get_mempolicy set_mempolicy
ioctl getrandom uname sysinfo getrlimit getrusage times getcpu arch_prctl prctl seccomp capget
exit exit_group wait4 waitid
execve setuid setgid setgroups setresuid setresgid setreuid setregid capset
"""
"""The last line is what setpriv needs to become the VMM without rights; without capabilities none of it gains anything,
and there is no other program in the jail to execute."""

FILTER = ("socketpair", "connect", "bind")
"""What the egress filter does beyond that, with sockets of `FILTER_SOCKETS`; it makes no other ones."""
FILTER_SOCKETS = ((socket.AF_INET, None), (socket.AF_INET6, None), (socket.AF_NETLINK, socket.NETLINK_ROUTE))
"""Family, and the only protocol of it if not any. By the last one the kernel tells which addresses are the host's own."""
NOT_THE_FILTER = (
    *("execve", "setuid", "setgid", "setgroups", "setresuid", "setresgid", "setreuid", "setregid", "capset"),
    *("unlink", "ftruncate", "fallocate", "copy_file_range", "memfd_create", "accept", "signalfd4"),
)
"""What it has no use for: it is what it will be before its list is in force."""

API = ("socketpair", "rename", "renameat", "renameat2", "mkdir", "fchmod")
"""What the API's process does beyond that: its event loop's own wake-up, its log's rotation, SQLite."""

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000
_ACT_BADARCH = 2
_MASKED_EQ = 7
_EQ = 4
_CLONE_NEW = 0x7E020000
"""Every flag of clone() that makes a namespace."""


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


@functools.cache
def program(
    more: tuple[str, ...] = (), *, without: tuple[str, ...] = (), sockets: tuple[tuple[int, int | None], ...] = ()
) -> bytes:
    """The filter, as the kernel takes it (struct sock_filter[]).

    more, without: calls that may be made beyond a VMM's, and those of a VMM's that may not. sockets: that may be made,
    as `FILTER_SOCKETS`; a pair of sockets, where `more` has it, can only be of Unix ones. Raises HostNotReady.
    """
    library = _library()
    context = library.seccomp_init(_ERRNO | errno.EPERM)
    try:
        _check(library.seccomp_attr_set(context, _ACT_BADARCH, _KILL))
        for name in (*_ALLOWED.split(), *more):
            if name == "socketpair":
                _rule(library, context, _ALLOW, name, _Compare(0, _EQ, socket.AF_UNIX, 0))
            elif name not in without:
                _rule(library, context, _ALLOW, name)
        for family, protocol in sockets:
            only = () if protocol is None else (_Compare(2, _EQ, protocol, 0),)
            _rule(library, context, _ALLOW, "socket", _Compare(0, _EQ, family, 0), *only)
        # threads, but no namespaces; clone3's flags are out of a filter's sight, without it libc falls back to clone
        _rule(library, context, _ALLOW, "clone", _Compare(0, _MASKED_EQ, _CLONE_NEW, 0))
        _rule(library, context, _ERRNO | errno.ENOSYS, "clone3")
        _rule(library, context, _ALLOW, "prlimit64", _Compare(2, _EQ, 0, 0))  # limits may be asked for, not set
        with tempfile.TemporaryFile() as file:
            _check(library.seccomp_export_bpf(context, file.fileno()))
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def confine(filter_: bytes) -> None:
    """Put a filter in force for this process, which has one thread and has given up new privileges. Raises OSError."""
    instructions = ctypes.create_string_buffer(filter_, len(filter_))
    given = _Program(len(filter_) // 8, ctypes.addressof(instructions))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(given), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


def _rule(library: ctypes.CDLL, context: int, action: int, name: str, *comparisons: _Compare) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number == -1:
        raise HostNotReady(f"{LIBRARY} does not know the system call {name}; a newer libseccomp is needed")
    array = (_Compare * len(comparisons))(*comparisons)
    _check(library.seccomp_rule_add_array(context, action, number, len(comparisons), array))


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError as exc:
        raise HostNotReady(f"{LIBRARY} is missing; apt-get install libseccomp2") from exc
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint),
        ctypes.POINTER(_Compare),
    ]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library


def _check(status: int) -> None:
    if status < 0:
        raise HostNotReady(f"the system call filter can't be made: {os.strerror(-status)}")
