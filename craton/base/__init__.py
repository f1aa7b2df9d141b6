"""What every floor stands on: errors meant for people, files that are never half-written, words for the terminal."""

from craton.base.console import Progress, amount, count, say, span, speak_anywhere, waiting
from craton.base.errors import UserError, nearest
from craton.base.files import (
    as_json,
    claim,
    digest,
    fsync,
    publish,
    read_json,
    read_text,
    remove_inside,
    sha256,
    write_json,
    write_text,
)
from craton.base.hosts import local
from craton.base.limits import free_memory, processors

__all__ = ["Progress", "UserError", "amount", "as_json", "claim", "count", "digest", "free_memory", "fsync", "nearest"]
__all__ += ["processors", "publish", "read_json", "read_text", "remove_inside", "say", "sha256", "span"]
__all__ += ["local", "speak_anywhere", "waiting", "write_json", "write_text"]
