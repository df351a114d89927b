"""Languages other than Python, in a real sandbox."""

import pytest

from instavm.contract.executions import Command

pytestmark = pytest.mark.anyio


async def test_javascript_keeps_its_state_and_survives_its_timeouts(sandbox):
    """One sandbox for all of it: Node takes seconds to start under emulation."""

    async def js(code, timeout_s=60.0):
        return await sandbox.node.execute(sandbox.vm_id, Command(code, "javascript", timeout_s))

    assert (await js("const x = 20; let y = 1; function f() { return x + y }")).stdout == ""
    assert (await js("f()")).stdout == "21\n"
    assert (await js("await new Promise(done => setTimeout(() => done([1, {a: 2}]), 5))")).stdout == "[ 1, { a: 2 } ]\n"
    assert (await js("const z = await Promise.resolve(9); z + 1")).stdout == "10\n"
    printed = await js("console.log('out'); console.error('err')")
    assert (printed.stdout, printed.stderr, printed.exit_code) == ("out\n", "err\n", 0)
    assert (await js("require('fs').readFileSync('/etc/hostname', 'utf8').length > 1")).stdout == "true\n"
    failed = await js("function bad() { throw new Error('mine') }\nbad()")
    assert failed.exit_code == 1
    assert failed.stderr.startswith("Uncaught Error: mine\n    at bad (cell7:1:")
    assert "node:" not in failed.stderr and "eval" not in failed.stderr
    assert "SyntaxError" in (await js("function (")).stderr
    assert (await js("process.exit(3)")).exit_code == 3
    for endless in ("while (true) {}", "await new Promise(() => {})"):
        stopped = await js(endless, timeout_s=1)
        assert (stopped.exit_code, stopped.reason) == (124, "timeout")
    assert (await js("f()")).stdout == "21\n"
    lost = await js("process.kill(process.pid, 'SIGKILL')")
    assert (lost.exit_code, lost.signal, lost.reason) == (137, 9, "interpreter_crashed")
    assert (await js("typeof f")).stdout == "'undefined'\n"


async def test_a_language_that_the_image_lacks_is_127_and_a_clear_line(sandbox):
    await sandbox.bash("rm /usr/bin/node /usr/bin/nodejs")
    result = await sandbox.node.execute(sandbox.vm_id, Command("1", "javascript", 30))
    assert (result.exit_code, result.reason) == (127, "interpreter_missing")
    assert result.stderr == "node or nodejs: not found in this image\n"


async def test_sh_is_a_language_too(sandbox):
    result = await sandbox.node.execute(sandbox.vm_id, Command("echo $0; exit 4", "sh", 30))
    assert (result.stdout, result.exit_code) == ("sh\n", 4)


async def test_a_javascript_call_waits_for_what_it_started_and_names_the_owner_of_what_comes_later(sandbox):
    async def js(code, timeout_s=60.0):
        return await sandbox.node.execute(sandbox.vm_id, Command(code, "javascript", timeout_s))

    sleep = "const sleep = (ms) => new Promise((done) => setTimeout(done, ms));"
    done = await js(f"{sleep} async function main() {{ await sleep(200); console.log('done'); }}\nmain();")
    assert (done.stdout, done.stderr, done.exit_code) == ("done\n", "", 0)
    late = await js("sleep(100).then(() => { throw new Error('late') }); undefined")
    assert (late.exit_code, late.stderr.splitlines()[0]) == (1, "Uncaught (in promise) Error: late")
    exited = await js("setTimeout(() => process.exit(3), 100)")
    assert (exited.stdout, exited.stderr, exited.exit_code) == ("", "", 3)
    assert (await js("import { join } from 'node:path';\nconsole.log(join('a', 'b'))")).stdout == "a/b\n"
    assert (await js("(await import('node:path')).sep")).stdout == "'/'\n"
    await sandbox.bash("echo '{\"answer\": 42}' > /app/data.json")
    assert (await js("import data from './data.json' with { type: 'json' }; data.answer")).stdout == "42\n"
    left = await js("setTimeout(() => console.log('between calls'), 300).unref(); undefined")
    assert (left.stdout, left.exit_code) == ("", 0)
    await sandbox.bash("sleep 1")
    assert (await js("console.log('mine')")).stdout == "between calls\nmine\n"


GONE = "the working folder /app cannot be used ({}): nothing was run\n"


@pytest.mark.parametrize(
    ("spoil", "why"), [("rm -rf /app", "No such file or directory"), ("rm -rf /app; touch /app", "Not a directory")]
)
async def test_where_the_working_folder_is_gone_nothing_is_run_elsewhere(sandbox, spoil, why):
    await sandbox.bash(f"cd /; {spoil}")
    for language in ("bash", "sh", "javascript"):
        result = await sandbox.node.execute(sandbox.vm_id, Command("echo; 1", language, 60))
        assert (result.stdout, result.stderr, result.exit_code) == ("", GONE.format(why), 126)
    lost = await sandbox.python("import os; os._exit(3)")
    assert (lost.exit_code, lost.reason) == (3, "interpreter_crashed")
    refused = await sandbox.python("print(1)")
    assert (refused.stdout, refused.exit_code) == ("", 126) and refused.stderr.startswith(GONE.format(why))


async def test_json_is_imported_dynamically_with_attributes(sandbox):
    """Under the image's Node, whose acorn reads no import() with attributes."""
    code = (
        "require('fs').writeFileSync('/app/d.json', JSON.stringify({ k: 1 }));\n"
        "(await import('./d.json', { with: { type: 'json' } })).default.k"
    )
    result = await sandbox.node.execute(sandbox.vm_id, Command(code, "javascript", 60))
    assert result.stdout == "1\n", result.stderr


async def test_a_javascript_cell_that_ends_its_output_ends_it_for_itself_only(sandbox):
    for ends in ("process.stdout.end('bye');", "for (let fd = 0; fd < 3; fd++) require('fs').closeSync(fd);"):
        await sandbox.node.execute(sandbox.vm_id, Command(ends, "javascript", 60))
        result = await sandbox.node.execute(sandbox.vm_id, Command("console.log('heard')", "javascript", 60))
        assert result.stdout == "heard\n"
