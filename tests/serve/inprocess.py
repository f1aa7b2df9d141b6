"""A server in a thread of the test."""

import socket
import threading
import time
from pathlib import Path

import httpx
import uvicorn

from craton.serve import guard
from craton.serve.app import create_app
from craton.serve.guard import Settings
from craton.serve.metrics import Metrics
from craton.serve.served import open_served


class InProcess:
    """A server in a thread, so that its limits can be set low."""

    def __init__(
        self, folder: Path, settings: Settings, max_wait: float = 30.0, max_queue: int = 64, **options: object
    ):
        models: dict = {}
        self.metrics = Metrics(models)
        self.served = models["chat"] = open_served(
            "chat", str(folder), max_wait, max_queue, self.metrics.observe, **options
        )
        self.served.worker.warm_up()
        self.server = uvicorn.Server(
            uvicorn.Config(
                create_app(models, settings, self.metrics),
                port=0,
                http=guard.Protocol,
                access_log=False,
                log_config=None,
                ws="none",
                timeout_graceful_shutdown=1,
            )
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def idle(self, seconds: float = 10) -> bool:
        """Whether nothing runs and every block is back, soon."""
        until = time.monotonic() + seconds
        pool = self.served.talker.engine.scheduler.pool
        while time.monotonic() < until:
            if not self.served.worker.alive and not self.served.talker.engine.busy and pool.free == pool.total:
                return True
            time.sleep(0.02)
        return False

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
