"""`instavm egress get | set | check | log | suggest`: what a sandbox may reach, and where it went."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Annotated, Any, Final

import typer

from instavm import limits
from instavm.cli.options import ApiKey, AsJson, BaseUrl, client
from instavm.client.egress import Egress
from instavm.client.results import EgressCheck, EgressLog, EgressPolicy
from instavm.errors import BadRequest

app = typer.Typer(no_args_is_help=True)

POLL_S: Final = 1.0
HTTPS: Final = 443
SOURCES: Final = {
    "session": "the session's policy",
    "vm": "the VM's own policy",
    "default": "the server's default policy (INSTAVM_EGRESS_DEFAULT)",
    "given": "the policy that was given",
    "operator": "the operator's setting (INSTAVM_EGRESS_PACKAGE_HOSTS)",
    "special_address": "the addresses that only a range of their own opens",
    "control_plane": "the control plane's own ports",
    "network": "the network that every sandbox has",
    "upstream": "not the policy: the destination does not answer",
}
Session = Annotated[str | None, typer.Option("--session", help="Id of a session.")]
Vm = Annotated[str | None, typer.Option("--vm", help="Id of a VM.")]


@app.command()
def get(
    session: Session = None, vm: Vm = None, as_json: AsJson = False, api_key: ApiKey = None, base_url: BaseUrl = None
) -> None:
    """Show what is in force."""
    egress = _egress(api_key, base_url)
    _show(egress.get_session(_one(session, vm)) if vm is None else egress.get_vm(_one(session, vm)), as_json)


@app.command(name="set")
def set_(
    session: Session = None,
    vm: Vm = None,
    packages: Annotated[
        bool, typer.Option("--allow-package-managers/--no-allow-package-managers", help="pip, npm, apt.")
    ] = False,
    http: Annotated[bool, typer.Option("--allow-http/--deny-http", help="Port 80.")] = False,
    https: Annotated[bool, typer.Option("--allow-https/--deny-https", help="Port 443.")] = False,
    domain: Annotated[
        list[str] | None, typer.Option(help="A name, or *.name for all below it. May be repeated.")
    ] = None,
    cidr: Annotated[list[str] | None, typer.Option(help="An address range. May be repeated.")] = None,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Set the whole policy: what is not given is not allowed."""
    target, egress = _one(session, vm), _egress(api_key, base_url)
    put = egress.set_session if vm is None else egress.set_vm
    done = put(
        target,
        allow_package_managers=packages,
        allow_http=http,
        allow_https=https,
        allowed_domains=domain,
        allowed_cidrs=cidr,
    )
    _show(done, as_json)


@app.command()
def check(
    destination: Annotated[str, typer.Argument(help="HOST or HOST:PORT; port 443 is meant if none is given.")],
    session: Session = None,
    vm: Vm = None,
    udp: Annotated[bool, typer.Option("--udp", help="Ask about UDP; else about TCP.")] = False,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Ask whether a sandbox may reach a destination, by which rule, and what to do if not. Ends with 1 if it may not."""
    target, (host, port) = _one(session, vm), _destination(destination)
    egress, protocol = _egress(api_key, base_url), "udp" if udp else "tcp"
    if vm is None:
        said = egress.check(host, port, protocol=protocol, session_id=target)
    else:
        said = egress.check(host, port, protocol=protocol, vm_id=target)
    print(json.dumps(said) if as_json else _answer(said))
    if not said.allowed:
        raise typer.Exit(1)


def _destination(text: str) -> tuple[str, int]:
    """`HOST`, `HOST:PORT`, `[IPv6]:PORT`. Raises: BadRequest."""
    head, colon, tail = text.rpartition(":")
    if not colon or text.endswith("]") or (":" in head and not head.endswith("]")):
        return text, HTTPS
    if not (tail.isascii() and tail.isdigit()):
        raise BadRequest("port", tail, limits.ALLOWED["port"])
    return head, int(tail)


def _answer(said: EgressCheck) -> str:
    word = "allowed" if said.allowed else "refused"
    lines = [
        f"{word} {said.host} {said.protocol}/{said.port}",
        f"rule: {said.rule} ({said.detail})",
        f"from: {SOURCES.get(said.source, said.source)}",
    ]
    if said.remedy:
        lines.append(f"remedy: {said.remedy}")
    return "\n".join(lines)


@app.command()
def log(
    session: Session = None,
    vm: Vm = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")] = False,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Show where a sandbox went or tried to, by which rule, and how often."""
    egress = _egress(api_key, base_url)
    told: dict[str, int] = {}
    while True:
        found = _log(egress, session, vm)
        if as_json and not follow:
            print(json.dumps(found))
            return
        for entry in found.entries:
            key = json.dumps([entry[name] for name in ("name", "address", "port", "protocol", "allowed", "rule")])
            if told.get(key) != entry["count"]:
                print(json.dumps(entry) if as_json else _line(entry), flush=True)
                told[key] = entry["count"]
        if not follow:
            return
        time.sleep(POLL_S)


@app.command()
def suggest(
    session: Session = None, vm: Vm = None, as_json: AsJson = False, api_key: ApiKey = None, base_url: BaseUrl = None
) -> None:
    """The smallest policy under which everything that was tried so far would have been allowed."""
    policy = smallest(_log(_egress(api_key, base_url), session, vm).entries)
    print(json.dumps(policy) if as_json else " ".join(["instavm egress set", *_options(session, vm, policy)]))


def smallest(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The fields of that policy. Registries become the flag, names domains, addresses ranges of one; both ports if unknown."""
    packages, domains, cidrs, ports = False, set[str](), set[str](), set[int]()
    for entry in entries:
        if entry["registry"]:
            packages = True
        elif entry["name"] is not None:
            domains.add(entry["name"])
            if entry["port"] in (80, 443):
                ports.add(entry["port"])
        elif entry["address"] is not None:
            cidrs.add(f"{entry['address']}/32")
    narrow = ports if len(ports) == 1 else set[int]()
    return {
        "allow_package_managers": packages,
        "allow_http": 80 in narrow,
        "allow_https": 443 in narrow,
        "allowed_domains": sorted(domains),
        "allowed_cidrs": sorted(cidrs),
    }


def _options(session: str | None, vm: str | None, policy: dict[str, Any]) -> list[str]:
    flags = {
        "allow_package_managers": "--allow-package-managers",
        "allow_http": "--allow-http",
        "allow_https": "--allow-https",
    }
    target = ["--session", session] if session is not None else ["--vm", str(vm)]
    listed = [["--domain", name] for name in policy["allowed_domains"]] + [
        ["--cidr", c] for c in policy["allowed_cidrs"]
    ]
    return [
        *target,
        *(flag for name, flag in flags.items() if policy[name]),
        *(word for pair in listed for word in pair),
    ]


def _egress(api_key: str | None, base_url: str | None) -> Egress:
    return client(api_key, base_url, auto_start_session=False).egress


def _log(egress: Egress, session: str | None, vm: str | None) -> EgressLog:
    target = _one(session, vm)
    return egress.log(target) if vm is None else egress.log(vm_id=target)


def _one(session: str | None, vm: str | None) -> str:
    """Raises: BadRequest."""
    given = [name for name in (session, vm) if name]
    if len(given) != 1:
        raise BadRequest("--session, --vm", given, "exactly one of them")
    return given[0]


def _show(policy: EgressPolicy, as_json: bool) -> None:
    if as_json:
        print(json.dumps(policy))
        return
    for name, value in policy.items():
        if name != "allow_public_repos":
            text = ", ".join(value) or "-" if isinstance(value, list) else str(value).lower()
            print(f"{name}: {text}")


def _line(entry: dict[str, Any]) -> str:
    word = "allowed" if entry["allowed"] else "refused"
    return f"{word} {entry['name'] or entry['address']} {entry['protocol']}/{entry['port']} {entry['rule']} x{entry['count']}"
