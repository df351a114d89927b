"""What a build does inside its sandbox: the commands, in order, that add to an image what was asked for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

REPOSITORY: Final = "/app/repo"


@dataclass(frozen=True, slots=True)
class Step:
    """A shell command; the sandbox has only what the image has."""

    name: str
    command: str


def steps(args: Mapping[str, Any]) -> list[Step]:
    """In the order in which later ones may need earlier ones: packages of system and languages, sources, the user's own."""
    found = []
    if words := _words(args, "extra_apt_packages"):
        found.append(
            Step(
                "apt packages",
                "export DEBIAN_FRONTEND=noninteractive; apt-get update -q && "
                f"apt-get install -q -y --no-install-recommends -- {words} && rm -rf /var/lib/apt/lists/*",
            )
        )
    if words := _words(args, "extra_pip_packages"):
        pip = "$(command -v python3 || command -v python || echo python3) -m pip"
        found.append(Step("pip packages", f"{pip} install --no-cache-dir --disable-pip-version-check {words}"))
    if words := _words(args, "extra_npm_packages"):
        found.append(Step("npm packages", f"npm install --global --no-fund --no-audit -- {words}"))
    if args.get("git_clone_url"):
        branch = f"--branch {shlex.quote(args['git_clone_branch'])} " if args.get("git_clone_branch") else ""
        url = shlex.quote(args["git_clone_url"])
        found.append(Step("git clone", f"git clone --depth 1 {branch}-- {url} {REPOSITORY}"))
    if args.get("post_build_cmd"):
        found.append(Step("post_build_cmd", str(args["post_build_cmd"])))
    return found


def _words(args: Mapping[str, Any], name: str) -> str:
    return " ".join(shlex.quote(word) for word in (args.get(name) or "").split())
