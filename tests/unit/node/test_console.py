"""The tail of a guest's console: text that can be shown, whatever the guest wrote."""

from hypothesis import given
from hypothesis import strategies as st

from instavm.node.console import LINE_CHARS, LINES, tail


def test_the_last_lines_are_kept_without_escape_sequences():
    text = "".join(f"line {n}\r\n" for n in range(100)) + "\x1b[31mred\x1b[0m \x1b]0;title\x07end\x00\x07\n\n"
    assert tail(text).splitlines() == [*(f"line {n}" for n in range(81, 100)), "red end"]


@given(st.text(st.characters(), max_size=2000))
def test_it_is_bounded_and_printable(text):
    lines = tail(text).split("\n")
    assert len(lines) <= LINES
    assert all(len(line) <= LINE_CHARS and all(char.isprintable() or char == "\t" for char in line) for line in lines)
