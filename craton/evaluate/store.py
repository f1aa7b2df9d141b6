"""What was computed before: answers and likelihoods by model, prompt and settings, in one file that a killed run leaves
whole. A run that is started again goes on where it stopped."""

import hashlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

from craton.base import UserError, say, sha256


def cache_folder() -> Path:
    """CRATON_CACHE, or craton in the user's cache folder."""
    own = os.environ.get("CRATON_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "craton"


class Store:
    """JSON values by keys. Where the folder cannot be written, they last as long as the process."""

    def __init__(self) -> None:
        path = cache_folder() / "evaluations.sqlite"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(path, timeout=60, isolation_level=None)  # several evaluations share it
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = NORMAL")
            self.db.execute("CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, value TEXT)")
        except (OSError, sqlite3.Error) as error:
            say(f"{path}: cannot be used ({error}); what is computed is not kept for a rerun")
            self.db = sqlite3.connect(":memory:", isolation_level=None)
            self.db.execute("CREATE TABLE seen (key TEXT PRIMARY KEY, value TEXT)")

    def get(self, key: str) -> Any:
        """The value, or None."""
        row = self.db.execute("SELECT value FROM seen WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Keep a value, on the disk from then on."""
        self.db.execute("INSERT OR REPLACE INTO seen VALUES (?, ?)", (key, json.dumps(value)))


def key_of(*parts: Any) -> str:
    """One key for a model, a prompt and settings."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint(store: Store, path: Path) -> str:
    """A hash over a model's files. Files that are as old and as long as they were are not read again."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and _belongs(p))
    if not files:
        raise UserError(f"{path}: no model folder or GGUF file")
    parts = []
    for file in files:
        stat = file.stat()
        known = key_of("file", str(file.resolve()), stat.st_size, stat.st_mtime_ns)
        found = store.get(known)
        if found is None:
            found = sha256(file)
            store.put(known, found)
        parts.append((file.name, found))
    return key_of(parts)


def _belongs(path: Path) -> bool:
    own = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json")
    return path.suffix in (".safetensors", ".gguf", ".model", ".jinja") or path.name in own
