"""Code that a model wrote is run here, and nowhere else: in namespaces of its own (by bubblewrap where that is
installed), with an empty file system, no network, no rights, a filter of system calls, and limits of time, memory and
processes.

Fails closed: where a machine cannot give the level that is asked for, nothing is run. What is not prevented: a program
that means to pass its own tests in the same process (an object that equals everything) can; read what passed.
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from craton.base import UserError, say

LEVELS = ("namespaces", "process")  # the strictest first; "process": seccomp, Landlock and limits alone
ASKED = "CRATON_SANDBOX"  # the variable of the environment that allows less
SECONDS, MEMORY, PROCESSES = 10.0, 512 << 20, 16
_JAIL = Path(__file__).with_name("jail.py")


@dataclass(frozen=True)
class Outcome:
    """reason: why it did not pass: an error, "timeout", "memory", "killed by signal N", "ended before its tests"."""

    passed: bool
    reason: str = ""


@lru_cache
def level() -> str:
    """The level that this machine gives: the strictest one that a small program passes in. UserError if it is less than
    what is asked for, namespaces unless CRATON_SANDBOX says otherwise."""
    asked = os.environ.get(ASKED, LEVELS[0])
    if asked not in LEVELS:
        raise UserError(f"{ASKED} is {asked!r}; known: {', '.join(LEVELS)}", field=ASKED)
    why = ""
    for name in LEVELS[: LEVELS.index(asked) + 1]:
        outcome = _run("import math\nx = 1\n", "assert x == 1\n", name, SECONDS)
        if outcome.passed:
            by = " by bubblewrap" if name == LEVELS[0] and _bubblewrap() else ""
            say(f"sandbox  {name}{by}: {_PROMISES[name]}")
            return name
        why = outcome.reason
    fix = "install bubblewrap, allow user namespaces, or set CRATON_SANDBOX=process to run code with less around it"
    raise UserError(f"this machine gives no sandbox for generated code ({why}); {fix}", code="no_sandbox")


_PROMISES = {
    "namespaces": "no network, no files but Python's, no rights, limits of time, memory and processes",
    "process": "no network, no files but Python's (Landlock), no signals, limits of time and memory",
}


def passes(program: str, tests: str, seconds: float | None = None) -> Outcome:
    """Run a program and then its tests, Python both. UserError where there is no sandbox."""
    return _run(program, tests, level(), seconds or SECONDS)


@lru_cache
def _bubblewrap() -> str | None:
    """The program, where it works. Root's processes cannot be counted in it, so root takes namespaces of its own."""
    path = shutil.which("bwrap")
    if path is None or os.geteuid() == 0:
        return None
    tried = subprocess.run([path, "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True)
    return path if tried.returncode == 0 else None


@lru_cache
def _readable() -> list[str]:
    """Folders that Python needs: its own and the system's libraries."""
    own = {sys.base_prefix, sysconfig.get_path("stdlib"), str(Path(sys.executable).resolve().parent)}
    system = {"/usr", "/bin", "/lib", "/lib64", "/lib32", "/sbin"}
    outer = sorted(p for p in own | system if os.path.exists(p))
    return [p for p in outer if not any(p != q and p.startswith(q + "/") for q in outer)]


def _command(kind: str, settings: dict[str, object]) -> list[str]:
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B"]
    bubblewrap = _bubblewrap() if kind == LEVELS[0] else None
    if bubblewrap is None:
        return [*python, str(_JAIL), json.dumps(settings)]
    command = [bubblewrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path in _readable():
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    command += ["--ro-bind", str(_JAIL), "/jail.py", "--proc", "/proc", "--dev", "/dev"]
    command += ["--size", str(32 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--clearenv"]
    return [*command, *python, "/jail.py", json.dumps(settings | {"level": "inner"})]


def _run(program: str, tests: str, kind: str, seconds: float) -> Outcome:
    secret = secrets.token_hex(16)
    given = json.dumps({"program": program, "tests": tests, "secret": secret}).encode("utf-8", "surrogatepass")
    uid = 60000 + secrets.randbelow(5000)  # nobody's; limits of processes are counted by user
    with tempfile.TemporaryDirectory(prefix="craton-sandbox-") as root:
        settings = dict(level=kind, root=root, binds=_readable(), seconds=seconds, memory=MEMORY, uid=uid)
        settings["processes"] = PROCESSES if kind == LEVELS[0] or os.geteuid() == 0 else 4096
        read, write = os.pipe()
        command = _command(kind, settings | {"report": write})
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(write,), env={"PATH": "/usr/bin:/bin"}, start_new_session=True, cwd="/",
            )  # fmt: skip
        finally:
            os.close(write)
        try:
            return _watched(process, read, given, secret, seconds)
        finally:
            os.close(read)
            _kill(process)


def _watched(process: subprocess.Popen[bytes], read: int, given: bytes, secret: str, seconds: float) -> Outcome:
    """Wait for the verdict, no longer than allowed and with no more memory in all."""
    assert process.stdin is not None
    try:
        process.stdin.write(given)
        process.stdin.close()
    except BrokenPipeError:
        pass
    end, said = time.monotonic() + seconds, b""
    while True:
        left = end - time.monotonic()
        if left <= 0:
            return Outcome(False, "timeout")
        if select.select([read], [], [], min(left, 0.05))[0]:
            piece = os.read(read, 4096)
            said += piece
            if not piece or len(said) > 1 << 16:
                break
            if said == secret.encode():
                return Outcome(True)
        elif _memory(process.pid) > 2 * MEMORY:
            return Outcome(False, "memory")
        if process.poll() is not None and not select.select([read], [], [], 0)[0]:
            break
    if said == secret.encode():
        return Outcome(True)
    text = said.decode("utf-8", "replace")
    if text.startswith("failed "):
        return Outcome(False, "memory" if text.startswith("failed MemoryError") else text[7:])
    if text.startswith("refused "):
        return Outcome(False, text)
    code = process.wait(timeout=5) if process.poll() is None else process.returncode
    if code and code > 128:
        return Outcome(False, "timeout" if code - 128 in (signal.SIGXCPU, signal.SIGALRM) else f"signal {code - 128}")
    return Outcome(False, "ended before its tests")


def _memory(pid: int) -> int:
    """Bytes in memory of a process and all that come from it."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * 4096
            for task in os.listdir(f"/proc/{one}/task"):
                waiting += map(int, Path(f"/proc/{one}/task/{task}/children").read_text().split())
        except (OSError, ValueError, IndexError):
            continue
    return total


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and its group; in namespaces everything inside goes with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
