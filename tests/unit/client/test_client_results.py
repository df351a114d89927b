"""What a result can do: say how it came to be, save its images, show itself in a notebook."""

import base64

import pytest

from instavm.client.explain import REMEDIES, explain
from instavm.client.results import Execution
from instavm_guest.frames import REASONS

PNG = b"\x89PNG\r\n"


def result(**more):
    base = {"stdout": "out\n", "stderr": "", "exit_code": 0, "execution_time": 2.0, "reason": None, "outputs": []}
    return Execution({**base, **more})


def test_images_are_saved_in_order_and_nothing_else_is(tmp_path):
    outputs = [
        {"image/png": base64.b64encode(PNG).decode(), "text/plain": "figure"},
        {"text/html": "<b/>"},
        {"image/svg+xml": "<svg/>"},
    ]
    files = result(outputs=outputs).save_images(tmp_path / "new")
    assert [file.name for file in files] == ["output-1.png", "output-3.svg"]
    assert [file.read_bytes() for file in files] == [PNG, b"<svg/>"]
    assert Execution(stdout="", stderr="").save_images(tmp_path) == []


def test_a_notebook_shows_the_last_output_and_what_was_printed():
    shown = result(outputs=[{"text/html": "1"}, {"text/html": "2"}])._repr_mimebundle_()
    assert shown == {"text/html": "2", "text/plain": "out\n"}
    assert result()._repr_mimebundle_() == {"text/plain": "out\n"}


def test_every_reason_that_a_guest_may_give_has_its_sentence():
    assert set(REMEDIES) >= {*filter(None, REASONS)} | {"vm_lost"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "without an error"),
        ({"exit_code": 1, "stderr": "Traceback …\nValueError: bad\n"}, "ValueError: bad"),
        ({"exit_code": 124, "reason": "timeout"}, "after 2 s; give it a longer timeout"),
        ({"exit_code": 137, "reason": "oom", "peak_memory_bytes": 300 << 20}, "300 MB); start the session with"),
        ({"exit_code": 139, "signal": 11, "reason": "interpreter_crashed"}, "signal SIGSEGV"),
        ({"exit_code": None, "reason": "vm_lost"}, "may or may not have finished"),
    ],
)
def test_a_result_is_explained_in_one_sentence(more, words):
    told = explain(result(**more))
    assert words in told
    assert told.endswith(".") or "bad" in told


REFUSAL = {
    "name": "index.test",
    "address": None,
    "port": 53,
    "protocol": "dns",
    "rule": "no_rule",
    "count": 6,
    "registry": True,
}
ADDRESS = {**REFUSAL, "name": None, "address": "192.0.2.1", "port": 22, "protocol": "tcp", "registry": False}


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            [REFUSAL],
            [
                "Egress refused to look up index.test",
                "(no_rule)",
                "allow_package_managers=True",
                "--allow-package-managers",
            ],
        ),
        ([ADDRESS], ["a connection to 192.0.2.1:22", "allowed_cidrs=['192.0.2.1/32']", "--cidr 192.0.2.1/32"]),
        ([ADDRESS, REFUSAL], ["index.test (and 1 more, see result.refused)"]),
        ([{**REFUSAL, "rule": "bad_name", "name": "a\\x00b"}], ["bad_name"]),
    ],
)
def test_what_egress_refused_is_explained_whatever_the_exit_code(refused, words):
    for code in (0, 1):
        told = explain(result(exit_code=code, refused=refused))
        assert all(word in told for word in words), told


def test_an_older_server_tells_of_no_refusals():
    assert explain(result()) == explain(result(refused=[])) == explain(result(refused=None))
