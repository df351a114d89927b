"""The worker of JavaScript cells alone, under the Node that is here: no machine, no agent."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time

import pytest

from instavm_guest.interpreter import LIMIT, javascript
from instavm_guest.programs import memory_file
from instavm_guest.worker import ANSWER, ASK, LINE_FD, SOURCE_FD

NODE = os.environ.get("INSTAVM_TEST_NODE") or shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no Node here; tests/vm/test_languages.py runs the image's own")
TIMEOUT_MS = 60_000
DEADLINE_S = 30


class Worker:
    """A worker process, and the agent's end of its line. pipes: its output goes through pipes, as in a sandbox."""

    def __init__(self, folder, *, pipes=False):
        self.line, theirs = socket.socketpair()
        self.line.settimeout(DEADLINE_S)
        source = memory_file(javascript().source)
        self._out = [(folder / f".{name}").open("w+b") for name in ("stdout", "stderr")]
        ends = [os.pipe() for _ in self._out] if pipes else []
        self._pipes = [read for read, _ in ends]
        high = [os.dup(fd) for fd in (theirs.fileno(), source)]

        def arrange():
            for number, fd in zip(
                (LINE_FD, SOURCE_FD), [os.dup2(fd, 50 + i) for i, fd in enumerate(high)], strict=True
            ):
                os.dup2(fd, number)

        self.process = subprocess.Popen(
            [NODE, *javascript().programs[0][1:]],
            stdin=subprocess.DEVNULL,
            stdout=ends[0][1] if pipes else self._out[0],
            stderr=ends[1][1] if pipes else self._out[1],
            cwd=folder,
            close_fds=False,
            preexec_fn=arrange,
        )
        for fd in (*high, source, *(write for _, write in ends)):
            os.close(fd)
        theirs.close()

    def ask(self, code, timeout_ms=TIMEOUT_MS, **env):
        data = LIMIT.pack(timeout_ms) + code.encode()
        extra = json.dumps(env).encode() if env else b""
        self.line.sendall(ASK.pack(0, len(data), len(extra)) + data + extra)

    def run(self, code, timeout_ms=TIMEOUT_MS):
        """What became of a cell: exit code, what it printed, what it complained of."""
        self.ask(code, timeout_ms)
        return self.answer()

    def interrupt(self, code):
        """What became of a cell that was interrupted once it had printed something."""
        self.ask(code)
        deadline = time.monotonic() + DEADLINE_S
        while not self.printed(0):
            assert time.monotonic() < deadline
        os.kill(self.process.pid, signal.SIGINT)
        return self.answer()

    def answer(self):
        data = b""
        while len(data) < ANSWER.size:
            more = self.line.recv(ANSWER.size - len(data))
            assert more, f"the worker ended: {self.printed(1)}"
            data += more
        return ANSWER.unpack(data)[2], self.printed(0), self.printed(1)

    def printed(self, stream):
        """What came since this was last asked."""
        if self._pipes:
            ready = select.select([self._pipes[stream]], [], [], 0)[0]
            return os.read(self._pipes[stream], 1 << 16).decode() if ready else ""
        seen = getattr(self, f"_seen_{stream}", 0)
        data = os.pread(self._out[stream].fileno(), 1 << 24, seen)
        setattr(self, f"_seen_{stream}", seen + len(data))
        return data.decode(errors="replace")

    def end(self):
        self.line.close()
        try:
            self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait()
            for file in self._out:
                file.close()
            for fd in self._pipes:
                os.close(fd)


@pytest.fixture
def piped(tmp_path):
    worker = Worker(tmp_path, pipes=True)
    yield worker
    worker.end()


@pytest.fixture
def js(tmp_path):
    worker = Worker(tmp_path)
    yield worker
    worker.end()


SLEEP = "const sleep = (ms) => new Promise((done) => setTimeout(done, ms));"


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("async function main() { await sleep(50); console.log('done') }\nmain();", "done\n"),
        (
            "async function main() { await sleep(50); console.log('done') }\nmain(); console.log('first');",
            "first\ndone\n",
        ),
        ("setTimeout(() => console.log('late'), 50)", "late\n"),
        (
            "let n = 0; const t = setInterval(() => { console.log(++n); if (n === 3) clearInterval(t) }, 20)",
            "1\n2\n3\n",
        ),
        ("let k = 0; (function tick() { console.log(++k); if (k < 4) setTimeout(tick, 60) })()", "1\n2\n3\n4\n"),
        ("for (const i of [3, 1, 2]) setTimeout(console.log, i * 30, i); undefined", "1\n2\n3\n"),
        ("setImmediate(() => process.nextTick(() => console.log('x')))", "x\n"),
        ("require('fs').readFile('/etc/hostname', () => console.log('read'))", "read\n"),
        ("require('fs').promises.readFile('/etc/hostname').then(() => console.log('read')); 1", "1\nread\n"),
        ("require('crypto').pbkdf2('a', 'b', 10, 32, 'sha256', () => console.log('hashed'))", "hashed\n"),
        ("require('zlib').gzip('a', () => console.log('zipped'))", "zipped\n"),
        ("require('child_process').exec('sleep 0.1; echo hi', (e, out) => console.log(out.trim()))", "hi\n"),
        ("require('child_process').spawn('sh', ['-c', 'sleep 0.1; echo own'], { stdio: 'inherit' })", "own\n"),
        (
            "const w = new (require('worker_threads').Worker)"
            "(\"setTimeout(() => require('worker_threads').parentPort.postMessage('m'), 50)\", { eval: true });"
            "w.on('message', console.log)",
            "m\n",
        ),
        (
            "const s = require('http').createServer((q, r) => setTimeout(() => r.end('served'), 50));"
            "s.listen(0, async () => { const r = await fetch(`http://127.0.0.1:${s.address().port}`);"
            "console.log(await r.text()); s.close() })",
            "served\n",
        ),
        (
            "const s = require('net').createServer((c) => c.end('sent')); s.listen(0, () => "
            "require('net').connect(s.address().port).on('data', (d) => console.log(String(d))).on('close', () => s.close()))",
            "sent\n",
        ),
        ("sleep(20).then(() => 7)", "7\n"),
        ("new Promise(() => {})", "Promise { <pending> }\n"),
        ("process.once('beforeExit', () => setTimeout(() => console.log('more'), 20)); undefined", "more\n"),
        ("setTimeout(() => console.log('never'), 100000).unref()", ""),
        (
            "const u = require('child_process').spawn('sleep', ['100'], { stdio: 'ignore' }); u.unref(); u.kill()",
            "true\n",
        ),
    ],
)
def test_a_call_ends_when_what_it_started_has_ended(js, code, printed):
    assert js.run(SLEEP) == (0, "", "")
    assert js.run(code) == (0, printed, "")


@pytest.mark.parametrize(
    ("code", "exit_code", "complaint"),
    [
        ("go().catch((e) => { console.error(e.message); process.exit(3) })", 3, "broken\n"),
        ("go()", 1, "Uncaught Error: broken\n    at go (cell1:2:"),
        ("go(); undefined", 1, "Uncaught (in promise) Error: broken\n    at go (cell1:2:"),
        (
            "Promise.reject(new Error('at once')); undefined",
            1,
            "Uncaught (in promise) Error: at once\n    at cell2:1:16\n",
        ),
        (
            "setTimeout(() => { throw new Error('thrown') }, 20)",
            1,
            "Uncaught Error: thrown\n    at Timeout._onTimeout (cell2:1:",
        ),
        ("setTimeout(() => process.exit(5), 20); setInterval(() => {}, 5)", 5, ""),
        ("setTimeout(() => { try { process.exit(6) } catch {} }, 20)", 6, ""),
        ("try { process.exit(4) } catch {} ; while (false);", 4, ""),
        ("process.exitCode = 8; setTimeout(() => {}, 20)", 8, ""),
        ("setTimeout(() => { process.exitCode = 9 }, 20)", 9, ""),
        ("setInterval(() => {}, 5); process.exit(0)", 0, ""),
        ("await sleep(10); go(); undefined", 1, "Uncaught (in promise) Error: broken"),
        ("null.x", 1, "Uncaught TypeError: Cannot read properties of null"),
        ("throw 5", 1, "Uncaught 5\n"),
        (
            "({ get a() { throw 1 }, [Symbol.for('nodejs.util.inspect.custom')]() { throw new Error('shy') } })",
            1,
            "Uncaught Error",
        ),
    ],
)
def test_a_late_failure_is_told_in_its_own_call(js, code, exit_code, complaint):
    js.run(f"{SLEEP}\nasync function go() {{ await sleep(20); throw new Error('broken') }}")
    ended, printed, complaints = js.run(code)
    assert (ended, printed) == (exit_code, "")
    assert complaints.startswith(complaint) and "node:" not in complaints and "instavm" not in complaints
    assert js.run("1 + 1") == (0, "2\n", "")


def test_a_failed_call_takes_its_timers_along(js):
    assert js.run("setTimeout(() => console.log('after'), 60); throw new Error('x')")[0] == 1
    assert (
        js.run(
            "(async () => { for (;;) { await new Promise((d) => setTimeout(d, 5)); console.log('!') } })();"
            "setTimeout(() => process.exit(2), 12)"
        )[0]
        == 2
    )
    js.run("1")
    assert js.run("await new Promise((done) => setTimeout(done, 100))") == (0, "", "")


@pytest.mark.parametrize(
    "code",
    [
        "globalThis.n = 0; setInterval(() => n++, 5)",
        "globalThis.n = 0; (function tick() { n++; setTimeout(tick, 5) })()",
        "globalThis.n = 0; require('fs').watch('.'); setInterval(() => n++, 5)",
    ],
)
def test_what_may_go_on_for_ever_does_not_hold_its_call_for_ever(js, code):
    assert js.run(code, timeout_ms=1000)[0] == 0
    assert js.run("const before = n; await new Promise((done) => setTimeout(done, 100)); n > before")[1] == "true\n"
    assert js.run("setTimeout(() => console.log('mine'), 30)") == (0, "mine\n", "")


def test_a_server_goes_on_for_later_calls_and_holds_none(js):
    serve = "const s = require('http').createServer((q, r) => r.end('up')); s.listen(0); undefined"
    assert js.run(serve) == (0, "", "")
    get = "(await (await fetch(`http://127.0.0.1:${s.address().port}`)).text())"
    assert js.run(get) == (0, "'up'\n", "")
    assert js.run(f"(async () => console.log({get}))(); undefined") == (0, "up\n", "")


def test_a_connection_that_stays_open_goes_on_for_later_calls(js):
    js.run("const net = require('net'); const s = net.createServer((c) => c.on('data', (d) => c.write(d))).listen(0);")
    assert js.run("const c = net.connect(s.address().port); c.on('data', () => {})", timeout_ms=400) == (0, "", "")
    assert js.run("c.write('x'); await new Promise((done) => c.once('data', (d) => done(String(d))))") == (
        0,
        "'x'\n",
        "",
    )


def test_what_an_earlier_call_left_does_not_hold_or_fail_a_later_one(js):
    js.interrupt(
        "setTimeout(() => console.log('on'), 20);"
        "(async () => { for (;;) await new Promise((done) => setTimeout(done, 5)) })(); undefined"
    )
    js.run("setInterval(() => { throw new Error('old') }, 50).unref()")
    ended, printed, complaints = js.run("setTimeout(() => console.log('mine'), 200)")
    assert (ended, printed) == (0, "mine\n")
    assert complaints.startswith("Uncaught Error: old\n    at Timeout._onTimeout (cell2:1:")


def test_a_program_may_listen_for_its_own_errors(js):
    js.run("const fail = (message) => { throw new Error(message) }")
    code = "process.once('uncaughtException', (e) => console.log('caught', e.message)); setTimeout(fail, 10, 'x')"
    assert js.run(code) == (0, "caught x\n", "")
    code = "process.once('unhandledRejection', (e) => console.log('seen', e.message)); (async () => fail('y'))(); undefined"
    assert js.run(code) == (0, "seen y\n", "")
    js.run("process.removeAllListeners()")
    assert js.run("setTimeout(() => { throw new Error('x') }, 10)")[0] == 1


def test_a_waiting_call_can_be_interrupted(js):
    assert js.interrupt("setTimeout(() => console.log('on'), 20); setInterval(() => {}, 100000)") == (
        130,
        "",
        "Interrupted\n",
    )
    assert js.run("1 + 1")[1] == "2\n"


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("import { join } from 'node:path';\nconsole.log(join('a', 'b'))", "a/b\n"),
        ("import fs, { readFileSync as read } from 'fs';\nfs.readFileSync === read", "true\n"),
        ("import * as path from 'path'\n[1].map((x) => path.sep)", "[ '/' ]\n"),
        ("const path = await import('node:path'); path.join('a', 'b')", "'a/b'\n"),
        ("import('node:path').then((p) => console.log(p.sep)); undefined", "/\n"),
        ("import local, { twice } from './local.mjs';\n`${local} ${twice(4)}`", "'default 8'\n"),
        ("import local from './local.mjs'; const z = await Promise.resolve(local); z", "'default'\n"),
        (
            "import 'effect'\nimport named, { one } from 'packed';\n[named, one, require('common').two]",
            "[ 'packed', 1, 2 ]\n",
        ),
        ("(await import('./local.mjs')).default", "'default'\n"),
        (
            "const key = `import a from 'b' with { type: 'x' }`; import l from './local.mjs'; key.length + l.length",
            "43\n",
        ),
        ("import { default as d, twice as 'odd' } from './local.mjs'", None),
        ("/* first */ import './local.mjs'; import.meta.url.startsWith('file:///')", "true\n"),
        ("import.meta.dirname === process.cwd() && import.meta.dirname === __dirname", "true\n"),
        ("import { fileURLToPath } from 'url'; fileURLToPath(import.meta.url) === __filename", "true\n"),
        ("require.main === module", "true\n"),
        ("require('./data.json').answer + require('common').two", "44\n"),
        ("process.argv.slice(2)", "[]\n"),
        ("#!/usr/bin/env node\n5", "5\n"),
        ("\ufeffimport { sep } from 'path'; sep", "'/'\n"),
    ],
)
def test_modules_can_be_imported(js, modules, code, printed):
    ended, output, complaints = js.run(code)
    if printed is None:
        assert ended == 1 and "SyntaxError" in complaints
    else:
        assert (ended, output, complaints) == (0, printed, "")


@pytest.fixture
def modules(tmp_path):
    (tmp_path / "local.mjs").write_text("export default 'default';\nexport const twice = (x) => 2 * x;\n")
    (tmp_path / "data.json").write_text('{"answer": 42}')
    for name, kind, text in (
        ("packed", "module", "export default 'packed'; export const one = 1;"),
        ("effect", "module", "globalThis.effect = 1;"),
        ("common", "commonjs", "module.exports = { two: 2 };"),
    ):
        folder = tmp_path / "node_modules" / name
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"name": name, "type": kind, "main": "index.js"}))
        (folder / "index.js").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "how",
    [
        "import d from './data.json' with { type: 'json' }; d.answer",
        "import d from './data.json' assert { type: 'json' }; d.answer",
        "(await import('./data.json', { with: { type: 'json' } })).default.answer",
    ],
)
def test_json_can_be_imported(js, modules, how):
    assert js.run(how)[:2] == (0, "42\n")


def test_imported_names_stay_and_can_be_imported_again(js, modules):
    assert js.run("import fs from 'fs'; import { twice } from './local.mjs'") == (0, "", "")
    assert js.run("import fs from 'fs'; import { twice } from './local.mjs'; twice(2)") == (0, "4\n", "")
    assert js.run("const path = require('path')\nlet mine = 1") == (0, "", "")
    assert js.run("import path from 'path'; path.sep") == (0, "'/'\n", "")
    assert js.run("const twice = 3; twice") == (0, "3\n", "")
    ended, _, complaint = js.run("import mine from './local.mjs'")
    assert (ended, complaint.split("\n")[0]) == (1, "Uncaught SyntaxError: Identifier 'mine' has already been declared")
    assert js.run("mine") == (0, "1\n", "")


def test_paths_are_those_of_the_working_directory_as_it_is_now(js, modules):
    (modules / "below").mkdir()
    (modules / "below" / "here.mjs").write_text("export default 'below'")
    (modules / "below" / "here.cjs").write_text("module.exports = 'required'")
    js.run("process.chdir('below')")
    assert js.run("import b from './here.mjs'; [b, require('./here.cjs'), require('path').basename(__dirname)]") == (
        0,
        "[ 'below', 'required', 'below' ]\n",
        "",
    )
    assert js.run("(await import('./here.mjs')).default + (await import('packed')).one")[1] == "'below1'\n"


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (
            "export const x = 1",
            "SyntaxError: a cell cannot export: what it declares is there in every later cell\n    at cell1:1:1",
        ),
        (
            "import { nothing } from 'packed'",
            "SyntaxError: The requested module 'packed' does not provide an export named 'nothing'",
        ),
        ("import x from 'absent'", "Error [ERR_MODULE_NOT_FOUND]: Cannot find package 'absent'"),
        ("import x from './absent.mjs'", "Error [ERR_MODULE_NOT_FOUND]: Cannot find module"),
        ("import fs from 'fs';\nlet x = = 3", "SyntaxError: Unexpected token\n    at cell1:2:9"),
        ("await import('./absent.mjs')", "Error [ERR_MODULE_NOT_FOUND]: Cannot find module"),
        ("function (", "cell1:1\nfunction ("),
    ],
)
def test_what_cannot_be_imported_is_told_plainly(js, modules, code, complaint):
    ended, printed, complaints = js.run(code)
    assert (ended, printed) == (1, "")
    assert complaints.startswith(f"Uncaught {complaint}")
    assert js.run("1 + 1")[1] == "2\n"


def test_a_cell_that_replaces_what_the_worker_uses_breaks_no_later_cell(js):
    js.run("globalThis.process = globalThis.Buffer = globalThis.Promise = globalThis.setTimeout = null;")
    js.run("globalThis.setImmediate = globalThis.performance = globalThis.Object = globalThis.JSON = undefined;")
    assert js.run("1 + 1") == (0, "2\n", "")
    assert js.run("null.x")[0] == 1


def test_a_working_folder_that_is_gone_breaks_no_cell(js, modules):
    for file in sorted(modules.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    modules.rmdir()
    assert js.run("1 + 1")[:2] == (0, "2\n")
    assert "Cannot find module './local.mjs'" in js.run("require('./local.mjs')")[2]


@pytest.mark.parametrize(
    "ends",
    [
        "process.stdout.end('bye');",
        "process.stdout.destroy();",
        "await require('stream/promises').pipeline(require('stream').Readable.from(['bye']), process.stdout)",
        "require('fs').closeSync(1);",
        "process.stdout.end(); process.stdout.end(); require('fs').closeSync(1);",
        "require('fs').closeSync(0); require('fs').closeSync(1); require('fs').closeSync(2);",
        "require('fs').closeSync(1); require('fs').openSync('taken', 'w');",
    ],
)
def test_a_cell_that_ends_its_output_ends_it_for_itself_only(piped, ends):
    piped.run(ends)
    started = "require('child_process').execSync('echo child', {stdio: 'inherit'})"
    for _ in range(2):
        said = piped.run(f"console.log('heard'); console.error('too'); process.stdout.write('!'); {started}; 'value'")
        assert said[1:] == ("heard\n!child\n'value'\n", "too\n")


def test_json_is_imported_dynamically_with_attributes(js):
    js.run("require('fs').writeFileSync('d.json', '{\"k\": 1}')")
    assert js.run("(await import('./d.json', { with: { type: 'json' } })).default.k")[:2] == (0, "1\n")
