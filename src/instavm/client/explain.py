"""What ended an execution, in one sentence, with what to do about it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Final

from instavm import refusals
from instavm.client.results import Execution

REMEDIES: Final = {
    "timeout": "it ran out of time and was stopped after {execution_time:.0f} s; give it a longer timeout, or start it with"
    " execute_async",
    "oom": "it ran out of memory (its largest process had {peak_mb} MB); start the session with a larger memory_mb,"
    " or hold less at once",
    "pids": "it started more processes or threads than one call may have; start fewer, or wait for those that run",
    "disk_full": "the sandbox's disk is full; remove what is not needed",
    "interpreter_crashed": "its interpreter ended ({how}), and with it all variables; run again what they came from,"
    " files are still there",
    "interpreter_missing": "this image has no interpreter for {language}; use an image that has one",
    "vm_lost": "its sandbox was lost while it ran, so it may or may not have finished; look at what it was to leave"
    " behind before it is run again",
    "cancelled": "it was cancelled; run it again if it was not you",
}


def explain(result: Execution) -> str:
    """How `result` came to be, in one sentence; in another one what the sandbox's network refused meanwhile, if anything."""
    return " ".join([_ended(result), *_refused(result)])


def _ended(result: Execution) -> str:
    reason, code = result.get("reason"), result.get("exit_code")
    if reason in REMEDIES:
        facts = {
            "execution_time": result.get("execution_time") or 0.0,
            "peak_mb": (result.get("peak_memory_bytes") or 0) >> 20,
            "how": _how(result),
            "language": result.get("language") or "python",
        }
        return f"The code did not end by itself: {REMEDIES[str(reason)].format(**facts)}."
    if reason is not None:
        return f"The code did not end by itself: {reason}."
    if code in (0, None):
        return "The code ran to its end without an error."
    last = str(result.get("stderr") or "").strip().rpartition("\n")[2]
    return f"The code itself failed ({_how(result)}){': ' + last if last else ''}."


def _refused(result: Execution) -> Iterator[str]:
    refused = sorted(
        result.get("refused") or [], key=lambda one: not one["registry"]
    )  # most are packages that are missed
    for one in refused[:1]:
        more = len(refused) - 1
        others = f" (and {more} more, see result.refused)" if more else ""
        where = f"{one['name'] or one['address']}:{one['port']}"
        what = f"to look up {one['name']}" if one["protocol"] == "dns" else f"a connection to {where}"
        how = refusals.remedy(one["rule"], one["name"], one["address"], one["port"], registry=one["registry"])
        yield f"Egress refused {what}{others}: {refusals.why(one['rule'])} ({one['rule']}). To allow it, {how}."


def _how(result: Execution) -> str:
    number = result.get("signal")
    if number is None:
        return f"exit code {result.get('exit_code')}"
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"
