"""Models behind an API: the one client that chat, evaluation, judges and comparison share.

openai:NAME, anthropic:NAME, gemini:NAME, mistral:NAME, deepseek:NAME, or URL#NAME for any server with OpenAI's API. A
key comes from the environment and goes to the host it belongs to, over https or to this machine, and nowhere else.
"""

import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from craton.base import UserError, local

_TRIES, _LONGEST_WAIT = 6, 60.0
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
Message = dict[str, Any]


@dataclass(frozen=True)
class Provider:
    """dialect: "openai", "anthropic" or "gemini"."""

    url: str
    key: str  # the variable of the environment
    dialect: str = "openai"


PROVIDERS = {
    "openai": Provider("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": Provider("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY", "anthropic"),
    "gemini": Provider("https://generativelanguage.googleapis.com/v1beta", "GEMINI_API_KEY", "gemini"),
    "mistral": Provider("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "deepseek": Provider("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
}


@dataclass
class Usage:
    """Tokens that were paid for, and requests that were made."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Reply:
    """One answer. finish: "stop", "length" or what else the server says."""

    text: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning: str = ""


def is_remote(name: str) -> bool:
    """Whether a MODEL is behind an API."""
    return name.startswith(("http://", "https://")) or name.partition(":")[0] in PROVIDERS


def overheard(url: str) -> bool:
    """Whether what is sent to an address can be read on the way."""
    parts = httpx.URL(url)
    return parts.scheme != "https" and not local(parts.host)


def key_for(url: str) -> str:
    """The API key for an address, '' for none: that of the provider whose host it is (OPENAI_API_KEY is for the server
    that OPENAI_BASE_URL names, if it does); else CRATON_API_KEY. Never over an open network."""
    if overheard(url):
        return ""
    host = httpx.URL(url).host
    for name, provider in PROVIDERS.items():
        own = os.environ.get("OPENAI_BASE_URL") if name == "openai" else None
        if httpx.URL(own or provider.url).host == host and os.environ.get(provider.key):
            return os.environ[provider.key].strip()
    return os.environ.get("CRATON_API_KEY", "").split(",")[0].strip()


def withheld(url: str) -> str:
    """Why a key that is set was not sent."""
    if overheard(url):
        return "; keys are sent over https only, and this address is not"
    return "; OPENAI_API_KEY goes to OpenAI alone" if os.environ.get("OPENAI_API_KEY") else ""


def api_root(url: str) -> str:
    """The address that /chat/completions is added to."""
    url = url.rstrip("/")
    return url if url.endswith(("/v1", "/v1beta")) or "/openai" in url else f"{url}/v1"


@dataclass
class Client:
    """A model of a server. usage: of all its requests. Raises UserError, with the server's own words, for what it
    refuses and for answers that are none."""

    url: str
    model: str
    dialect: str = "openai"
    timeout: float = 600.0
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        key = key_for(self.url)
        headers = {"openai": {"authorization": f"Bearer {key}"}, "anthropic": {"x-api-key": key}}
        headers["gemini"] = {"x-goog-api-key": key}
        own = headers[self.dialect] if key else {}
        if self.dialect == "anthropic":
            own["anthropic-version"] = "2023-06-01"
        self.http = httpx.Client(headers=own, timeout=httpx.Timeout(30, read=self.timeout))

    # ---- HTTP ----

    def request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON object that the server answers; tried again with growing, random pauses where that can help."""
        for attempt in range(_TRIES):
            last = attempt == _TRIES - 1
            try:
                got = self.http.request(method, self.url + path, json=body)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                refused = isinstance(error, httpx.ConnectError | httpx.InvalidURL | httpx.UnsupportedProtocol)
                if last or refused:
                    problem = f"{self.url}: no answer ({error or type(error).__name__})"
                    raise UserError(problem, code="no_server") from None
                self._pause(attempt, None)
                continue
            if got.status_code in _AGAIN and not last:
                self._pause(attempt, got.headers.get("retry-after"))
                continue
            self.check(got)
            self.usage.requests += 1
            try:
                value = got.json()
            except ValueError:
                raise UserError(f"{self.url}: answered {got.text[:80]!r}, which is no JSON", code="no_server") from None
            if not isinstance(value, dict):
                raise UserError(f"{self.url}: answered {got.text[:80]!r}, which is no JSON object", code="no_server")
            return value
        raise AssertionError("unreachable")

    def _pause(self, attempt: int, wanted: str | None) -> None:
        try:
            seconds = float(wanted or "")
        except ValueError:
            seconds = 0.5 * 2**attempt * (0.5 + random.random())
        time.sleep(min(seconds, _LONGEST_WAIT))

    def check(self, got: httpx.Response) -> None:
        """UserError for an answer that is an error."""
        if got.status_code == 401 and not key_for(self.url):
            wanted = next((p.key for p in PROVIDERS.values() if self.url.startswith(p.url)), "CRATON_API_KEY")
            raise UserError(f"{self.url}: the server wants an API key; set {wanted}{withheld(self.url)}")
        if got.is_error:
            try:
                message = str(got.json()["error"]["message"])
            except (ValueError, KeyError, TypeError):
                message = got.text[:200].replace("\n", " ")
            raise UserError(f"{self.url}: {got.status_code} {message}")

    # ---- answers ----

    def chat(self, messages: Sequence[Message], **settings: Any) -> Reply:
        """An answer to a conversation. settings: max_tokens, temperature, stop, seed and others by OpenAI's names."""
        path, body = _chat_body(self, messages, settings)
        return self._read(self.request("POST", path, body), _chat_reply[self.dialect])

    def complete(self, prompt: str, **settings: Any) -> Reply:
        """The continuation of a text, where the server has that."""
        self._only_openai("continues texts")
        body = {"model": self.model, "prompt": prompt, **{k: v for k, v in settings.items() if v is not None}}
        return self._read(self.request("POST", "/completions", body), _completion_reply)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of an answer as they come, in OpenAI's dialect."""
        try:
            with self.http.stream("POST", self.url + path, json=body | {"stream": True}) as got:
                if got.is_error:
                    got.read()
                    self.check(got)
                for line in got.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise UserError(f"{self.url}: {chunk['error'].get('message')}")
                    yield chunk
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise UserError(f"{self.url}: the connection broke ({error or type(error).__name__})") from None

    def prompt_logprobs(self, texts: Sequence[str]) -> list[list[tuple[int, float | None, bool]]]:
        """For each text, its tokens: how many characters before the end each begins, its log-probability, and whether
        it was the likeliest. From the end, since what servers put before a text counts in their offsets, or does not.
        UserError for a server that does not score what it is given."""
        self._only_openai("scores given texts")
        body = {"model": self.model, "prompt": list(texts), "max_tokens": 0, "echo": True, "logprobs": 1}
        why = f"{self.url}#{self.model}: cannot score given texts (echo with logprobs on /completions)"
        fix = "likelihood tasks need a model here, or a server such as craton serve or vLLM"
        try:
            found = self.request("POST", "/completions", body)
        except UserError as error:
            raise UserError(f"{why} ({error}); {fix}", code="no_likelihoods") from None
        out = []
        try:
            for choice in sorted(found["choices"], key=lambda c: c["index"]):
                scores = choice["logprobs"]
                rows, offsets = [], scores["text_offset"]
                end = offsets[-1] + len(scores["tokens"][-1])
                for i, value in enumerate(scores["token_logprobs"]):
                    top = (scores.get("top_logprobs") or [None] * (i + 1))[i] or {}
                    best = value is not None and value >= max(top.values(), default=value) - 1e-9
                    rows.append((int(end - offsets[i]), value, best))
                out.append(rows)
        except (KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f"{why}; {fix}", code="no_likelihoods") from None
        if len(out) != len(texts) or any(len(rows) < 2 for rows in out):
            raise UserError(f"{why}; {fix}", code="no_likelihoods")
        return out

    def _only_openai(self, what: str) -> None:
        if self.dialect != "openai":
            raise UserError(f"{self.url}#{self.model}: no server of this kind {what}", code="no_likelihoods")

    def _read(self, value: dict[str, Any], read: Any) -> Reply:
        try:
            reply: Reply = read(value)
        except (KeyError, IndexError, TypeError, AttributeError):
            shown = json.dumps(value)[:120]
            raise UserError(f"{self.url}: answered what is no answer ({shown})") from None
        self.usage.prompt_tokens += reply.prompt_tokens
        self.usage.completion_tokens += reply.completion_tokens
        return reply


def open_client(name: str) -> Client:
    """The client of a MODEL as users write it. UserError names what is missing."""
    provider, _, rest = name.partition(":")
    if provider in PROVIDERS:
        p = PROVIDERS[provider]
        if not rest:
            raise UserError(f"{name}: which model? write {provider}:NAME")
        if not os.environ.get(p.key):
            raise UserError(f"{name}: set {p.key} to your API key", field=p.key)
        return Client(p.url, rest, p.dialect)
    url, _, model = name.partition("#")
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL as error:
        raise UserError(f"{name}: not a URL ({error})") from None
    if not host:
        raise UserError(f"{name}: not a URL")
    if not model:
        raise UserError(f"{name}: which of the server's models? write {url}#NAME")
    return Client(api_root(url), model)


# ---- dialects -----------------------------------------------------------------------------------------------------


def _chat_body(client: Client, messages: Sequence[Message], settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    given = {k: v for k, v in settings.items() if v is not None and v != () and v != []}
    if client.dialect == "openai":
        newer = client.url == PROVIDERS["openai"].url
        if newer and "max_tokens" in given:
            given["max_completion_tokens"] = given.pop("max_tokens")
        return "/chat/completions", {"model": client.model, "messages": list(messages), **given}
    system = "\n\n".join(str(m["content"]) for m in messages if m["role"] == "system")
    turns = [m for m in messages if m["role"] != "system"]
    if client.dialect == "anthropic":
        body: dict[str, Any] = {"model": client.model, "messages": turns, "max_tokens": given.get("max_tokens", 1024)}
        body |= {"system": system} if system else {}
        body |= {k: given[k] for k in ("temperature", "top_p") if k in given}
        stops = [s for s in given.get("stop", []) if s.strip()]
        return "/messages", body | ({"stop_sequences": stops} if stops else {})
    roles = {"assistant": "model"}
    contents = [{"role": roles.get(m["role"], "user"), "parts": [{"text": str(m["content"])}]} for m in turns]
    names = {"max_tokens": "maxOutputTokens", "temperature": "temperature", "top_p": "topP", "stop": "stopSequences"}
    how = {names[k]: v for k, v in given.items() if k in names}
    body = {"contents": contents, "generationConfig": how}
    body |= {"systemInstruction": {"parts": [{"text": system}]}} if system else {}
    return f"/models/{client.model}:generateContent", body


def _openai_reply(value: dict[str, Any]) -> Reply:
    choice, used = value["choices"][0], value.get("usage") or {}
    message = choice["message"]
    text = message.get("content") or ""
    if not isinstance(text, str):
        text = "".join(part.get("text", "") for part in text)
    tokens = used.get("prompt_tokens", 0), used.get("completion_tokens", 0)
    return Reply(text, choice.get("finish_reason") or "stop", *tokens, message.get("reasoning_content") or "")


def _anthropic_reply(value: dict[str, Any]) -> Reply:
    text = "".join(part.get("text", "") for part in value["content"] if part.get("type") == "text")
    finish = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}
    used = value.get("usage") or {}
    reason = value.get("stop_reason") or "stop"
    return Reply(text, finish.get(reason, reason), used.get("input_tokens", 0), used.get("output_tokens", 0))


def _gemini_reply(value: dict[str, Any]) -> Reply:
    candidate, used = value["candidates"][0], value.get("usageMetadata") or {}
    parts = (candidate.get("content") or {}).get("parts") or []
    text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    finish = {"STOP": "stop", "MAX_TOKENS": "length"}
    reason = candidate.get("finishReason") or "STOP"
    tokens = used.get("promptTokenCount", 0), used.get("candidatesTokenCount", 0)
    return Reply(text, finish.get(reason, reason.lower()), *tokens)


def _completion_reply(value: dict[str, Any]) -> Reply:
    choice, used = value["choices"][0], value.get("usage") or {}
    tokens = used.get("prompt_tokens", 0), used.get("completion_tokens", 0)
    return Reply(choice["text"], choice.get("finish_reason") or "stop", *tokens)


_chat_reply = {"openai": _openai_reply, "anthropic": _anthropic_reply, "gemini": _gemini_reply}
