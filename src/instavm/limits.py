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
OUTPUT_DEPTH: Final = 100
"""How deep lists and objects of an output may lie in one another, its bundle included."""
"""Rich outputs that a result keeps, and their bytes as JSON; what is over is left out and sets `truncated`."""

ENV_VARIABLES: Final = 256
ENV_BYTES: Final = 128 << 10
"""All names and values of one environment together."""
METADATA_BYTES: Final = 16 << 10
JSON_DEPTH: Final = 64
"""How deep values may be nested: metadata that comes in, rich outputs that go out."""

LANGUAGES: Final = ("python", "bash", "sh", "javascript")
LANGUAGE_ALIASES: Final[Mapping[str, str]] = {"node": "javascript", "js": "javascript"}

EGRESS_RULES: Final = 256
"""Domains of a policy, and as many address ranges."""

HOST_CHARS: Final = 1024
"""Of a destination that is asked about: longer than any name, so that a name that is too long can be asked about."""

PATH_BYTES: Final = 4096
"""Longest path of a file in a sandbox, as Linux has it."""
FILE_NAME_BYTES: Final = 255
"""Longest name of a file, without its folders, as Linux has it."""
FORM_BYTES: Final = 64 << 10
"""All text parts of an upload together."""
TASK_OUTPUT_BYTES: Final = 4 << 20
"""How much of a task's stdout, and of its stderr, is kept (head and tail)."""
PROCESS_COMMAND_BYTES: Final = 64 << 10
"""All words of a process's command together."""
PROCESS_WORDS: Final = 1024
PROCESS_LOG_BYTES: Final = 1 << 20
"""How much of a process's output its sandbox keeps at most: the latest. Also the largest window of it in one answer."""
PROCESS_WINDOW_BYTES_MIN: Final = 1024
PROCESS_INPUT_BYTES: Final = 1 << 20
"""Longest piece of stdin, and how much of it may wait for a process that does not read."""
PROCESS_WAIT_S_MAX: Final = 60
"""Longest that one request waits for the end of a process; clients ask again."""
SHELLS: Final = ("bash", "sh")
SIGNALS: Final[Mapping[str, int]] = {
    "HUP": 1,
    "INT": 2,
    "QUIT": 3,
    "ABRT": 6,
    "KILL": 9,
    "USR1": 10,
    "USR2": 12,
    "ALRM": 14,
    "TERM": 15,
    "CONT": 18,
    "STOP": 19,
    "TSTP": 20,
    "WINCH": 28,
}
"""Name → number, as Linux has them: the client may run elsewhere."""
IDEMPOTENCY_KEY_CHARS: Final = 255

FORKS_MAX: Final = 64
"""Copies of a sandbox made by one call."""
SNAPSHOT_LOG_BYTES: Final = 256 << 10
"""How much of a build's log is kept (head and tail)."""
PACKAGES_CHARS: Final = 8192
BUILD_DISK_GIB_MIN: Final = 1
BUILD_DISK_GIB_MAX: Final = 16

REQUESTS_MAX: Final = 1000
"""Requests of one account that may be under way at one time, those that wait or follow included."""
EXECUTIONS_MAX: Final = 500
"""Executions of one account that may run, or wait for their turn, at one time; tasks are counted by themselves."""
STREAMS_MAX: Final = 128
"""Of these, executions that are streamed: the server keeps the latest output of each."""
TASKS_MAX: Final = 500
"""Tasks of one account that may run, or wait for their turn, at one time."""
TRANSFERS_MAX: Final = 64
"""Uploads and downloads of one account at one time."""
BUILDS_MAX: Final = 16
"""Snapshots of one account that may be built at one time."""

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
        f"an object (a dict) of at most {ENV_VARIABLES} variables with names of letters, digits and _ (no digit first) and with"
        f" strings, numbers or booleans without NUL as values, {ENV_BYTES} bytes in all"
    ),
    "metadata": f"an object (a dict) of at most {METADATA_BYTES} bytes of JSON, nested at most {JSON_DEPTH} deep",
    "count": f"a whole number from 1 to {FORKS_MAX}",
    "oci_image": "a reference such as python:3.12-slim, host:port/name@sha256:…, oci:/path:tag or docker-archive:/path",
    "build_args": (
        f"packages separated by spaces ({PACKAGES_CHARS} characters of each kind), git_clone_url and git_clone_branch,"
        f" envs, post_build_cmd, disk_size_gb from {BUILD_DISK_GIB_MIN} to {BUILD_DISK_GIB_MAX}"
    ),
    "type": "user",
    "name": "at most 200 characters",
    "limit": f"a whole number from 1 to {LIST_LIMIT_MAX}",
    "remote_path": f"a path of 1 to {PATH_BYTES} bytes of UTF-8 without NUL",
    "filename": f"a path of 1 to {PATH_BYTES} bytes of UTF-8 without NUL",
    "file_name": f"the name of a file, without its folders: 1 to {FILE_NAME_BYTES} bytes of UTF-8 without NUL",
    "file": "one part with a filename, after all text parts",
    "form": f"parts of multipart/form-data: text of at most {FORM_BYTES} bytes in all, then the part `file`",
    "port": "a whole number from 1 to 65535",
    "host": f"a host name or an IP address, at most {HOST_CHARS} characters",
    "protocol": "tcp or udp",
    "entries": "a list of {env_name, value}",
    "idempotency-key": f"1 to {IDEMPOTENCY_KEY_CHARS} printable ASCII characters",
    "process command": (
        f"a line for the shell, or a list of 1 to {PROCESS_WORDS} words; not blank, without NUL,"
        f" {PROCESS_COMMAND_BYTES} bytes of UTF-8 in all"
    ),
    "shell": "one of " + ", ".join(SHELLS),
    "cwd": f"a path of 1 to {PATH_BYTES} bytes of UTF-8 without NUL",
    "signal": "one of " + ", ".join(SIGNALS) + ", with or without SIG in front, or its number",
    "data": f"at most {PROCESS_INPUT_BYTES} bytes, as text or, with encoding base64, as base64",
    "encoding": "utf-8 or base64",
    "after": "a position in the process's output: a whole number, not more than were written",
    "size": f"a whole number from {PROCESS_WINDOW_BYTES_MIN} to {PROCESS_LOG_BYTES} (bytes)",
    "process timeout": f"a number from 0 to {PROCESS_WAIT_S_MAX} (seconds)",
    "allowed_domains": f"a list of at most {EGRESS_RULES} host names such as api.example.com, or *.example.com for all below one",
    "allowed_cidrs": (
        f"a list of at most {EGRESS_RULES} address ranges such as 10.1.0.0/16 (no bits set behind the prefix) or 192.0.2.7"
    ),
    "allow_http": "true or false",
    "allow_https": "true or false",
    "allow_package_managers": "true or false",
    "allow_public_repos": "true or false",
    "egress_policy": "an object of allow_package_managers, allow_http, allow_https, allowed_domains and allowed_cidrs",
    "session_id": "the id of a session (a UUID)",
    "body": f"at most {BODY_BYTES} bytes",
}
"""Wire field → what is accepted, in words. Used in every refusal, on both sides."""
