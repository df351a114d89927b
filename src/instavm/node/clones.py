"""What clones of one template must not have in common, asked from inside: for tests, and for whoever makes images.

Each probe prints one value that has to differ between two machines. One that can't be had in an image (no `openssl`, no
numpy) prints nothing and is told as not there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from instavm.contract.executions import Command, Outcome

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Probe:
    language: str
    code: str
    shared_because: str | None = None
    """Why clones do share it, and what that means; None: they must not."""


PROBES: Mapping[str, Probe] = {
    "the kernel's random numbers, before anything else ran": Probe("bash", "head -c 32 /dev/urandom | base64 -w0"),
    "bash's $RANDOM": Probe("bash", "echo $RANDOM$RANDOM$RANDOM"),
    "boot id": Probe("bash", "cat /proc/sys/kernel/random/boot_id"),
    "machine id": Probe("bash", "cat /etc/machine-id"),
    "MAC": Probe("bash", "cat /sys/class/net/eth0/address 2>/dev/null"),
    "hostname": Probe("bash", "hostname; cat /etc/hostname"),
    "a key of OpenSSL": Probe(
        "bash", "command -v openssl >/dev/null && openssl ecparam -name prime256v1 -genkey -noout"
    ),
    "a key of ssh-keygen": Probe(
        "bash",
        "command -v ssh-keygen >/dev/null && ssh-keygen -q -t ed25519 -N '' -f /tmp/probe-key && cat /tmp/probe-key.pub"
        " && rm /tmp/probe-key /tmp/probe-key.pub",
    ),
    "Python's random": Probe("python", "import random; print(random.random())"),
    "Python's os.urandom": Probe("python", "import os; print(os.urandom(1024).hex())"),
    "Python's secrets": Probe("python", "import secrets; print(secrets.token_hex(16))"),
    "Python's uuid4": Probe("python", "import uuid; print(uuid.uuid4())"),
    "Python's uuid1": Probe("python", "import uuid; print(uuid.uuid1().hex[16:], uuid.uuid1())"),
    "Python's tempfile": Probe("python", "import tempfile; print(tempfile.mktemp())"),
    "numpy's random": Probe(
        "python",
        "import importlib.util\n"
        "if importlib.util.find_spec('numpy'):\n"
        "    import numpy; print(numpy.random.random(), numpy.random.default_rng().random())",
    ),
    "TLS ClientHello": Probe(
        "python",
        "import ssl\n"
        "out, context = ssl.MemoryBIO(), ssl.create_default_context()\n"
        "line = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname='example.com')\n"
        "try: line.do_handshake()\n"
        "except ssl.SSLWantReadError: print(out.read()[11:43].hex())",
    ),
    "random numbers of a new Python": Probe("bash", "python3 -c 'import random; print(random.random())'"),
    "hash seed of a new Python": Probe("bash", "python3 -c 'print(hash(str(1)))'"),
    "hash seed of the session's Python": Probe(
        "python",
        "print(hash('a string'))",
        "it is drawn when an interpreter starts, and this one started in the template: don't let code of this session build"
        " hash tables from keys of an attacker who knows the template; a new python3 has a seed of its own",
    ),
    "addresses of the session's Python": Probe(
        "python",
        "print(id(print))",
        "memory is cloned, and so is where things lie in it; a new process is laid out anew where the tier allows it",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    probe: str
    shared: bool
    """Whether two of the clones gave the same answer."""
    there: bool
    """False: the image has nothing to ask."""
    accepted: str | None

    @property
    def bad(self) -> bool:
        return self.shared and self.accepted is None


async def compare(clones: Sequence[Callable[[Command], Awaitable[Outcome]]]) -> list[Finding]:
    """Ask every clone every probe. `clones`: how to run a command in each; nothing must have run in them yet."""
    found = []
    for name, probe in PROBES.items():
        told = [(await run(Command(probe.code, probe.language, TIMEOUT_S))).stdout.strip() for run in clones]
        there = all(told)
        found.append(Finding(name, there and len(set(told)) < len(told), there, probe.shared_because))
    return found
