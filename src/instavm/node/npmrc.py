"""Which registries npm is set up for, found as npm finds them and without starting it: under emulation that takes half a minute.

npm reads its defaults, then the npmrc of its own package, of the system, the user and the project, then the environment; what
is read later wins. A few lines of shell tell what stands there. What they can't make sense of, npm itself is asked.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Final

Run = Callable[[str], Awaitable[str]]
"""Runs shell code in the image: what it printed, nothing if it failed."""

SHOW: Final = r"""show() { printf '\036%s\n' "$1"; [ ! -f "$1" ] || cat "$1"; echo; }
"""
FACTS: Final = (
    SHOW
    + r"""npm=$(command -v npm) && node=$(command -v node || command -v nodejs) || exit 1
root=$(readlink -f "$npm"); root=${root%/bin/npm-cli.js}
node=$(readlink -f "$node")
[ -f "$root/bin/npm-cli.js" ] || exit 1
here=$PWD; at=$PWD
while :; do
    if [ -e "$at/package.json" ] || [ -e "$at/node_modules" ]; then here=$at; break; fi
    [ -n "$at" ] || break
    at=${at%/*}
done
printf '\036default\n'
for file in "$root/lib/utils/config/definitions.js" "$root/lib/config/defaults.js" \
        "$root/node_modules/@npmcli/config/lib/definitions/definitions.js" \
        "${root%/*}/@npmcli/config/lib/definitions/definitions.js"; do
    if [ -f "$file" ]; then grep -E -A 2 "registry['\"]?[,:] *(new|\{|['\"])" "$file"; break; fi
done
printf '\036environment\n'; env
printf '\036places\n%s\n' "${node%/*/*}"
for file in "$root/npmrc" "$here/.npmrc"; do printf '\036file\n'; [ ! -f "$file" ] || cat "$file"; echo; done
:"""
)
ASK_NPM: Final = "command -v npm >/dev/null && npm config list --json"
"""The slow way."""
DEFAULT: Final = re.compile(r"""(?<![-\w])registry['"]?\s*[,:][^}]*?['"](https?://[^'"\s]+)['"]""")
REFERENCE: Final = re.compile(r"(?<!\\)(\\*)\$\{([^${}?]+)(\??)\}")

Layer = Mapping[str, str]


async def registries(run: Run) -> list[str]:
    """The registry for everything, and those for scopes; none without npm."""
    told = _sections(await run(FACTS))
    default = DEFAULT.search("".join(told.get("default", ())))
    if default is None or len(told.get("file", ())) != 2:
        return _of_npm(await run(ASK_NPM))
    environment = dict(line.split("=", 1) for line in told["environment"][0].splitlines() if "=" in line)
    builtin, project = (dict(_ini(text, environment)) for text in told["file"])
    given = dict(_of_environment(environment))

    async def read(path: str) -> Layer:
        found = _sections(await run(SHOW + f"show {shlex.quote(path)}"))
        return dict(_ini("".join(found.get(path, ())), environment))

    home = environment.get("HOME", "/root")
    user = await read(_absolute(_last("userconfig", builtin, project, given), home) or f"{home}/.npmrc")
    prefix = environment.get("PREFIX") or environment.get("DESTDIR", "") + told["places"][0].strip()
    prefix = _absolute(_last("prefix", builtin, user, project, given), home) or prefix
    globally = _absolute(_last("globalconfig", builtin, user, project, given), home) or f"{prefix}/etc/npmrc"
    return effective(default[1], builtin, await read(globally), user, project, given)


def effective(default: str, *layers: Layer) -> list[str]:
    """Of layers, of which later ones win."""
    scoped = {key: value for layer in layers for key, value in layer.items() if key.endswith(":registry")}
    metrics = _last("metrics-registry", *layers)
    return [_last("registry", *layers) or default, *([metrics] if metrics else []), *scoped.values()]


def _sections(text: str) -> dict[str, list[str]]:
    """What was shown, by name; several of one name in order."""
    found: dict[str, list[str]] = {}
    for part in text.split("\036")[1:]:
        name, _, body = part.partition("\n")
        found.setdefault(name, []).append(body)
    return found


def _ini(text: str, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The pairs of an npmrc before its first section; those of a section are none of npm's settings."""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            return
        key, equals, value = line.partition("=")
        if equals and line[0] not in ";#":
            yield _expanded(_unquoted(key), environment), _expanded(_unquoted(value), environment)


def _unquoted(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        inner = text[1:-1] if text[0] == "'" else text
        try:
            told = json.loads(inner)
        except ValueError:
            return inner
        return told if isinstance(told, str) else inner
    plain = re.split(r"(?<!\\)[;#]", text, maxsplit=1)[0]
    return re.sub(r"\\([\\;#])", r"\1", plain).strip()


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        escapes, name, optional = found.groups()
        if len(escapes) % 2:
            return found[0][(len(escapes) + 1) // 2 :]
        return escapes[len(escapes) // 2 :] + environment.get(name, "" if optional else f"${{{name}}}")

    return REFERENCE.sub(value, text)


def _of_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in environment.items():
        if name.lower().startswith("npm_config_") and value:
            key = name[len("npm_config_") :]
            yield key if key.startswith("//") else (key[0] + key[1:].replace("_", "-")).lower(), value


def _last(name: str, *layers: Layer) -> str | None:
    return next((layer[name] for layer in reversed(layers) if layer.get(name)), None)


def _absolute(path: str | None, home: str) -> str | None:
    return path if path is None or not path.startswith("~/") else home + path[1:]


def _of_npm(said: str) -> list[str]:
    try:
        told = json.loads(said or "{}")
    except ValueError:
        return []
    return [str(value) for key, value in told.items() if key.endswith("registry")] if isinstance(told, dict) else []
