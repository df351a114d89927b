"""Text of a user goes through unchanged, or is refused with InvalidInput that names its argument: all of Unicode."""

import json
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instavm.client.calls import egress, executions, files, isolation, processes, sessions, snapshots, tasks, vms
from instavm.client.config import Config
from instavm.client.streaming import Reader
from instavm.errors import AuthenticationError, InvalidInput

ODD = ("\ud800", "a\0b", "\udcff.txt", "~/x", "\u2028", "%", "\x85")
TEXT = st.text(st.characters(exclude_categories=())) | st.sampled_from(ODD)
"""Surrogates and NUL with the rest."""
ID = "0b0f7c7e-0000-4000-8000-000000000000"
SIZES = {"lifetime_s": 300, "cpu_count": None, "memory_mb": None}


def encodes(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def body(call):
    return json.loads(call.body)


def sent(make, argument, read, text):
    """What `read` finds of `text` in the call that `make` makes of it; `text` itself, when it is refused by name."""
    try:
        call = make(text)
    except InvalidInput as exc:
        assert exc.field == argument
        assert str(exc).encode()
        return text
    assert encodes(call.path) and all(encodes(value) for value in call.params.values())
    return read(call)


WAYS = {
    "execute": (lambda t: executions.execute(ID, t, "python", None), "code", lambda c: body(c)["command"]),
    "execute_async": (lambda t: tasks.begin(ID, t, "python", None), "code", lambda c: body(c)["command"]),
    "stream": (lambda t: Reader(ID, t, "python", None).call(), "code", lambda c: body(c)["command"]),
    "language": (lambda t: executions.execute(ID, "1", t, None), "language", lambda c: body(c)["language"]),
    "argv": (lambda t: processes.start(ID, ["a", t], "bash", None, None), "command", lambda c: body(c)["command"][1]),
    "line": (lambda t: processes.start(ID, t, "bash", None, None), "command", lambda c: body(c)["command"]),
    "cwd": (lambda t: processes.start(ID, "a", "bash", t, None), "cwd", lambda c: body(c)["cwd"]),
    "process env": (
        lambda t: processes.start(ID, "a", "bash", None, {"A": t}),
        "env",
        lambda c: body(c)["env"]["A"],
    ),
    "download": (lambda t: files.download(ID, t), "filename", lambda c: body(c)["filename"]),
    "vm name": (lambda t: vms.create(snapshot_name=t), "snapshot_name", lambda c: body(c)["snapshot_name"]),
    "snapshot name": (lambda t: vms.snapshot("vm", name=t), "name", lambda c: body(c)["name"]),
    "image": (lambda t: snapshots.create(t), "oci_image", lambda c: body(c)["oci_image"]),
    "kill": (lambda t: sessions.kill(t), "session_id", lambda c: body(c)["session_id"]),
    "session": (lambda t: sessions.info(t), "session_id", lambda c: last(c)),
    "vm": (lambda t: vms.get(t), "vm_id", lambda c: last(c)),
    "snapshot": (lambda t: snapshots.get(t), "snapshot_id", lambda c: last(c)),
    "task": (lambda t: tasks.get(t), "task_id", lambda c: last(c)),
    "cancel": (lambda t: executions.cancel(t), "execution_id", lambda c: unquote(c.path.split("/")[3])),
    "isolation": (lambda t: isolation.get(t), "vm_id", lambda c: unquote(c.path.split("/")[3])),
    "policy": (lambda t: egress.get("session", t), "session_id", lambda c: last(c)),
    "metadata value": (
        lambda t: sessions.create("key", sessions.wanted(**SIZES, env=None, metadata={"a": [t]})),
        "metadata",
        lambda c: body(c)["metadata"]["a"][0],
    ),
    "metadata name": (
        lambda t: sessions.create("key", sessions.wanted(**SIZES, env=None, metadata={t: 1})),
        "metadata",
        lambda c: next(iter(body(c)["metadata"])),
    ),
    "filter": (
        lambda t: sessions.sandboxes({"a": t}, 5),
        "metadata",
        lambda c: json.loads(c.params["metadata"])["a"],
    ),
    "snapshot type": (lambda t: snapshots.list_(t), "type", lambda c: c.params["type"]),
}


def last(call):
    return unquote(call.path.rsplit("/", 1)[1])


@pytest.mark.parametrize("way", WAYS)
@given(text=TEXT)
def test_text_goes_through_unchanged_or_is_refused_by_name(way, text):
    make, argument, read = WAYS[way]
    aliases = {"node": "javascript", "js": "javascript"} if way == "language" else {}
    assert sent(make, argument, read, text) == aliases.get(text, text)


@given(name=TEXT, value=TEXT)
def test_environments_go_through_unchanged_or_are_refused(name, value):
    call = lambda env: sessions.create("key", sessions.wanted(**SIZES, env=env, metadata=None))  # noqa: E731
    assert sent(call, "env", lambda c: body(c)["env"], {name: value}) == {name: value}


@given(path=TEXT, name=TEXT.filter(lambda name: name and "/" not in name and "\0" not in name and name not in (".", "..")))
def test_forms_hold_names_and_paths_as_they_are(path, name):
    try:
        _, around = files.upload(ID, files.PurePath("/x", name), path)
    except InvalidInput as exc:
        assert exc.field in ("remote_path", "file_path", "file_name")
        return
    assert path.encode() in around.head
    assert not encodes(name) or f'name="file_name"\r\n\r\n{name}\r\n'.encode() in around.head


@given(TEXT)
def test_what_a_client_is_made_of_is_taken_or_refused(text):
    for given_ in ({"api_key": text, "base_url": "http://x"}, {"api_key": "key", "base_url": text or "x"}):
        try:
            Config.of(**given_, timeout=300, max_retries=0, cpu_count=None, memory_mb=None, env=None, metadata=None)
        except (AuthenticationError, InvalidInput) as exc:
            assert str(exc).encode()


def test_a_list_that_is_none_is_said_to_be_meant_as_one():
    for name in ("allowed_domains", "allowed_cidrs"):
        with pytest.raises(InvalidInput, match=f"{name}: 'example.com' is not allowed; allowed: a list of"):
            egress.put("session", ID, {name: "example.com"})
    for name in ("env", "metadata"):
        with pytest.raises(InvalidInput, match=rf"{name}: .*an object \(a dict\)"):
            sessions.wanted(**{**SIZES, "env": None, "metadata": None, name: "A=1"})
    for command in (5, None, {"ls"}, b"ls", ["ls", 5]):
        with pytest.raises(InvalidInput, match="command"):
            processes.start(ID, command, "bash", None, None)


@pytest.mark.parametrize("wrong", [{"a": {1, 2}}, {"a": object()}, {"a": float("nan")}, {1: 2}, "text", 5])
def test_metadata_that_is_no_json_is_refused(wrong):
    with pytest.raises(InvalidInput, match="metadata"):
        sessions.wanted(**SIZES, env=None, metadata=wrong)
    with pytest.raises(InvalidInput, match="metadata"):
        sessions.sandboxes(wrong, 5)
