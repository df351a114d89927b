"""A uid of its own for every VMM: no two that run on this host share one, whatever number of servers there are.

A lease is a byte locked in one file of the host (its offset is the uid's place in the range), so the kernel gives it back
however its server ends. A VMM that outlives its server still runs under its uid, so a uid under which anything runs is
never given out either.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import threading
from pathlib import Path

from instavm.errors import HostNotReady

_FLOCK = struct.Struct("hhqqi4x")


class Uids:
    """The uids `first` … `first + count - 1`, which nothing else on this host may use."""

    def __init__(self, first: int, count: int, locks: Path) -> None:
        self._first = first
        self._count = count
        self._held: set[int] = set()
        self._one_at_a_time = threading.Lock()
        try:
            self._file = os.open(locks, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise HostNotReady(f"{locks}: the list of uids in use can't be opened: {exc.strerror}") from exc

    def lease(self) -> int:
        """A uid that nobody on this host has. Raises HostNotReady: all are taken."""
        with self._one_at_a_time:
            busy = _busy()
            start = random.randrange(self._count)  # noqa: S311 (only to spread them)
            for step in range(self._count):
                uid = self._first + (start + step) % self._count
                if uid not in self._held and uid not in busy and self._lock(uid, fcntl.F_WRLCK):
                    self._held.add(uid)
                    return uid
        raise HostNotReady(f"all {self._count} uids from {self._first} on are in use; raise INSTAVM_JAIL_UID_COUNT")

    def adopt(self, uid: int) -> bool:
        """Take over the lease of a VMM that runs already; False when `uid` is none of ours, or another server has it."""
        with self._one_at_a_time:
            if not self._first <= uid < self._first + self._count or uid in self._held:
                return False
            if not self._lock(uid, fcntl.F_WRLCK):
                return False
            self._held.add(uid)
            return True

    def give_back(self, uid: int) -> None:
        """Only when nothing runs under it any more. Twice is fine."""
        with self._one_at_a_time:
            if uid in self._held:
                self._held.remove(uid)
                self._lock(uid, fcntl.F_UNLCK)

    def close(self) -> None:
        os.close(self._file)

    def _lock(self, uid: int, kind: int) -> bool:
        asked = _FLOCK.pack(kind, os.SEEK_SET, uid - self._first, 1, 0)
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, asked)
        except BlockingIOError:
            return False
        return True


def _busy() -> set[int]:
    """Every uid under which a process of this host runs."""
    found = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                found.add(entry.stat().st_uid)
            except FileNotFoundError:
                continue
    return found
