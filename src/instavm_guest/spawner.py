"""Pid 1 of the user's world: a process in namespaces of its own, rooted in the user's image, that starts programs.

Nothing in there can signal it, see the agent, or unmount what the agent stands on; when it ends, the kernel ends every
process of the user with it. It is forked from the agent and talks to it over a SOCK_SEQPACKET pair, one JSON object a
packet, descriptors beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import select
import signal
import socket
import stat
import sys

from instavm_guest import courier, kernel
from instavm_guest.frames import Message

PACKET_MAX = 256 << 10
IDENTITY_DIR = "/run/instavm"
"""A tmpfs whose files are bound over those that tell one sandbox from another; seen by agent and user alike."""
IDENTITY_FILES = {
    "hostname": "/etc/hostname",
    "hosts": "/etc/hosts",
    "resolv.conf": "/etc/resolv.conf",
    "machine-id": "/etc/machine-id",
    "boot_id": "/proc/sys/kernel/random/boot_id",
}
_DEVICES = {
    "null": (1, 3, 0o666),
    "zero": (1, 5, 0o666),
    "full": (1, 7, 0o666),
    "random": (1, 8, 0o666),
    "urandom": (1, 9, 0o666),
    "tty": (5, 0, 0o666),
    "fuse": (10, 229, 0o666),
    "net/tun": (10, 200, 0o666),
}
OPEN_FILES_MAX = 1 << 19
"""How far a user without rights may raise the number of files that a process has open, as under systemd. It begins at 1024."""
_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}


def start(root: str) -> tuple[int, socket.socket]:
    """Fork the spawner for the image mounted at `root`; its pid and our end of the line. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_MAX * 2)
    pid = os.fork()
    if pid:
        theirs.close()
        ready = ours.recv(PACKET_MAX)
        if ready != b"ready":
            raise OSError(f"the user's world could not be set up: {ready.decode(errors='replace')}")
        return pid, ours
    try:
        ours.close()
        kernel.die_with_parent(signal.SIGKILL)
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
        inner = os.fork()
        if inner:
            theirs.close()
            os.waitpid(inner, 0)
            os._exit(0)
        kernel.die_with_parent(signal.SIGKILL)
        _move_in(root)
        theirs.send(b"ready")
        _serve(theirs)
    except BaseException as exc:
        print(f"spawner: {exc!r}", file=sys.stderr, flush=True)
        theirs.send(str(exc).encode()[:1000])
    finally:
        os._exit(1)


def _move_in(root: str) -> None:
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    for place in ("proc", "sys", "dev", "run", "tmp", "app", "etc", "root"):
        os.makedirs(f"{root}/{place}", exist_ok=True)
    kernel.mount("proc", f"{root}/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    kernel.mount("sysfs", f"{root}/sys", "sysfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    folders = _folders(f"{root}/run")
    kernel.mount("tmpfs", f"{root}/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    _make_run(f"{root}/run", folders)
    if not os.path.lexists(f"{root}/etc/mtab"):
        os.symlink("../proc/self/mounts", f"{root}/etc/mtab")
    _make_dev(f"{root}/dev")
    for name, target in IDENTITY_FILES.items():
        _bind_identity(f"{IDENTITY_DIR}/{name}", root + target)
    os.chdir(root)
    kernel.pivot_root_here()
    os.umask(0o022)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, OPEN_FILES_MAX))


def _folders(place: str) -> list[tuple[str, os.stat_result]]:
    """The folders below `place`, outer ones first, by their path from there."""
    found = []
    for parent, names, _ in os.walk(place):
        for name in names:
            status = os.lstat(f"{parent}/{name}")
            if stat.S_ISDIR(status.st_mode):
                found.append((os.path.relpath(f"{parent}/{name}", place), status))
    return found


def _make_run(run: str, folders: list[tuple[str, os.stat_result]]) -> None:
    """What services of the image expect in /run: its folders, empty, and the one that /var/lock leads to."""
    for path, status in folders:
        os.mkdir(f"{run}/{path}")
        os.chown(f"{run}/{path}", status.st_uid, status.st_gid)
        os.chmod(f"{run}/{path}", stat.S_IMODE(status.st_mode))
    if not os.path.exists(f"{run}/lock"):
        os.mkdir(f"{run}/lock")
        os.chmod(f"{run}/lock", 0o1777)  # noqa: S103 — as in Debian: like /tmp, everybody may lock there


def _bind_identity(source: str, target: str) -> None:
    if os.path.islink(target):
        os.unlink(target)
    if not os.path.exists(target):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(source, target, flags=kernel.MS_BIND)


def _make_dev(dev: str) -> None:
    kernel.mount("tmpfs", dev, "tmpfs", kernel.MS_NOSUID, "mode=755,size=4m")
    for place in ("pts", "shm", "net", "mqueue"):
        os.mkdir(f"{dev}/{place}")
    for name, (major, minor, mode) in _DEVICES.items():
        os.mknod(f"{dev}/{name}", stat.S_IFCHR | mode, os.makedev(major, minor))
        os.chmod(f"{dev}/{name}", mode)
    for name, target in _LINKS.items():
        os.symlink(target, f"{dev}/{name}")
    kernel.mount("devpts", f"{dev}/pts", "devpts", kernel.MS_NOSUID, "newinstance,ptmxmode=0666,mode=620,gid=5")
    kernel.mount("shm", f"{dev}/shm", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")
    kernel.mount("mqueue", f"{dev}/mqueue", "mqueue", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)


def _serve(line: socket.socket) -> None:
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # One that is for a program may come when it is a copy of us still, and must not be an exception in there.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(line, select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    children: dict[int, int] = {}  # pid -> the agent's number for it
    while True:
        for fd, _ in poll.poll():
            if fd == wake_read:
                os.read(wake_read, 512)
                _reap(line, children)
            else:
                data, fds, _, _ = socket.recv_fds(line, PACKET_MAX, 16)
                if not data:
                    return
                _handle(line, json.loads(data), fds, children)


def _handle(line: socket.socket, ask: Message, fds: list[int], children: dict[int, int]) -> None:
    if "signal" in ask:
        for pid, number in children.items():
            if number == ask["id"]:
                _signal(pid, ask["signal"], ask["group"])
        return
    pid = os.fork()
    if pid == 0:
        _become(ask, fds)
    try:
        os.write(fds[0], b"%d" % pid)  # as it does itself: whoever is told of it can kill all that is in its group
    except OSError:
        pass  # it has ended already
    for fd in fds:
        os.close(fd)
    children[pid] = ask["id"]
    line.send(json.dumps({"id": ask["id"], "pid": pid}).encode())


def _signal(pid: int, signum: int, group: bool) -> None:
    if group:
        try:
            os.killpg(pid, signum)
            return
        except ProcessLookupError:
            pass  # it has not made its group yet, or has left it
    os.kill(pid, signum)


def _become(ask: Message, fds: list[int]) -> None:
    """In the child: turn into the program that was asked for. Descriptors: cgroup.procs first, then 0, 1, 2, 3 …"""
    try:
        os.write(fds[0], b"0")
        _be_killable()
        os.setsid()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in fds[1:]]  # clear of the numbers they will get
        for number, fd in enumerate(high):
            os.dup2(fd, number)
        signal.set_wakeup_fd(-1)
        for name in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        try:
            os.chdir(ask["cwd"])
        except OSError as exc:
            refusal = f"the working folder {ask['cwd']} cannot be used ({exc.strerror}): nothing was run\n"
            os.write(2, refusal.encode("utf-8", "surrogateescape"))
            os._exit(126)
        os.closerange(len(high), 256)
        env = ask["env"]
        if ask["programs"][0][0] == courier.PROGRAM:
            courier.serve(ask["programs"][0][1])
        for program in ask["programs"]:
            try:
                os.execvpe(program[0], program, env)
            except FileNotFoundError:
                continue
        names = " or ".join(program[0] for program in ask["programs"])
        os.write(2, f"{names}: not found in this image\n".encode())
        os._exit(127)
    except BaseException as exc:
        os.write(2, f"could not start {ask['programs'][0][0]}: {exc}\n".encode())
    finally:
        os._exit(126)


def _be_killable() -> None:
    """The agent is spared when memory runs out, and so is this process; what the user runs is not."""
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    os.write(fd, b"0")
    os.close(fd)


def _reap(line: socket.socket, children: dict[int, int]) -> None:
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        number = children.pop(pid, None)
        if number is not None:
            code = os.waitstatus_to_exitcode(status)
            cpu = usage.ru_utime + usage.ru_stime
            line.send(json.dumps({"id": number, "exit": code, "cpu": cpu, "rss_kib": usage.ru_maxrss}).encode())
