"""The socket that a QEMU inherits for its monitor."""

import socket

import pytest

from instavm.node.vmm.monitor import listening


def test_of_two_threads_that_accept_one_call_the_second_does_not_wait(tmp_path):
    with listening(tmp_path / "qmp.sock") as listener, socket.socket(socket.AF_UNIX) as caller:
        inherited = socket.socket(fileno=listener.detach())  # as QEMU has it: it asks for nothing but to accept
        with inherited:
            caller.connect(str(tmp_path / "qmp.sock"))
            inherited.accept()[0].close()
            with pytest.raises(BlockingIOError):
                inherited.accept()
