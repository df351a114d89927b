"""An internet of the test's own: a namespace with web servers, a DNS server, a private network and a metadata service.

The host reaches it through a pair of interfaces; it is gone with the test. Sandboxes reach it through the filter, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from instavm.contract.egress import Egress
from instavm.contract.executions import Command
from instavm.node.network import space
from instavm.node.network.space import Space

METADATA = "169.254.169.254"
TABLES = 77000
"""Each run's routes have a table of their own that is asked first: this host or another run may know the metadata service too."""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Internet:
    """`a` and `b` are public servers, `private` is in a private network; all of them say what they saw."""

    folder: Path
    name: str
    a: str
    b: str
    private: str
    host: str
    """The host's own address on the way there."""
    metadata: str = METADATA

    def zone(self, **records):
        """Names and what they resolve to from now on: a list of addresses, or another name."""
        new = self.folder / "zone.new"
        new.write_text(json.dumps({name.replace("__", "."): value for name, value in records.items()}))
        new.rename(self.folder / "zone.json")

    def names(self, records):
        self.zone(**{name.replace(".", "__"): value for name, value in records.items()})

    def repository(self, name, files, branch):
        """Make a git repository with one commit: its URL at `a`, below whatever host name that has."""
        work, author = self.folder / f"{name}.work", ("-c", "user.name=test", "-c", "user.email=test@test")
        work.mkdir()
        for file, text in files.items():
            (work / file).write_text(text)
        for words in (("init", "-q", "-b", branch), ("add", "."), (*author, "commit", "-qm", "one")):
            subprocess.run(["git", "-C", work, *words], check=True)
        subprocess.run(["git", "clone", "-q", "--bare", work, self.folder / "git" / f"{name}.git"], check=True)
        return f"/git/{name}.git"

    @property
    def seen(self):
        return (self.folder / "seen").read_text().splitlines()

    def forget(self):
        (self.folder / "seen").write_text("")

    def packets(self):
        """Sent to one of its addresses so far, by anybody."""
        (rule,) = [
            one["rule"] for one in json.loads(self.nft("list chain ip seen arrive"))["nftables"] if "rule" in one
        ]
        return next(part["counter"]["packets"] for part in rule["expr"] if "counter" in part)

    def nft(self, commands):
        inside = Space(os.open(f"/run/netns/{self.name}", os.O_RDONLY))
        try:
            return space.apply(inside, commands)
        finally:
            inside.close()


@pytest.fixture(scope="session")
def internet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    number = os.getpid() % 250
    name, block = f"ivmt{number}", ("198.51.100", "203.0.113")[number // 125]  # runs beside each other share none
    public = [f"{block}.{number % 125 * 2 + one}" for one in (1, 2)]
    world = Internet(folder, name, *public, f"10.{number}.77.1", f"100.127.{number}.1")
    there = f"100.127.{number}.2"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-addext", "subjectAltName=DNS:good.test,DNS:evil.test"),
            *("-keyout", folder / "key.pem", "-out", folder / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    world.zone()
    world.forget()
    rules = contextlib.ExitStack()
    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "up0", "netns", name)
        ip("addr", "add", f"{world.host}/30", "dev", name)
        ip("link", "set", name, "up")
        inside = ("-n", name)
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "addr", "add", f"{there}/30", "dev", "up0")
        ip(*inside, "link", "set", "up0", "up")
        ip(*inside, "route", "add", "default", "via", world.host)
        addresses = [world.a, world.b, world.private, METADATA]
        for address in addresses:
            ip(*inside, "addr", "add", f"{address}/32", "dev", "lo")
            ip("route", "add", f"{address}/32", "via", there, "table", str(TABLES + number))
            rule = ("to", address, "lookup", str(TABLES + number), "priority", str(number + 1))
            ip("rule", "add", *rule)
            rules.callback(ip, "rule", "del", *rule)
        world.nft(
            "table ip seen {\n chain arrive {\n type filter hook prerouting priority raw; policy accept;\n"
            f"iifname up0 ip daddr {{ {', '.join(addresses)} }} counter\n }}\n }}"
        )
        process = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, Path(__file__).with_name("world.py"), folder, *addresses],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout.readline() == b"ready\n"
            yield world
        finally:
            process.stdin.close()
            process.wait(20)
            process.stdout.close()
    finally:
        rules.close()
        ip("netns", "del", name)


class Live:
    """A sandbox as a test sees it."""

    def __init__(self, node, vm_id):
        self.node, self.vm_id = node, vm_id

    async def python(self, code, timeout_s=60.0):
        return await self.node.execute(self.vm_id, Command(code, "python", timeout_s))

    async def bash(self, code, timeout_s=60.0):
        return await self.node.execute(self.vm_id, Command(code, "bash", timeout_s))

    async def allow(self, **egress):
        await self.node.set_egress(self.vm_id, Egress(**egress))

    async def get(self, url, *options):
        """What curl makes of it: the body, or the error's number."""
        words = " ".join(f"'{word}'" for word in options)
        done = await self.bash(f"curl -skf -m 20 {words} '{url}' || echo curl $?")
        return done.stdout.strip()

    async def log(self):
        return (await self.node.egress_log(self.vm_id)).seen

    @property
    def network(self):
        return self.node._live[self.vm_id].prepared.network

    @property
    def agent(self):
        return self.node._live[self.vm_id].agent
