"""The `instavm` program, which ends itself with SIGKILL at a chosen point of its work.

    mortal_server.py MODULE:NAME before|after instavm-arguments...

`before` or `after` the first call of that function from the moment that a sandbox was asked for.
"""

import functools
import importlib
import inspect
import os
import signal
import sys

from instavm.cli import main
from instavm.control.sessions import Sessions


def mortal(where: str, when: str) -> None:
    module, _, name = where.partition(":")
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    real = inspect.getattr_static(owner, last)
    call = getattr(owner, last)

    def die(moment: str) -> None:
        if moment == when and ASKED:
            os.kill(os.getpid(), signal.SIGKILL)

    async def slowly(*args, **kwargs):
        die("before")
        result = await call(*args, **kwargs)
        die("after")
        return result

    def at_once(*args, **kwargs):
        die("before")
        result = call(*args, **kwargs)
        die("after")
        return result

    wrapped = functools.wraps(call)(slowly if inspect.iscoroutinefunction(call) else at_once)
    setattr(owner, last, staticmethod(wrapped) if isinstance(real, classmethod | staticmethod) else wrapped)


ASKED: list[bool] = []


def watch_for_the_first_create() -> None:
    create = Sessions.create

    async def asked(*args, **kwargs):
        ASKED.append(True)
        return await create(*args, **kwargs)

    Sessions.create = asked


if __name__ == "__main__":
    _, where, when, *sys.argv[1:] = sys.argv
    watch_for_the_first_create()
    mortal(where, when)
    main()
