"""The fence around the tests: other machines cannot be reached, this one can."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("198.51.100.7", 443)])
def test_other_machines_cannot_be_reached(address: tuple[str, int]) -> None:
    with socket.socket() as client, pytest.raises(RuntimeError, match="no other machine"):
        client.connect(address)
    with socket.socket() as client, pytest.raises(RuntimeError, match="no other machine"):
        client.connect_ex(address)
    with socket.socket(type=socket.SOCK_DGRAM) as client, pytest.raises(RuntimeError, match="no other machine"):
        client.sendto(b"x", address)
    with pytest.raises(RuntimeError, match="no other machine"):
        socket.create_connection(address, timeout=1)


def test_names_are_not_resolved() -> None:
    with pytest.raises(RuntimeError, match="no other machine"):
        socket.getaddrinfo("weights.invalid", 443)
    with pytest.raises(RuntimeError, match="no other machine"):
        socket.gethostbyname("weights.invalid")


def test_encrypted_and_asynchronous_sockets_are_fenced_in_too() -> None:
    encrypted = ssl.create_default_context().wrap_socket(socket.socket(), server_hostname="x")
    with encrypted as client, pytest.raises(RuntimeError, match="no other machine"):
        client.connect(("192.0.2.1", 443))
    with pytest.raises(RuntimeError, match="no other machine"):
        asyncio.run(asyncio.wait_for(asyncio.open_connection("192.0.2.1", 443), 5))


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        answers: list[bytes] = []

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                answers.append(connection.recv(2))

        thread = threading.Thread(target=serve)
        thread.start()
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            client.sendall(b"hi")
        thread.join(5)
    assert answers == [b"hi"]


def test_the_store_of_a_test_is_not_the_users() -> None:
    assert "worldloom-tests-" in os.environ["WORLDLOOM_HOME"]
    assert os.environ["OMP_NUM_THREADS"] == "1"
