"""`craton chat`: a conversation in the terminal, with a model here or with any server that speaks OpenAI's API.

A model that was only pretrained has never seen a conversation: its lines are continued as one text. Any other is spoken
to in its chat template.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from craton.base import UserError, read_json, say, write_text
from craton.engine.converse import EFFORT, Ask, Prepared, answer, open_talker, prepare
from craton.engine.remote import Client, api_root
from craton.text.calls import Part

FAINT, PLAIN = "\033[2m", "\033[0m"
SETTINGS: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 always takes the likeliest token"),
    "top_p": (float, "only the likeliest that together reach this probability"),
    "top_k": (int, "only the k likeliest; 0 is all"),
    "min_p": (float, "only those at least this likely, relative to the likeliest"),
    "repetition_penalty": (float, "above 1: less of what was said"),
    "max_tokens": (int, "of an answer"),
    "seed": (int, "the same answer to the same question"),
    "thinking": (str, f"off, or one of {', '.join(EFFORT)}"),
    "model": (str, "which of the server's models"),
}
HELP = """/set NAME VALUE   change a setting; /set shows them, /set NAME takes one back
/system TEXT      how the model should behave
/retry, /undo     answer again; take back the last question and answer
/clear            start over
/save FILE        the conversation, as .json or .md; /load FILE goes on with a saved .json
/bye              ends it, as /quit, /exit and Ctrl-D do; /help shows this
Alt-Enter starts a new line, \"\"\" begins and ends a longer text. Ctrl-C stops an answer, Ctrl-D ends."""


@dataclass
class Conversation:
    messages: list[dict[str, str]] = field(default_factory=list)
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    saved: str = ""  # the file that /save wrote, which it may write again

    def all(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, *self.messages] if self.system else self.messages

    def text(self) -> str:
        """As a model that was only pretrained sees it."""
        return "".join(m["content"] for m in self.messages)

    def sampling(self) -> dict[str, Any]:
        return {k: v for k, v in self.settings.items() if k not in ("thinking", "model")}


class Local:
    """A model folder or GGUF file in this process."""

    def __init__(self, path: str, **options: Any):
        self.talker = open_talker(Path(path).resolve().name, path, **options)
        self.name, self.base = self.talker.name, self.talker.pretrained_only
        self.defaults = self.talker.defaults

    def answer(self, c: Conversation) -> Iterator[Part]:
        """Raises UserError for settings that cannot be."""
        sampling = c.sampling()
        thinking = c.settings.get("thinking")
        ask = Ask(sampling, thinking=None if thinking is None else thinking != "off", budget=EFFORT.get(thinking or ""))
        context = self.talker.engine.context
        room = context - min(sampling.get("max_tokens") or context, context // 2)
        if self.base:
            ids = self.talker.tokenizer.encode(c.text())
            if len(ids) > room:
                say(f"(the text has {len(ids)} tokens; the first {len(ids) - room} no longer fit the context)")
            ask.prompt = ids[-room:]
            prepared = prepare(self.talker, ask)
        else:
            prepared = self._fitting(c, ask, room)
        for delta in answer(self.talker, prepared):
            yield from delta.parts

    def _fitting(self, c: Conversation, ask: Ask, room: int) -> Prepared:
        """The newest part of the conversation that leaves room for an answer."""
        head = [{"role": "system", "content": c.system}] if c.system else []
        for dropped in range(0, len(c.messages), 2):
            ask.messages = [*head, *c.messages[dropped:]]
            last = dropped + 2 >= len(c.messages)
            try:
                prepared = prepare(self.talker, ask)
            except UserError as error:
                if error.code != "context_length_exceeded" or last:
                    raise
                continue
            if len(prepared.ids) <= room or last:
                break
        if dropped:
            say(f"(the conversation is too long for the context; its first {dropped} messages are left out)")
        return prepared


class Remote:
    """A server that speaks OpenAI's API."""

    def __init__(self, url: str, model: str | None):
        self.client = Client(api_root(url), model or "")
        listed = self._models()
        names = [m["id"] for m in listed]
        if model is not None and names and model not in names:
            raise UserError(f"--model {model}: the server has {', '.join(names[:20])}")
        if model is None and not names:
            raise UserError(f"{self.client.url}: the server lists no models; name one with --model")
        self.name = model or names[0]
        own: dict[str, Any] = next((m for m in listed if m["id"] == self.name), {})
        self.base, self.defaults = bool(own.get("pretrained_only")), dict(own.get("defaults") or {})

    def _models(self) -> list[dict[str, Any]]:
        try:
            return self.client.request("GET", "/models").get("data") or []
        except UserError as error:
            if error.code == "no_server":
                raise UserError(f"{self.client.url}: no OpenAI-compatible server there ({error})") from None
            raise

    def answer(self, c: Conversation) -> Iterator[Part]:
        body: dict[str, Any] = {"model": c.settings.get("model", self.name), **c.sampling()}
        if thinking := c.settings.get("thinking"):
            body["reasoning_effort"] = "none" if thinking == "off" else thinking
        if self.base:
            path, body = "/completions", {"max_tokens": 256, **body, "prompt": c.text()}
        else:
            path, body["messages"] = "/chat/completions", c.all()
        for chunk in self.client.stream(path, body):
            for choice in chunk.get("choices", ()):
                delta = choice.get("delta") or {"content": choice.get("text")}
                for name, kind in (("reasoning_content", "reasoning"), ("content", "content")):
                    if delta.get(name):
                        yield Part(kind, delta[name])


def _inputs() -> Iterator[str]:
    """What the user enters, with longer texts between lines of three quotes."""
    if sys.stdin.isatty():
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings

        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "craton"
        state.mkdir(parents=True, exist_ok=True)
        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        history = FileHistory(str(state / "history"))
        session = PromptSession[str](history=history, key_bindings=keys, enable_history_search=True)

        def read(mark: str) -> str:
            while True:
                try:
                    return session.prompt(mark)
                except KeyboardInterrupt:
                    continue
    else:

        def read(mark: str) -> str:
            return input()

    while True:
        try:
            line = read("> ")
            if line.strip().startswith('"""'):
                lines = [line.strip()[3:]]
                while not lines[-1].rstrip().endswith('"""'):
                    lines.append(read("  "))
                line = "\n".join(lines).rstrip().removesuffix('"""').strip("\n")
        except EOFError:
            return
        if line.strip():
            yield line


def chat(
    target: str, model: str | None, settings: dict[str, Any], first: str | None = None, **options: Any
) -> dict[str, Any]:
    """Reads from stdin, prints answers, returns the messages. target: a folder, a file or a URL. first: asked before
    anything is read. options: of open_talker, for a model here."""
    remote = target.startswith(("http://", "https://"))
    if remote and (given := [name for name, value in options.items() if value]):
        raise UserError(f"--{given[0].replace('_', '-')} is for a model here; a server has its own")
    if model is not None and not remote:
        raise UserError("--model names one of a server's models; here the folder is the model")
    other: Local | Remote = Remote(target, model) if remote else Local(target, **options)
    c = Conversation(settings={k: v for k, v in settings.items() if v is not None})
    if other.base:
        say("This model was only pretrained, or has no chat template: it goes on with your text.")
    if sys.stdin.isatty():
        say(f"{other.name}. /help lists what can be done, Ctrl-D ends.")
    if first is not None:
        say(f"> {first}")
    failed: UserError | None = None
    for line in itertools.chain([first] if first is not None else [], _inputs()):
        if line.strip() in ("/bye", "/quit", "/exit"):
            break
        try:
            if line.startswith("/") and not _tried(line, c, other):
                continue
            if not line.startswith("/"):
                c.messages.append({"role": "user", "content": line})
            _answer(other, c)
        except UserError as error:
            if not sys.stdin.isatty() and not line.startswith("/"):
                raise
            say(f"{error}")
            failed = failed or error
            if c.messages and c.messages[-1]["role"] == "user":
                c.messages.pop()
    if failed and not sys.stdin.isatty():
        raise failed
    return {k: v for k, v in asdict(c).items() if k != "saved"}


def _tried(line: str, c: Conversation, other: "Local | Remote") -> bool:
    """A command; what the file system refuses is said like any other mistake, and costs nothing."""
    try:
        return _command(line, c, other)
    except OSError as error:
        raise UserError(f"{line.split()[0]}: {error.strerror}: {line.partition(' ')[2].strip()}") from None


def _answer(other: Local | Remote, c: Conversation) -> None:
    """One answer, printed as it comes and kept."""
    began, first, tokens, text, state = time.perf_counter(), 0.0, 0, "", ""
    colour = sys.stdout.isatty()
    try:
        for part in other.answer(c):
            first = first or time.perf_counter()
            tokens += 1
            if part.kind == "reasoning" and state != "reasoning":
                print(f"{FAINT if colour else ''}(thinking) ", end="")
            elif part.kind == "content" and state == "reasoning":
                print(f"{PLAIN if colour else ''}\n")
            state = part.kind
            print(part.text, end="", flush=True)
            text += part.text if part.kind == "content" else ""
    except KeyboardInterrupt:
        print(f"{PLAIN if colour else ''} (stopped)", end="")
    print(PLAIN if colour and state == "reasoning" else "")
    if colour and first:
        rate = tokens / max(1e-9, time.perf_counter() - first)
        print(f"{FAINT}{tokens} pieces, first after {first - began:.2f} s, {rate:.0f} a second{PLAIN}")
    c.messages.append({"role": "assistant", "content": text})


def _command(line: str, c: Conversation, other: "Local | Remote") -> bool:
    """A line that begins with a slash. Returns whether an answer is wanted."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name == "help":
        say(HELP)
    elif name == "set":
        _set(rest, c, other.defaults)
    elif name == "system":
        c.system = rest
        say("The model is told so." if rest else "No system prompt any more.")
    elif name in ("retry", "undo"):
        if len(c.messages) < 2:
            raise UserError(f"/{name}: nothing was asked yet")
        c.messages.pop()
        if name == "retry":
            return True
        c.messages.pop()
        say("Taken back.")
    elif name == "clear":
        c.messages.clear()
        say("Started over.")
    elif name == "save":
        _save(rest, c)
    elif name == "load":
        found = read_json(Path(rest))
        messages = found.get("messages") if isinstance(found, dict) else None
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and m.get("role") in ("user", "assistant") and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise UserError(f"{rest}: not a conversation that /save wrote")
        c.messages, c.system = messages, str(found.get("system", ""))
        say(f"{len(messages)} messages.")
    else:
        raise UserError(f"/{name}: unknown; /help lists what there is")
    return False


def _set(text: str, c: Conversation, defaults: dict[str, Any]) -> None:
    name, _, value = text.partition(" ")
    if not name:
        for n, (_, what) in SETTINGS.items():
            say(f"{n:<20}{c.settings.get(n, defaults.get(n, '-'))!s:<10}{what}")
        return
    if name not in SETTINGS:
        raise UserError(f"/set: {name!r} is unknown; known: {', '.join(SETTINGS)}")
    if not value.strip():
        c.settings.pop(name, None)
        say(f"{name}: the model's default")
        return
    kind = SETTINGS[name][0]
    try:
        c.settings[name] = kind(value.strip())
    except ValueError:
        raise UserError(f"/set {name}: {value.strip()!r} is no {'whole number' if kind is int else 'number'}") from None
    if name == "thinking" and c.settings[name] not in ("off", *EFFORT):
        del c.settings[name]
        raise UserError(f"/set thinking: off, or one of {', '.join(EFFORT)}")
    say(f"{name} {c.settings[name]}")


def _save(name: str, c: Conversation) -> None:
    if not name.endswith((".json", ".md")):
        raise UserError("/save: give a name that ends in .json or .md")
    if Path(name).exists() and name != c.saved:
        raise UserError(f"/save: {name} is there already; give another name")
    if name.endswith(".json"):
        kept = {k: v for k, v in asdict(c).items() if k != "saved"}
        text = json.dumps(kept, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(f"## {m['role']}\n\n{m['content']}\n\n" for m in c.all())
    if not Path(name).absolute().parent.is_dir():
        raise UserError(f"/save: {Path(name).parent}: no such folder")
    write_text(Path(name), text)
    c.saved = name
    say(f"{name}: {len(c.messages)} messages")
