"""What a result keeps of a stream: all of it while it fits, head and tail when not."""

from hypothesis import given
from hypothesis import strategies as st

from instavm.node.agent import Capture


@given(st.lists(st.binary(max_size=50), max_size=30))
def test_head_and_tail_are_kept_and_the_rest_is_counted(pieces):
    whole = b"".join(pieces)
    capture = Capture(limit=100)
    for piece in pieces:
        capture.add(piece)
    text = capture.text()
    if len(whole) <= 100:
        assert text == whole.decode(errors="replace")
        assert capture.left_out == 0
    else:
        assert capture.left_out == len(whole) - 100
        assert text.startswith(whole[:50].decode(errors="replace"))
        assert text.endswith(whole[-50:].decode(errors="replace"))
        assert f"{len(whole) - 100} bytes left out" in text


def test_memory_stays_bounded_while_a_stream_goes_on():
    capture = Capture(limit=1000)
    for _ in range(10_000):
        capture.add(b"x" * 1000)
    assert len(capture._head) + len(capture._tail) <= 3000
    assert capture.text().count("x") == 1000


def test_bytes_that_are_not_utf8_are_replaced():
    capture = Capture()
    capture.add(b"a\xff\xfeb")
    assert capture.text() == "a\ufffd\ufffdb"
