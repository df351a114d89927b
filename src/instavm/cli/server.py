"""`instavm serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from instavm.settings import Settings


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any that is free.")] = 8080,
    uds: Annotated[Path | None, typer.Option(help="Listen on this Unix socket instead, for this user only.")] = None,
) -> None:
    """Serve the API until SIGTERM or Ctrl-C; every sandbox is ended then, unless INSTAVM_ON_SHUTDOWN=leave.

    API keys: `instavm key create`. Its address is printed once it answers.
    """
    from instavm import serve as server  # noqa: PLC0415 (the server's libraries are an extra)
    from instavm.control import listen  # noqa: PLC0415

    if uds is not None:
        listener = listen.Listener(listen.on_socket(uds.absolute()), private=True)
    else:
        listener = listen.Listener(listen.on_tcp(host, port), private=False)
    where = uds or f"http://{host}:{listener.socket.getsockname()[1]}"
    status = server.run(Settings(), listener, ready=lambda: print(f"InstaVM on {where}", flush=True))
    raise typer.Exit(1 if status else 0)
