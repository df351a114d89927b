"""How a command or a process ended, as a guest tells it: every value is checked."""

from __future__ import annotations

from instavm.contract.processes import ProcessEnd
from instavm.errors import GuestProtocolError
from instavm_guest import frames

SECONDS_MAX = 10**9
KIB_MAX = 1 << 40
SIGNAL_MAX = 64
EXIT_MAX = 255
EXIT_OF_SIGNAL = 128
"""A program that a signal ended has this and the signal's number for its exit code, as in a shell."""
EXIT_OF_REASON = {"timeout": 124, "cancelled": 130}
"""Whatever it was that it left with when we stopped it: as timeout(1) and a shell after Ctrl-C tell it."""


def ended(payload: bytes) -> tuple[ProcessEnd, int]:
    """What RAN tells, and its flags. Raises GuestProtocolError: it tells no end, or one that can't be."""
    try:
        told = frames.read_end(payload)
    except frames.FrameError as exc:
        raise GuestProtocolError(f"the guest told no end: {exc}") from None
    if not -SIGNAL_MAX <= told.exit_code <= EXIT_MAX:
        raise GuestProtocolError(f"the guest's exit code is {told.exit_code}")
    for seconds in (told.wall_s, told.cpu_s):
        if not 0 <= seconds < SECONDS_MAX:
            raise GuestProtocolError(f"the guest's time is {seconds}")
    if told.peak_kib >= KIB_MAX:
        raise GuestProtocolError(f"the guest's memory is {told.peak_kib} KiB")
    by_signal = -told.exit_code if told.exit_code < 0 else None
    exit_code = told.exit_code if by_signal is None else EXIT_OF_SIGNAL + by_signal
    if told.reason is not None:
        exit_code = EXIT_OF_REASON.get(told.reason, exit_code)
    return ProcessEnd(exit_code, by_signal, told.reason, told.wall_s, told.cpu_s, told.peak_kib << 10), told.flags
