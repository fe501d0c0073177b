"""Ports: chosen, checked, waited for."""
from __future__ import annotations

import socket
import threading

import pytest

from ms_diffsynth.errors import ConfigError, DeviceError
from ms_diffsynth.launch import ports


@pytest.fixture
def taken():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_free_port(taken, monkeypatch):
    port = ports.free_port("127.0.0.1")
    assert 20000 <= port < 32000, "not one that an outgoing connection may get"
    ports.check_port("127.0.0.1", port)
    monkeypatch.setattr(ports, "_FIRST", taken)
    monkeypatch.setattr(ports, "_COUNT", 1)
    with pytest.raises(DeviceError, match="none of 100 ports"):
        ports.free_port("127.0.0.1")


def test_a_taken_port(taken):
    with pytest.raises(ConfigError, match=f"master_port={taken} is taken on 127.0.0.1: another job, or"):
        ports.check_port("127.0.0.1", taken)


def test_a_port_of_a_job_that_has_just_ended_is_free():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = server.getsockname()
        with socket.create_connection(address) as client:
            server.accept()[0].close()  # this side closes first: its port stays in TIME_WAIT
            client.recv(1)
    ports.check_port(*address)


def test_an_address_of_another_machine():
    with pytest.raises(ConfigError, match=r"=203\.0\.113\.7 is not an address of this machine, but --node_rank 0 is"):
        ports.check_port("203.0.113.7", 20000)
    with pytest.raises(ConfigError, match=r"master_address=203\.0\.113\.7 is not an address of this machine"):
        ports.free_port("203.0.113.7")


def test_names():
    assert ports.resolve("127.0.0.1") == "127.0.0.1"
    assert ports.resolve("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(ConfigError, match=r"master_address=no\.such\.host\.invalid: no host has this name here"):
        ports.resolve("no.such.host.invalid")


def test_a_scheduler_that_never_listens():
    with pytest.raises(DeviceError, match=r"no process listens on 127.0.0.1:1 after 0.1 s \(Connection refused\)"):
        ports.wait_for_scheduler("127.0.0.1", 1, 0.1)


def test_a_scheduler_that_listens_later():
    port = ports.free_port("127.0.0.1")
    server = socket.socket()
    server.bind(("127.0.0.1", port))
    timer = threading.Timer(0.3, server.listen)
    timer.start()
    ports.wait_for_scheduler("127.0.0.1", port, 600)
    timer.join()
    server.close()
