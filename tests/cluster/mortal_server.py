"""The `instavm` program, one of whose processes ends itself with SIGKILL at a chosen point of its work.

    mortal_server.py MODULE:NAME before|after instavm-arguments...

`before` or `after` the first call of that function from the moment that a sandbox was asked for: in the node's process when
it is the node's, in control's when it is control's.
"""

import functools
import importlib
import inspect
import os
import signal
import sys

from instavm import serve
from instavm.cli import main
from instavm.control.sessions import Sessions
from instavm.node.runtime import Runtime


def mortal(where: str, when: str) -> None:
    module, _, name = where.partition(":")
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    real = inspect.getattr_static(owner, last)
    call = getattr(owner, last)

    def die(moment: str) -> None:
        if moment == when and ASKED:
            if os.getpid() == 1:  # in its jail it cannot be killed from within; it is as sudden an end
                os._exit(128 + signal.SIGKILL)
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


def watch_for_the_first(owner, name) -> None:
    real = getattr(owner, name)

    async def asked(*args, **kwargs):
        ASKED.append(True)
        return await real(*args, **kwargs)

    setattr(owner, name, asked)


if __name__ == "__main__":
    _, where, when, *sys.argv[1:] = sys.argv
    if "--control" in sys.argv:
        watch_for_the_first(Sessions, "create")
        mortal(where, when)
        sys.exit(serve.run_control(sys.argv[1:]))
    if where.startswith("instavm.control"):
        serve.CONTROL = (sys.executable, os.path.abspath(__file__), where, when, "--control")
    else:
        watch_for_the_first(Runtime, "start")
        mortal(where, when)
    main()
