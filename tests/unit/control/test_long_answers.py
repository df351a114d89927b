"""A long answer goes out in pieces, whole and in order."""

import anyio
import pytest

from instavm.control.api.long import PIECE_BYTES, Long


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, 3 * PIECE_BYTES + 7])
def test_all_of_it_arrives(size):
    body, told = (bytes(range(251)) * (size // 251 + 1))[:size], []

    async def send(message):
        told.append(message)

    anyio.run(lambda: Long(body)({"type": "http"}, None, send))
    head, *rest = told
    assert dict(head["headers"])[b"content-length"] == str(size).encode()
    assert b"".join(message["body"] for message in rest) == body
    assert [message.get("more_body", False) for message in rest] == [True] * (len(rest) - 1) + [False]
    assert all(len(message["body"]) <= PIECE_BYTES for message in rest)
