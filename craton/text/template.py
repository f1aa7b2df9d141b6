"""Chat templates: messages to the text that a model was trained on.

A template is code from whoever published the folder. It runs in Jinja's sandbox, in a process of its own with little
memory and a time limit: loops without end and strings without bound end in an error, not in a stuck or killed program.
The environment is that of transformers' `apply_chat_template`, so the text is the same.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from craton.base import UserError

BEGIN, END = "\ue0f0", "\ue0f1"  # private use: no text that is read here holds them
# Limits of one rendering: time, bytes of the process and of the text.
SECONDS, MEMORY, OUTPUT = 10.0, 512 << 20, 32 << 20


class ChatTemplate:
    """A compiled template in its process, which starts at first use and ends with this object."""

    def __init__(self, source: str, special: dict[str, str]):
        self.source, self.special = source, special
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        mark_answers: bool = False,
        **more: Any,
    ) -> str:
        """UserError if the template refuses the messages, fails, or passes a limit. mark_answers: what stands in the
        template's generation blocks is put between BEGIN and END."""
        given = dict(messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt)
        values: dict[str, Any] = {**self.special, **given, **more}
        with self.lock:
            try:
                answer = self._ask(json.dumps([self.source, values, mark_answers]).encode())
            except (OSError, EOFError) as error:
                self._stop()
                late = f"took longer than {SECONDS:.0f} s"
                what = late if isinstance(error, TimeoutError) else f"needs more than {MEMORY >> 20} MB or failed badly"
                raise UserError(f"chat_template {what}; it is damaged or hostile") from None
        if "error" in answer:
            raise UserError(f"chat_template: {answer['error']}")
        return str(answer["text"])

    def _ask(self, question: bytes) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "craton.text.template"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(len(question).to_bytes(8, "little") + question)
        self.process.stdin.flush()
        until, data, want = time.monotonic() + SECONDS, b"", 8
        waiting = select.poll()  # select itself knows no file beyond the 1024th
        waiting.register(self.process.stdout, select.POLLIN)
        while len(data) < want:
            if not waiting.poll(max(0.0, until - time.monotonic()) * 1000):
                raise TimeoutError
            piece = os.read(self.process.stdout.fileno(), 1 << 20)
            if not piece:
                raise EOFError
            data += piece
            if want == 8 and len(data) >= 8:
                want = 8 + min(int.from_bytes(data[:8], "little"), 2 * OUTPUT)
        answer: dict[str, Any] = json.loads(data[8:])
        return answer

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self.process = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._stop()


# ---- in the process ---------------------------------------------------------------------------------------------


def _environment(mark: bool) -> Any:
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's words."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            inner = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if not mark:
                return inner
            begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(m)]) for m in (BEGIN, END))
            return [begin, *inner, end]

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _serve() -> None:
    import resource

    environments, compiled = [_environment(mark) for mark in (False, True)], dict[tuple[str, bool], Any]()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    source, out = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(8):
        question = json.loads(source.read(int.from_bytes(head, "little")))
        try:
            text, values, mark = question
            if (text, mark) not in compiled:
                compiled[text, mark] = environments[mark].from_string(text)
            made = compiled[text, mark].render(**values)
            answer = {"text": made} if len(made) <= OUTPUT else {"error": f"gives more than {OUTPUT >> 20} MB of text"}
        except MemoryError:
            answer = {"error": f"needs more than {MEMORY >> 20} MB; it is damaged or hostile"}
        except Exception as error:
            answer = {"error": (str(error) or type(error).__name__).splitlines()[0][:500]}
        data = json.dumps(answer).encode()
        out.write(len(data).to_bytes(8, "little") + data)
        out.flush()


if __name__ == "__main__":
    _serve()
