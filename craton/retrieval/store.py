"""An index's documents on disk, in SQLite: what is committed stays, whatever happens to the process. What searches need
beside it is made of it, and made anew where it is missing or older."""

import fcntl
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from craton.base import UserError

FILE = "documents.sqlite"
_FORM = "1"
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL, size INTEGER, mtime INTEGER,
    hash TEXT);
CREATE TABLE IF NOT EXISTS documents (id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL,
    name TEXT NOT NULL, title TEXT, kind TEXT, metadata TEXT);
CREATE INDEX IF NOT EXISTS documents_of_files ON documents (file);
CREATE INDEX IF NOT EXISTS documents_by_name ON documents (name);
CREATE INDEX IF NOT EXISTS documents_by_title ON documents (title);
CREATE TABLE IF NOT EXISTS passages (id INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL,
    start INTEGER, page INTEGER, heading TEXT, text TEXT NOT NULL, key TEXT);
CREATE INDEX IF NOT EXISTS passages_of_documents ON passages (document);
CREATE INDEX IF NOT EXISTS passages_by_key ON passages (key);
CREATE TABLE IF NOT EXISTS vectors (key TEXT PRIMARY KEY, vector BLOB NOT NULL);
"""


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Inside, what SQLite says of a damaged or locked index becomes a UserError."""
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"{folder / FILE}: damaged, or in use ({error}); make the index anew if it stays so") from None
    except (EOFError, ValueError) as error:
        raise UserError(f"{folder}: damaged ({error}); make the index anew") from None


@dataclass
class Stored:
    """A passage as it is kept. start: characters of its document before it. page: from 1; 0 where there are none. key:
    what tells the text that is searched from others."""

    number: int
    document: str
    title: str
    start: int
    page: int
    heading: str
    text: str
    metadata: dict[str, Any]

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Store:
    """One process writes at a time; others read. UserError for a folder that holds no index."""

    def __init__(self, folder: Path, write: bool = False):
        self.folder, self.path = folder, folder / FILE
        self.lock: Any = None
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            self._own()
        elif not self.path.is_file():
            raise UserError(f"{folder}: no index there; make one with craton index DOCS --out {folder}")
        self.database = self._connected("rwc" if write else "rw")
        try:
            if write:
                self.database.execute("PRAGMA journal_mode = WAL")
                self.database.execute("PRAGMA synchronous = FULL")
                self.database.executescript(
                    f"BEGIN; {_TABLES} INSERT OR IGNORE INTO meta VALUES ('form', '{_FORM}'); COMMIT;"
                )
            begun = self.database.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone()
            form = self.get("form") if begun else None
        except sqlite3.DatabaseError as error:
            self.close()
            raise UserError(f"{self.path}: not an index, or damaged ({error}); make it anew") from None
        if form is None:
            self.close()
            raise UserError(f"{folder}: not made to its end; run craton index on it again")
        if form != _FORM:
            self.close()
            raise UserError(f"{self.path}: an index of another version of craton ({form}); make it anew")

    def _connected(self, mode: str) -> sqlite3.Connection:
        place = f"file:{quote(str(self.path))}?mode={mode}"
        how: dict[str, Any] = {"timeout": 30, "isolation_level": None, "check_same_thread": False, "uri": True}
        opened = sqlite3.connect(place, **how)
        try:
            opened.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            if "readonly" not in str(error) and "unable to open" not in str(error):
                return opened  # which says itself what is wrong
            opened.close()
            opened = sqlite3.connect(f"{place.partition('?')[0]}?mode=ro&immutable=1", **how)
        except sqlite3.DatabaseError:
            return opened
        return opened

    def _own(self) -> None:
        self.lock = open(self.folder / ".lock", "w")  # noqa: SIM115 (held until the end)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise UserError(f"{self.folder}: another process is writing this index", code="in_use") from None

    def close(self) -> None:
        self.database.close()
        if self.lock is not None:
            self.lock.close()

    # ---- facts ----

    def get(self, key: str) -> str | None:
        row = self.database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, value: str) -> None:
        self.database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @property
    def generation(self) -> int:
        """How often the documents have changed."""
        return int(self.get("generation") or 0)

    @contextmanager
    def change(self) -> Iterator[None]:
        """All of what is done inside, or, after a failure, nothing of it."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.put("generation", str(self.generation + 1))
            self.database.execute("COMMIT")
        except BaseException:
            self.database.execute("ROLLBACK")
            raise

    # ---- documents ----

    def files(self) -> dict[str, tuple[int, int, int, str]]:
        """By path: number, size, time of change, hash."""
        rows = self.database.execute("SELECT path, id, size, mtime, hash FROM files")
        return {path: (number, size, mtime, found) for path, number, size, mtime, found in rows}

    def put_file(self, path: str, size: int, mtime: int, digest: str) -> int:
        """A file without documents, in the place of one of the same path."""
        self.drop_file(path)
        done = self.database.execute(
            "INSERT INTO files (path, size, mtime, hash) VALUES (?, ?, ?, ?)", (path, size, mtime, digest)
        )
        return int(done.lastrowid or 0)

    def touch_file(self, path: str, size: int, mtime: int) -> None:
        """A file that was written again with the same content."""
        self.database.execute("UPDATE files SET size = ?, mtime = ? WHERE path = ?", (size, mtime, path))

    def drop_file(self, path: str) -> None:
        """A file with its documents, if it is known."""
        row = self.database.execute("SELECT id FROM files WHERE path = ?", (path,)).fetchone()
        if row is None:
            return
        inside = "SELECT id FROM documents WHERE file = ?"
        self.database.execute(f"DELETE FROM passages WHERE document IN ({inside})", row)
        self.database.execute("DELETE FROM documents WHERE file = ?", row)
        self.database.execute("DELETE FROM files WHERE id = ?", row)

    def add_document(
        self,
        file: int,
        name: str,
        title: str,
        kind: str,
        metadata: dict[str, Any],
        passages: Iterable[tuple[int, int, str, str, str]],
    ) -> None:
        """passages: start, page, heading, text and key of each."""
        small = json.dumps(metadata, ensure_ascii=False) if metadata else ""
        row = file, name, title, kind, small
        done = self.database.execute(
            "INSERT INTO documents (file, name, title, kind, metadata) VALUES (?, ?, ?, ?, ?)", row
        )
        each = [(done.lastrowid, *p) for p in passages]
        self.database.executemany(
            "INSERT INTO passages (document, start, page, heading, text, key) VALUES (?, ?, ?, ?, ?, ?)", each
        )

    def counts(self) -> dict[str, int]:
        """Files, documents and passages."""
        names = ("files", "documents", "passages")
        return {n: int(self.database.execute(f"SELECT count(*) FROM {n}").fetchone()[0]) for n in names}

    # ---- passages ----

    def texts(self) -> Iterator[tuple[int, int, str, str]]:
        """Number, document's number, searched text and key of every passage, in order."""
        rows = self.database.execute(
            "SELECT p.id, p.document, d.title, p.heading, p.text, p.key FROM passages p JOIN documents d "
            "ON d.id = p.document ORDER BY p.id"
        )
        for number, document, title, heading, text, key in rows:
            yield number, document, searched(title, heading, text), key

    def passages(self, numbers: Sequence[int]) -> list[Stored]:
        """Passages by their numbers, in that order."""
        found: dict[int, Stored] = {}
        for start in range(0, len(numbers), 500):
            some = [int(n) for n in numbers[start : start + 500]]
            marks = ", ".join("?" * len(some))
            rows = self.database.execute(
                "SELECT p.id, d.name, d.title, p.start, p.page, p.heading, p.text, d.metadata FROM passages p "
                f"JOIN documents d ON d.id = p.document WHERE p.id IN ({marks})",
                some,
            )
            for number, name, title, start_, page, heading, text, more in rows:
                metadata = json.loads(more) if more else {}
                found[number] = Stored(number, name, title, start_, page, heading, text, metadata)
        return [found[int(n)] for n in numbers if int(n) in found]

    def passages_titled(self, titles: Iterable[str], most: int) -> list[int]:
        """Numbers of the passages of documents with these titles."""
        out: list[int] = []
        for title in sorted(titles):
            rows = self.database.execute(
                "SELECT p.id FROM passages p JOIN documents d ON d.id = p.document WHERE d.title = ? "
                "ORDER BY p.id LIMIT ?",
                (title, most),
            )
            out += [number for (number,) in rows]
        return out[:most]

    def document_text(self, name: str) -> str | None:
        """The whole text of a document; None if there is none of this name."""
        row = self.database.execute("SELECT id FROM documents WHERE name = ? ORDER BY id", (name,)).fetchone()
        if row is None:
            return None
        rows = self.database.execute("SELECT text FROM passages WHERE document = ? ORDER BY start", row)
        return "".join(text for (text,) in rows)

    def names(self) -> dict[int, str]:
        """Documents' names by their numbers."""
        return dict(self.database.execute("SELECT id, name FROM documents"))

    # ---- vectors ----

    def without_vector(self) -> list[tuple[str, str]]:
        """Key and searched text of passages that have no vector yet."""
        rows = self.database.execute(
            "SELECT p.key, d.title, p.heading, p.text FROM passages p JOIN documents d ON d.id = p.document "
            "WHERE p.key NOT IN (SELECT key FROM vectors) GROUP BY p.key ORDER BY p.id"
        )
        return [(key, searched(title, heading, text)) for key, title, heading, text in rows]

    def put_vectors(self, keys: Sequence[str], vectors: np.ndarray) -> None:
        """vectors (keys, size) fp32."""
        rows = [(k, v.astype(np.float32).tobytes()) for k, v in zip(keys, vectors, strict=True)]
        with self.change():
            self.database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    def vectors(self) -> Iterator[np.ndarray]:
        """Each passage's vector, in the order of `texts`. UserError where one is missing."""
        rows = self.database.execute(
            "SELECT v.vector FROM passages p LEFT JOIN vectors v ON v.key = p.key ORDER BY p.id"
        )
        for (vector,) in rows:
            if vector is None:
                raise UserError(f"{self.folder}: passages without a vector; run craton index again")
            yield np.frombuffer(vector, np.float32)

    def tidy(self) -> None:
        """Give back what deleted documents took."""
        self.database.execute("DELETE FROM vectors WHERE key NOT IN (SELECT key FROM passages)")
        pages, free = (self.database.execute(f"PRAGMA {p}").fetchone()[0] for p in ("page_count", "freelist_count"))
        if free > pages // 4:
            self.database.execute("VACUUM")
        self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def searched(title: str, heading: str, text: str) -> str:
    """A passage's text with what stands above it, as it is searched and encoded."""
    return " ".join(t for t in (title, heading, text) if t)
