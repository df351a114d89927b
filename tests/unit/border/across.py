"""A node behind the border, both ends in this process."""

import socket
from contextlib import asynccontextmanager

import anyio

from instavm.border.remote import connected
from instavm.border.service import serve


@asynccontextmanager
async def across(node):
    ours, theirs = socket.socketpair()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, node, theirs)
        async with connected(ours) as remote:
            yield remote
