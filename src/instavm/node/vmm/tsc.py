"""How fast this host's time stamp counter ticks: the emulator passes it through, and a guest cannot measure it well.

A microvm has no HPET or PM timer, and calibrating against the PIT fails when the host is busy; the kernel is told
instead (`tsc_early_khz`, kernel-parameters.txt).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import time

RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl rdx, 32; or rax, rdx; ret
MEASURE_S = 0.1


@functools.cache
def khz() -> int:
    """Ticks per millisecond. Blocks for MEASURE_S the first time."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(RDTSC)
        anchor = ctypes.c_char.from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        began, first = time.monotonic_ns(), read()
        time.sleep(MEASURE_S)
        ended, last = time.monotonic_ns(), read()
        del anchor
    return int((last - first) * 1_000_000 // (ended - began))
