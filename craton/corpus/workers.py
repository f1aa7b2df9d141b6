"""Worker processes for a build: a bounded number of batches on their way, none left behind when the build ends."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from craton.base import processors


class Pool:
    """Worker processes with a bounded number of batches in flight. They end with this process, however it ends."""

    def __init__(self, lock: int | None) -> None:
        """lock: a descriptor that workers must not hold."""
        self.workers = processors()
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        inherited = lock if method == "fork" else None
        self.executor = ProcessPoolExecutor(self.workers, context, _begin_worker, (inherited,))
        self.pending: set[Future[Any]] = set()

    def submit(self, *call: Any) -> None:
        """A call in a worker; waits while enough are on their way. Raises what an earlier one raised."""
        while len(self.pending) >= 2 * self.workers:
            self._collect(FIRST_COMPLETED)
        try:
            self.pending.add(self.executor.submit(*call))
        except BrokenProcessPool:
            raise Killed from None

    def _collect(self, when: str) -> None:
        done, self.pending = wait(self.pending, return_when=when)
        for future in done:
            try:
                future.result()
            except BrokenProcessPool:
                raise Killed from None

    def finish(self) -> None:
        """Wait for all."""
        self._collect("ALL_COMPLETED")

    def close(self) -> None:
        """No more workers."""
        self.executor.shutdown(cancel_futures=True)


class Killed(Exception):
    """A worker process was killed."""


def _begin_worker(lock: int | None) -> None:
    """In a worker: it does not hold the folder, leaves Ctrl-C to its parent, and ends when that is gone."""
    if lock is not None:
        os.close(lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
