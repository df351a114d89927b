"""Every limit that a client can run into, in one place. Units are in the names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

VCPUS_MIN: Final = 1
VCPUS_MAX: Final = 8
VCPUS_DEFAULT: Final = 2

MEMORY_MIB_MIN: Final = 256
MEMORY_MIB_MAX: Final = 8192
MEMORY_MIB_DEFAULT: Final = 512

LIFETIME_S_MIN: Final = 20
LIFETIME_S_MAX: Final = 86_400
LIFETIME_S_DEFAULT: Final = 300
VM_LIFETIME_S_MAX: Final = 100 * 366 * 86_400

EXECUTE_TIMEOUT_S_MIN: Final = 1
EXECUTE_TIMEOUT_S_MAX: Final = 600
EXECUTE_TIMEOUT_S_DEFAULT: Final = 300

COMMAND_BYTES: Final = 1 << 20
"""Longest `command`, in UTF-8 bytes."""
OUTPUT_BYTES: Final = 16 << 20
"""How much of stdout, and of stderr, a result keeps (head and tail); more sets `truncated`."""

OUTPUTS_MAX: Final = 64
OUTPUTS_BYTES: Final = 8 << 20
"""Rich outputs that a result keeps, and their bytes as JSON; what is over is left out and sets `truncated`."""

ENV_VARIABLES: Final = 256
ENV_BYTES: Final = 128 << 10
"""All names and values of one environment together."""
METADATA_BYTES: Final = 16 << 10

LANGUAGES: Final = ("python", "bash", "sh", "javascript")
LANGUAGE_ALIASES: Final[Mapping[str, str]] = {"node": "javascript", "js": "javascript"}

PATH_BYTES: Final = 4096
"""Longest path of a file in a sandbox, as Linux has it."""
FORM_BYTES: Final = 64 << 10
"""All text parts of an upload together."""
TASK_OUTPUT_BYTES: Final = 4 << 20
"""How much of a task's stdout, and of its stderr, is kept (head and tail)."""
IDEMPOTENCY_KEY_CHARS: Final = 255

LIST_LIMIT_MAX: Final = 1000
LIST_LIMIT_DEFAULT: Final = 100

BODY_BYTES: Final = 8 << 20
"""Longest JSON body the server reads: a `command` of full length still fits when every byte of it is escaped.
"""

ALLOWED: Final[Mapping[str, str]] = {
    "vcpu_count": f"a whole number from {VCPUS_MIN} to {VCPUS_MAX}",
    "memory_mb": f"a whole number from {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX} (MB)",
    "vm_lifetime_seconds": f"a whole number from {LIFETIME_S_MIN} to {LIFETIME_S_MAX} (seconds)",
    "timeout": f"a number from {EXECUTE_TIMEOUT_S_MIN} to {EXECUTE_TIMEOUT_S_MAX} (seconds)",
    "language": "one of " + ", ".join(LANGUAGES),
    "require_isolation": "kvm or emulated",
    "command": f"code that is not blank, at most {COMMAND_BYTES} bytes of UTF-8",
    "env": (
        f"at most {ENV_VARIABLES} variables with names of letters, digits and _ (no digit first) and with"
        f" strings, numbers or booleans without NUL as values, {ENV_BYTES} bytes in all"
    ),
    "metadata": f"an object of at most {METADATA_BYTES} bytes of JSON",
    "limit": f"a whole number from 1 to {LIST_LIMIT_MAX}",
    "remote_path": f"a path of 1 to {PATH_BYTES} bytes of UTF-8 without NUL",
    "filename": f"a path of 1 to {PATH_BYTES} bytes of UTF-8 without NUL",
    "file": "one part with a filename, after all text parts",
    "form": f"parts of multipart/form-data: text of at most {FORM_BYTES} bytes in all, then the part `file`",
    "port": "a whole number from 1 to 65535",
    "entries": "a list of {env_name, value}",
    "idempotency-key": f"1 to {IDEMPOTENCY_KEY_CHARS} printable ASCII characters",
    "session_id": "the id of a session (a UUID)",
    "body": f"at most {BODY_BYTES} bytes",
}
"""Wire field → what is accepted, in words. Used in every refusal, on both sides."""
