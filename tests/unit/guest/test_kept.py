"""What a task wrote is kept whole while it is small, head and tail when it is not, and told once it has ended."""

from hypothesis import given
from hypothesis import strategies as st

from instavm_guest import frames, kept

END = frames.end_payload(0, 1.0, 1.0, 1, None)


@given(st.lists(st.binary(max_size=2000), max_size=20))
def test_small_output_comes_back_whole(pieces):
    one = kept.Kept(1)
    for piece in pieces:
        one.add(frames.STDOUT, piece)
    one.add(frames.RAN, END)
    told = list(one.so_far())
    assert b"".join(payload for kind, payload in told if kind == frames.STDOUT) == b"".join(pieces)
    assert told[-1] == (frames.RAN, END)


def test_endless_output_stays_bounded_and_keeps_head_and_tail():
    one = kept.Kept(1)
    one.add(frames.STDERR, b"first ")
    for _ in range(200):
        one.add(frames.STDERR, b"x" * frames.CHUNK)
    one.add(frames.STDERR, b" last")
    one.add(frames.RAN, END)
    text = b"".join(payload for kind, payload in one.so_far() if kind == frames.STDERR)
    assert text.startswith(b"first x") and text.endswith(b"x last") and b"bytes left out" in text
    assert len(text) < 2 * kept.HALF_BYTES + 100
    assert all(len(payload) <= frames.CHUNK for _, payload in one.so_far())
    assert frames.read_end(list(one.so_far())[-1][1]) == frames.read_end(END)._replace(flags=frames.CUT)


def test_a_task_that_is_joined_again_is_told_from_the_beginning_and_then_goes_on():
    """The first request's server is gone; the second one misses nothing."""
    heard = []

    def send(kind, request, payload):
        heard.append((tasks.take(kind, request, payload), payload))

    tasks = kept.Tasks(lambda kind, request, payload: heard.append((request, payload)))
    tasks.begin("t", 1)
    send(frames.STDOUT, 1, b"a")
    assert tasks.joined("t", 2)
    send(frames.STDOUT, 1, b"b")
    send(frames.RAN, 1, END)
    assert heard == [(1, b"a"), (2, b"a"), (2, b"b"), (2, END)]
    assert tasks.joined("t", 3)
    assert heard[4:] == [(3, b"ab"), (3, END)]
    assert not tasks.joined("other", 4)


def test_only_the_latest_ended_tasks_are_kept():
    tasks = kept.Tasks(lambda kind, request, payload: None)
    for number in range(kept.ENDED_MAX + 10):
        tasks.begin(f"t{number}", number)
        tasks.take(frames.RAN, number, END)
    tasks.begin("last", 1000)
    assert not tasks.joined("t0", 1001)
    assert tasks.forgotten("t0") and not tasks.forgotten("last") and not tasks.forgotten("new")
    assert tasks.joined(f"t{kept.ENDED_MAX + 9}", 1002)
