"""Commands in processes of their own that do not import everything again: one process has imported it, and forks."""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any


class Forking:
    """The process that forks, from a test's side. It ends with the tests."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = str(Path(self.folder.name) / "socket")
        self.process = subprocess.Popen([sys.executable, __file__, self.path], stdin=subprocess.PIPE)

    def connect(self) -> socket.socket:
        until = time.monotonic() + 60
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(self.path)
                return connection
            except OSError:
                connection.close()
                if time.monotonic() > until or self.process.poll() is not None:
                    raise
                time.sleep(0.02)


_FORKING: list[Forking] = []


class Craton:
    """A running `python -m craton ...`. OMP_NUM_THREADS in env is obeyed."""

    def __init__(self, arguments: list[str], files: list[IO[Any]], cwd: Any = None, env: dict[str, str] | None = None):
        """files: for stdin, stdout and stderr."""
        if not _FORKING:
            _FORKING.append(Forking())
        self.connection = _FORKING[0].connect()
        asked = {"arguments": arguments, "cwd": str(cwd or os.getcwd()), "env": env or dict(os.environ)}
        socket.send_fds(self.connection, [json.dumps(asked).encode()], [f.fileno() for f in files])
        self.pid = int(self.connection.recv(100))

    def wait(self, timeout: float) -> int:
        """Its exit code; negative: the signal that ended it. After the timeout it is killed."""
        self.connection.settimeout(timeout)
        try:
            return int(self.connection.recv(100))
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        finally:
            self.connection.close()


def start(*args: object, input: str = "", **more: Any) -> tuple[Craton, list[IO[bytes]]]:
    """A command that goes on by itself, and the files of its stdin, stdout and stderr."""
    files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
    files[0].write(input.encode())
    files[0].seek(0)
    return Craton([*map(str, args)], files, **more), files


def finish(running: tuple[Craton, list[IO[bytes]]], timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait for what `start` gave."""
    process, files = running
    code = process.wait(timeout)
    texts = []
    for f in files[1:]:
        f.seek(0)
        texts.append(f.read().decode())
    for f in files:
        f.close()
    return subprocess.CompletedProcess([], code, *texts)


def _serve(path: str) -> None:
    """Fork whenever somebody asks, until stdin ends. Returns in the forked processes."""
    import craton.corpus.build
    import craton.engine.measure
    import craton.report.page
    import craton.serve.chat
    import craton.serve.run
    import craton.train.start  # noqa: F401

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(path)
    listening.listen(64)
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            _attend(connection)
            return
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Fork once more and tell how that process ends. Returns in that process, which is ready to be a command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
    pid = os.fork()
    if pid:
        connection.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    asked = json.loads(data)
    for own, given in enumerate(files):
        os.dup2(given, own)
        os.close(given)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    sys.argv = ["craton", *asked["arguments"]]


def _run() -> int:
    """The command, and what ends with a process; not the seconds that unloading everything takes."""
    code: Any = 0
    try:
        runpy.run_module("craton", run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
    os._exit(_run())
