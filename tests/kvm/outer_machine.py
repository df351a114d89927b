"""The outer machine of the nested rig: its process, its monitor, and the line to the runner in it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from pathlib import Path

from rig_parts import RigFailed

CPU = "max,+svm"
"""Of the outer machine. What was tried besides, and did not help: docs/kvm.md."""
CPUS = 1
"""With two, one run in four was lost to an interrupt that this emulator delivers too early: docs/kvm.md."""
MEMORY_MIB = 6144
CONSOLE_CHARS = 20_000
"""A kernel that dies says first of what, and then for long where."""


def command(tree, disks, memory, *, share):
    """The emulator in this tree, with these disks (a path, and whether it is only read), its memory in that file."""
    drives = [
        argument
        for number, (disk, only_read) in enumerate(disks)
        for argument in (
            *(
                "-drive",
                f"if=none,id=d{number},file={disk},format=raw,readonly={'on' if only_read else 'off'},cache=unsafe",
            ),
            *("-device", f"virtio-blk-pci,drive=d{number}"),
        )
    ]
    return [
        *(tree / "usr/lib64/ld-linux-x86-64.so.2", "--library-path", tree / "usr/lib/x86_64-linux-gnu"),
        *(tree / "usr/bin/qemu-system-x86_64", "-L", tree / "usr/share/qemu", "-L", tree / "usr/share/seabios"),
        *("-M", "pc,memory-backend=ram", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", CPU, "-smp", str(CPUS)),
        *("-m", f"{MEMORY_MIB}M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *(
            "-object",
            f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={memory},share={'on' if share else 'off'}",
        ),
        *drives,
        *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=rig,name=rig"),
    ]


class Outer:
    """The outer machine's process, its monitor and the line to the runner in it. Killed with the block."""

    def __init__(self, folder, command):
        self._log = folder / "log"
        self._monitor, self._line = _listen(folder / "qmp"), _listen(folder / "rig")
        ports = (
            *("-chardev", f"socket,id=qmp,path={folder / 'qmp'}", "-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"socket,id=rig,path={folder / 'rig'}"),
            *("-chardev", f"file,id=log,path={self._log}", "-serial", "chardev:log"),
        )
        self._command = [*map(str, command), *ports]
        self._heard = b""

    def __enter__(self):
        modules = Path(self._command[3]).parents[1] / "lib/x86_64-linux-gnu/qemu"
        self._process = subprocess.Popen(self._command, env={"QEMU_MODULE_DIR": str(modules)}, stdin=subprocess.DEVNULL)
        try:
            self._monitor, self._line = _accepted(self._monitor), _accepted(self._line)
            self._file = self._monitor.makefile("rw")
            self._file.readline()
            self._ask("qmp_capabilities")
        except OSError as exc:
            self.__exit__()
            raise RigFailed(f"the outer machine did not start: {exc}") from exc
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._monitor.close()
        self._line.close()

    def _ask(self, command, **arguments):
        self._file.write(json.dumps({"execute": command, "arguments": arguments}))
        self._file.flush()
        while "event" in (answer := json.loads(self._file.readline() or '{"error": "it has ended"}')):
            pass
        if "error" in answer:
            raise RigFailed(f"{command}: {answer['error']}")
        return answer["return"]

    def _migrate(self, command, uri):
        self._ask("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        self._ask(command, uri=uri)
        deadline = time.monotonic() + 60
        while (status := self._ask("query-migrate").get("status")) != "completed":
            if status == "failed" or time.monotonic() > deadline:
                raise RigFailed(f"{command}: {status}")
            time.sleep(0.02)

    def save(self, state):
        self._ask("stop")
        self._migrate("migrate", f"file:{state}")

    def load(self, state):
        self._migrate("migrate-incoming", f"file:{state}")
        self._ask("cont")

    def tell(self, **words):
        self._line.sendall(json.dumps(words).encode() + b"\n")

    def until(self, word, deadline_s, hear=lambda text: None):
        """What the runner says, until that word is in it; its output on the way. Raises RigFailed."""
        end = time.monotonic() + deadline_s
        while True:
            while b"\n" in self._heard:
                one, _, self._heard = self._heard.partition(b"\n")
                told = json.loads(one)
                if word in told:
                    return told
                hear(told.get("out", ""))
            self._line.settimeout(max(0.1, end - time.monotonic()))
            try:
                data = self._line.recv(1 << 16)
            except TimeoutError:
                raise RigFailed(f"no {word!r} within {deadline_s:.0f} s; its console:\n{self._console()}") from None
            if not data:
                raise RigFailed(f"the outer machine has ended; its console:\n{self._console()}")
            self._heard += data

    def _console(self):
        with contextlib.suppress(OSError):
            return self._log.read_text(errors="replace")[-CONSOLE_CHARS:]
        return ""


def _listen(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(30)
    return listener


def _accepted(listener):
    with listener:
        return listener.accept()[0]
