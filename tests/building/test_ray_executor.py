"""What `RayExecutor` refuses; what it runs is in test_files_build.py."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace

import pytest

import packpipe
from packpipe.cli.errors import in_a_line


@pytest.mark.parametrize("options", [{"task_cpus": 0}, {"max_retries": -2}])
def test_numbers_out_of_range_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        packpipe.RayExecutor(**options)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError) as error:
        packpipe.RayExecutor()
    assert in_a_line(error.value) == "ray is not installed; pip install 'packpipe[ray]'"


def test_a_cluster_that_does_not_answer_is_named_with_its_remedy(monkeypatch):
    def init(**options):
        assert options["address"] == "auto"
        raise ConnectionError("Could not find any running Ray instance.")

    ray = SimpleNamespace(
        init=init, is_initialized=lambda: False, remote=lambda **_: lambda function: function
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    message = (
        "address of Ray is 'auto', expected a Ray cluster that answers; start one with ray start "
        "--head, or pass 'local'"
    )
    with pytest.raises(ConnectionError, match=message) as error:
        packpipe.RayExecutor("auto")
    assert "Could not find any" in str(error.value.__cause__)


def test_an_address_where_nothing_listens_is_named_at_once(monkeypatch):
    ray = SimpleNamespace(
        init=None, is_initialized=lambda: False, remote=lambda **_: lambda function: function
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        closed = f"127.0.0.1:{taken.getsockname()[1]}"
        for address in (closed, "127.0.0.1:99999", "[::1]:99999"):
            with pytest.raises(ConnectionError, match="expected a Ray cluster that answers"):
                packpipe.RayExecutor(address)
    listening = socket.create_server(("127.0.0.1", 0))
    began: list[str] = []
    ray.init = lambda address, **_: began.append(address)
    with listening:
        for address in (f"127.0.0.1:{listening.getsockname()[1]}", "auto", "ray://head:1"):
            packpipe.RayExecutor(address)
    assert len(began) == 3
