"""Whatever is in an image, it becomes a sandbox: the Pythons from 3.8 on, and Alpine. Each is booted once, by its build."""

import json

import pytest
import pythons
from builds import built, started
from oci_made import busybox, layout

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RICH = """class Rich:
    def _repr_html_(self):
        return "<b>rich</b>"
Rich()"""


@pytest.fixture
def client(module_servers):
    client = module_servers.client(auto_start_session=False)
    yield client
    for one in client.list_sandboxes():
        client.kill(one["session_id"])
    for one in client.snapshots.list():
        client.snapshots.delete(one["id"])


def sandbox(client, image):
    snapshot, log = built(client, image)
    assert snapshot.status == "ready", log
    vm = started(client, snapshot.snapshot_id)
    assert vm.get_session_info()["start"]["cold"] is False, "the build has booted it"
    return vm


def printed(vm, code, **more):
    result = vm.execute(code, **more)
    assert (result.exit_code, result.stderr) == (0, ""), result
    return result.stdout


def check_python(vm, version):
    """All that a cell can do, in a Python with nothing but its standard library."""
    assert printed(vm, "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)") == (
        f"{version} /usr/local/bin/python3\n"
    )
    vm.execute("x = 41")
    assert printed(vm, "x += 1\nx") == "42\n"
    assert printed(vm, "!echo shell $((40 + 2))") == "shell 42\n"
    assert printed(vm, "import asyncio\nawait asyncio.sleep(0, 'slept')") == "'slept'\n"
    assert printed(vm, "import ssl, json; print(json.dumps({'a': 1}))") == '{"a": 1}\n'
    rich = vm.execute(RICH)
    assert [one["text/html"] for one in rich.outputs] == ["<b>rich</b>"], rich
    failed = vm.execute("def f():\n    return 1 / 0\n\nf()")
    assert failed.exit_code == 1 and "instavm" not in failed.stderr
    assert "line 4, in <module>\n    f()" in failed.stderr and "ZeroDivisionError: division by zero" in failed.stderr
    streamed = list(vm.stream("import sys\nprint('out')\nprint('err', file=sys.stderr)"))
    assert {one.type: one.text for one in streamed[:-1]} == {"stdout": "out\n", "stderr": "err\n"}
    assert streamed[-1].result.exit_code == 0
    no_pip = vm.execute("%pip install iniconfig")
    assert no_pip.exit_code == 1 and "No module named pip" in no_pip.stderr
    magic = vm.execute("%timeit 1")
    assert "%timeit needs IPython, which this image's Python does not have" in magic.stderr
    assert printed(vm, "x") == "42\n", "nothing of that has cost the interpreter its state"


@pytest.mark.slow
@pytest.mark.parametrize("version", pythons.WHEELS)
def test_a_python_of_any_version(client, tmp_path, version):
    vm = sandbox(client, layout(tmp_path / "layout", busybox(), pythons.python(version), env=[PATH]))
    check_python(vm, version)


@pytest.mark.slow
def test_alpine_with_a_python_of_musl(client, tmp_path):
    vm = sandbox(client, layout(tmp_path / "layout", pythons.alpine(), pythons.musl_python(), env=[PATH]))
    assert printed(vm, "cat /etc/alpine-release; pwd", language="sh") == f"{pythons.ALPINE_VERSION}\n/app\n"
    assert "musl" in printed(vm, "apk info -e musl && ls -l /lib/libc.musl-x86_64.so.1", language="sh")
    libraries = json.loads(
        printed(vm, "import json; print(json.dumps([l.split()[-1] for l in open('/proc/self/maps') if '/' in l]))")
    )
    assert "/lib/ld-musl-x86_64.so.1" in libraries and not [one for one in libraries if one.endswith("/libc.so.6")]
    check_python(vm, "3.13")
    for language, word in (("bash", "bash"), ("javascript", "node or nodejs")):
        missing = vm.execute("1", language=language)
        assert (missing.exit_code, missing.stderr) == (127, f"{word}: not found in this image\n")
