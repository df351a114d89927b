"""What a cell shows reaches the host in a shape that it takes, whatever the cell chose."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instavm import limits
from instavm.node import bundles
from instavm.node.agent import Outputs
from instavm_guest import frames, outputs, portable

TEXT = st.text(st.characters(), max_size=40)
"""All of Unicode, halves of characters and NUL included."""
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=20) | st.builds(object)
KEYS = (
    TEXT
    | st.integers()
    | st.none()
    | st.booleans()
    | st.floats()
    | st.tuples(st.integers(), TEXT)
    | st.binary(max_size=5)
)
VALUES = st.recursive(
    LEAVES, lambda within: st.lists(within, max_size=4) | st.dictionaries(KEYS, within, max_size=4), max_leaves=20
)
TYPES = KEYS | st.sampled_from(
    [
        "text/plain",
        "text/html",
        "text/html; charset=utf-8",
        "image/png",
        "image/svg+xml",
        "application/json",
        "html",
        "a/b\n",
    ]
)


def reaches(bundle):
    """The bundle as the host has it, or None."""
    payload = portable.encoded(bundle, lambda note: None)
    if payload is None:
        return None
    host = Outputs()
    host.add(b"\1" + payload)
    return host.kept[0]


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(TYPES, VALUES, max_size=5) | VALUES)
def test_no_output_that_a_cell_can_show_breaks_the_line(bundle):
    kept = reaches(bundle)
    if kept is not None:
        json.dumps(kept, allow_nan=False, ensure_ascii=False).encode()


@given(TEXT)
def test_whole_characters_arrive_as_they_are_and_halves_as_one_that_stands_for_them(text):
    kept = reaches({"text/html": text})["text/html"]
    assert len(kept) <= len(text)
    assert kept == text or any(0xD800 <= ord(one) <= 0xDFFF for one in text)


@pytest.mark.parametrize(
    ("shown", "kept"),
    [
        ({"text/html; charset=utf-8": "x"}, {"text/html": "x"}),
        ({"text/html": b"caf\xc3\xa9"}, {"text/html": "café"}),
        ({"text/html": ["a\n", "b"]}, {"text/html": "a\nb"}),
        ({"text/html": "caf\udce9"}, {"text/html": "caf\ufffd"}),
        ({"application/json": {(1, 2): float("nan")}}, {"application/json": {"(1, 2)": None}}),
        ({"application/json": [1 << 64, -(1 << 63), 1]}, {"application/json": ["18446744073709551616", -(1 << 63), 1]}),
        ({"application/json": {None: True, 1.5: {1}}}, {"application/json": {"null": True, "1.5": [1]}}),
        ({"application/json": 10**5000}, {"application/json": hex(10**5000)}),
        ({"image/png": "iVBO\nRw0K"}, {"image/png": "iVBORw0K"}),
        ({"image/png": "no pixels!", "text/html": "x"}, {"text/html": "x"}),
        ({"html": "x", 5: "x", "text/html": "x"}, {"text/html": "x"}),
        (["text/html"], None),
        ({"image/png": object(), "text/plain": "x"}, None),
    ],
)
def test_what_is_near_to_an_output_becomes_one(shown, kept):
    assert reaches(shown) == kept


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def test_lists_in_lists_are_taken_as_deep_as_the_host_takes_them():
    notes = []
    assert reaches({"application/json": nested(limits.OUTPUT_DEPTH - 1)}) is not None
    assert portable.encoded({"application/json": nested(limits.OUTPUT_DEPTH)}, notes.append) is None
    assert "more than 100 lists or objects in one another" in notes[0]
    assert portable.encoded({"application/json": nested(100_000)}, notes.append) is None


def test_both_sides_have_the_same_limits():
    assert (portable.DEPTH_MAX, portable.INTEGERS) == (limits.OUTPUT_DEPTH, bundles.INTEGERS)
    assert portable.MIME.pattern == bundles.MIME.pattern
    assert outputs.CLEAR == bundles.CLEAR
    assert (outputs.COUNT_MAX, outputs.BYTES_MAX) == (limits.OUTPUTS_MAX, limits.OUTPUTS_BYTES)


@pytest.mark.parametrize(
    "data",
    [
        b'{"html": "x"}',
        b'{"text/html": NaN}',
        b'{"application/json": 1e999}',
        b'{"text/html": "\\udce9"}',
        b'{"application/json": 18446744073709551616}',
        b'{"application/json": ' + b"[" * 101 + b"]" * 101 + b"}",
        b'{"application/json": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[]",
    ],
)
def test_the_host_takes_nothing_else(data):
    with pytest.raises(frames.FrameError):
        bundles.read(data)


def test_what_is_to_be_forgotten_is_forgotten_on_the_host():
    host = Outputs()
    for data in (b'{"text/html": "old"}', json.dumps({bundles.CLEAR: {}}).encode(), b'{"text/html": "new"}'):
        host.add(b"\1" + data)
    assert host.kept == [{"text/html": "new"}]
