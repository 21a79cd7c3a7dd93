"""The guard of conftest.py holds."""

import socket

import pytest

from tests.conftest import NetworkUsed


def test_a_connection_to_another_machine_is_refused():
    with socket.socket() as outside, pytest.raises(NetworkUsed):
        outside.connect(("192.0.2.1", 80))


def test_a_connection_to_this_machine_is_not():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        assert client.getpeername() == server.getsockname()
