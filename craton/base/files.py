"""Files that are never half-written, hashes, and folders that one command at a time makes."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from craton.base.console import say
from craton.base.errors import UserError

# What file systems answer that cannot do a thing (network shares, FUSE, some containers).
_NOT_HERE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF}
_UMASK = os.umask(0)
os.umask(_UMASK)


def fsync(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write, a file or a folder; on success it is fsynced, with all in it, and renamed to
    path, on failure removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with contextlib.suppress(PermissionError):  # a file system without modes
            # Some libraries write files that only their owner can read.
            os.chmod(temporary, (0o777 if temporary.is_dir() else 0o666) & ~_UMASK)
        for inside in temporary.rglob("*") if temporary.is_dir() else ():
            fsync(inside)
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def as_json(value: Any) -> str:
    """The one text that write_json gives a value, so that a file with another text was altered. Halves of characters
    (in file names) are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, whole or not at all."""
    write_text(path, as_json(value))


def read_json(path: Path) -> Any:
    """The JSON in a file. UserError names the file and what is wrong."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_text(path: Path) -> str:
    """A file's text. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()


@contextlib.contextmanager
def claim(out: Path, work: str | None = None, *, resume: bool = False, hint: str = "") -> Iterator[int | None]:
    """Make the folder `out` one's own for the time of a command. Yields the lock's descriptor, which processes that are
    forked meanwhile have to close, since it is held for as long as one of them has it; None where the file system has
    no locks.

    work: a folder inside for unfinished work, whose presence makes `out` resumable. resume: a folder with unfinished
    work in it is taken up; any other that is not empty is refused, with the hint. Two commands cannot hold the same
    folder. After a failure, a folder that this call made is removed again if nothing was put into it; what was written
    stays. UserError if the folder cannot be had.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder for --out", field="out")
    found = [p for p in out.iterdir() if p.name != ".lock"] if out.exists() else []
    if found and not (resume and work is not None and (out / work).is_dir()):
        raise UserError(f"{out}: folder in use (not empty); {hint or 'give another --out'}", field="out", code="in_use")
    made = [p for p in (out, *out.parents) if not p.exists()]
    inside = out if work is None else out / work
    inside.mkdir(parents=True, exist_ok=True)
    lock = open(inside / ".lock", "w")  # noqa: SIM115 (held until the end)
    try:
        locked = _lock(lock, inside / ".lock")
    except OSError:
        lock.close()
        raise UserError(f"{out}: folder in use: another process is writing it", field="out", code="in_use") from None
    try:
        yield lock.fileno() if locked else None
    finally:
        (inside / ".lock").unlink(missing_ok=True)
        lock.close()
        if work is not None and inside.is_dir() and not any(inside.iterdir()):
            inside.rmdir()
        for folder in made:  # innermost first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _lock(lock: Any, path: Path) -> bool:
    """Whether the file is locked now; not on a file system without locks. OSError if another process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NOT_HERE and error.errno != errno.ENOLCK:
            raise
        say(f"{path.parent}: its file system has no locks; see that no other command writes there meanwhile")
        return False
    if os.fstat(lock.fileno()).st_ino != os.stat(path).st_ino:
        raise OSError("the lock was removed by the one who held it, as this call opened it")
    return True


def remove_inside(folder: Path, kept: set[str]) -> None:
    """Empty a folder but for entries of these names."""
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
