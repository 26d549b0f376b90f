"""`RayExecutor`: a Ray cluster as an executor of the standard library."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for
from typing import Any

from packpipe import checks


class RayExecutor(Executor):
    """Runs what is submitted as tasks of a Ray cluster: ``pack(..., executor=RayExecutor())``.

    A task whose worker or machine is lost runs again. A process that is connected to Ray already
    stays so; else the connection, and a cluster that was started for it, end with `shutdown`, or
    with the ``with`` block.

    Args:
        address: ``"local"`` starts a cluster on this machine, ``"auto"`` finds the one that it
            belongs to; else as ``ray.init`` takes it.
        task_cpus: processors that Ray counts for a task. A window that is packed with
            ``num_workers=1`` decodes in one process, for which its task waits.
        max_retries: how often a task runs again, -1 without end.
        **options: of ``ray.init``, for example ``runtime_env``; of a local cluster ``num_cpus``,
            and ``object_store_memory``, of which packing needs next to nothing.

    Raises:
        ModuleNotFoundError: Ray is not installed: ``pip install 'packpipe[ray]'``.
        ConnectionError: there is no cluster at the address.

    Example:
        with packpipe.RayExecutor("auto") as executor:
            packpipe.pack(packpipe.ImageFiles("s3://bucket/train/*.parquet"), 1024,
                          output="s3://bucket/rows", executor=executor)
    """

    def __init__(
        self,
        address: str = "local",
        *,
        task_cpus: float = 1,
        max_retries: int = 3,
        **options: Any,
    ) -> None:
        checks.positive_number("task_cpus", task_cpus, "1 is usual")
        remedy = "-1 runs a task again without end"
        checks.whole_number("max_retries", max_retries, -1, 2**31, remedy)
        import ray  # loads on first use

        self._ray: Any = ray
        self._ended = False
        self._began = not ray.is_initialized()
        # One task for all functions, since Ray sends what it makes a task of to the cluster.
        self._call = self._ray.remote(num_cpus=task_cpus, max_retries=max_retries)(_called)
        self._futures: set[Future[Any]] = set()
        if self._began:
            try:
                _reach(address)
                ray.init(**{"address": address, "log_to_driver": False, **options})
            except ConnectionError as error:
                expected = "a Ray cluster that answers"
                remedy = "start one with ray start --head, or pass 'local'"
                said = checks.sentence("address of Ray", address, expected, remedy)
                raise ConnectionError(said) from error

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function of a module that all machines have; return its future."""
        if self._ended:
            raise RuntimeError("cannot schedule new futures after shutdown")
        task = self._call.remote(fn, args, kwargs)
        future: Future[Any] = Future()

        def settle(done: Future[Any]) -> None:
            if future.set_running_or_notify_cancel():
                error = done.exception()
                if error is None:
                    future.set_result(done.result())
                else:
                    future.set_exception(error)

        def forget(ended: Future[Any]) -> None:
            self._futures.discard(ended)
            if ended.cancelled():
                self._ray.cancel(task)

        self._futures.add(future)
        future.add_done_callback(forget)
        task.future().add_done_callback(settle)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End: wait for tasks, or cancel them, and leave the cluster if this has joined it."""
        self._ended = True
        if cancel_futures:
            for future in list(self._futures):
                future.cancel()
        # Not for those that were cancelled: Ray may lose the word to a task that is just beginning,
        # and the task would be waited for to its end.
        if wait:
            wait_for(list(self._futures))
        if self._began:
            self._ray.shutdown()
            self._began = False


def _reach(address: str) -> None:
    """Raise a ConnectionError if nothing is at HOST:PORT, where Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:  # the latter of a port beyond 65535
            raise ConnectionError(str(error)) from error


def _called(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)
