"""libnftables, as far as we call it. It speaks to the kernel itself: for the network namespace of the calling thread."""

from __future__ import annotations

import ctypes
import functools
import gc
import threading

from instavm.errors import HostNotReady
from instavm.node.network.thread import LIBC, check, in_thread

JSON = 1 << 4  # NFT_CTX_OUTPUT_JSON, nftables/libnftables.h
HOW_TO_GET = "Install it with: apt-get install libnftables1"
SYS_CLOSE_RANGE, CLOSE_RANGE_UNSHARE = 436, 2  # x86_64; close_range(2)
_one_at_a_time = threading.Lock()
"""libnftables keeps a list of interfaces for the whole process, which the end of any context frees: two threads at once
free it twice."""


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnftables.so.1")
    except OSError as exc:
        raise HostNotReady(f"libnftables is missing: {exc}. {HOW_TO_GET}") from exc
    library.nft_ctx_new.restype = ctypes.c_void_p
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_char_p
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    return library


def available() -> bool:
    try:
        _library()
    except HostNotReady:
        return False
    return True


def run(commands: str) -> str:
    """Carry out commands, all or none; what they answer, as JSON. Raises HostNotReady, OSError (refused by the kernel)."""
    with _one_at_a_time:
        collects = gc.isenabled()
        gc.disable()  # what is found to be garbage in there would be closed in there, and stay open out here
        try:
            return in_thread(lambda: _apart(commands))
        finally:
            if collects:
                gc.enable()


def _apart(commands: str) -> str:
    """With a table of descriptors of this thread's own: libnftables waits with select(2), which ends a process whose number
    for the socket is 1024 or more, and a hundred sandboxes have that many."""
    library = _library()
    check(LIBC.syscall(SYS_CLOSE_RANGE, 3, ctypes.c_uint(-1), CLOSE_RANGE_UNSHARE), "close_range")
    return _run(library, commands)


def _run(library: ctypes.CDLL, commands: str) -> str:
    context = library.nft_ctx_new(0)
    try:
        library.nft_ctx_output_set_flags(context, JSON)
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        status = library.nft_run_cmd_from_buffer(context, commands.encode())
        if status != 0:
            said = (library.nft_ctx_get_error_buffer(context) or b"").decode(errors="replace").strip()
            raise OSError(f"nftables: {said or status}")
        return str((library.nft_ctx_get_output_buffer(context) or b"").decode())
    finally:
        library.nft_ctx_free(context)
