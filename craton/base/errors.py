"""Errors that are meant for people."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: what file or field, what is wrong, how to fix it. Exit code 2.

    field: the setting or request field at fault, as its user writes it. code: a stable word for programs, such as
    "context_length_exceeded". Both are for callers; nobody has to parse the message.
    """

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.field, self.code = field, code


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the known name nearest to a mistyped one, or ''."""
    found = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""
