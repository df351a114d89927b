"""A line with the host's agent at one end and a test, which plays the guest, at the other."""

import socket
from contextlib import asynccontextmanager

import anyio

from instavm.node.agent import connected
from instavm.node.vmm.line import Line


@asynccontextmanager
async def guest():
    """The agent of the host, and the socket on which the test speaks for the guest."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    stream = await Line.over(ours)
    play = await anyio.abc.UNIXSocketStream.from_socket(theirs)
    try:
        async with connected(stream) as agent:
            yield agent, play
    finally:
        await play.aclose()
