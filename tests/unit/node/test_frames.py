"""The decoder is the wall between host and guest: whole frames come out, anything else is refused at once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instavm_guest import frames

FRAME = st.tuples(st.sampled_from(sorted(frames.FROM_GUEST)), st.integers(0, 2**32 - 1), st.binary(max_size=200))


def decoder(payload_max=1000):
    return frames.Decoder(frames.FROM_GUEST, payload_max)


@given(st.lists(FRAME, max_size=8), st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_frames_survive_however_the_bytes_are_cut(sent, cuts):
    """What was encoded comes out the same, whole and in order, no matter how it arrived."""
    data = b"".join(frames.encode(*frame) for frame in sent)
    reading, got, at = decoder(), [], 0
    for cut in cuts:
        got += reading.feed(data[at : at + cut])
        at += cut
    got += reading.feed(data[at:])
    assert got == sent


@given(st.binary(max_size=400))
def test_no_bytes_make_it_fail_in_any_other_way(data):
    """Arbitrary bytes either are frames or raise FrameError."""
    try:
        for kind, _, payload in decoder().feed(data):
            assert kind in frames.FROM_GUEST
            assert len(payload) <= 1000
    except frames.FrameError:
        pass


@given(st.binary(max_size=300))
def test_a_payload_is_one_json_object_or_refused(payload):
    try:
        message = frames.decode_json(payload)
    except frames.FrameError:
        return
    assert json.loads(payload) == message


def test_a_length_over_the_limit_is_refused_before_its_bytes_come():
    """A guest that announces 4 GiB is refused on its header; nothing is collected for it."""
    header = frames.HEADER.pack(frames.MAGIC, frames.STDOUT, 0, 1, 2**32 - 1)
    with pytest.raises(frames.FrameError, match="4294967295 bytes; at most 1000"):
        decoder().feed(header)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (frames.HEADER.pack(0, frames.STDOUT, 0, 1, 0), "bad magic"),
        (frames.HEADER.pack(frames.MAGIC, frames.STDOUT, 1, 1, 0), "reserved field 1"),
        (frames.HEADER.pack(frames.MAGIC, frames.EXECUTE, 0, 1, 0), "not allowed in this direction"),
        (frames.HEADER.pack(frames.MAGIC, 200, 0, 1, 0), "kind 200"),
    ],
)
def test_a_bad_header_is_named(header, complaint):
    with pytest.raises(frames.FrameError, match=complaint):
        decoder().feed(header)


def test_deep_json_is_refused_and_not_a_crash():
    with pytest.raises(frames.FrameError):
        frames.decode_json(b"[" * 100_000)
