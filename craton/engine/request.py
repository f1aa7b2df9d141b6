"""What is asked of the engine, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from craton.base import UserError


@dataclass(frozen=True)
class Reasoning:
    """Thinking before the answer. Stop texts and structured output apply to what follows it."""

    end: str  # the text that ends it
    begin: int | None = None  # the token that opens it, if the model writes it first; None: the prompt has opened it
    budget: int | None = None  # tokens, after which the end is written for the model


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the names and meanings are those of the OpenAI API and of vLLM.

    The order: logit_bias, penalties, grammar, then temperature, top_k, top_p, min_p.
    """

    max_tokens: int = 256
    temperature: float = 1.0  # 0: the likeliest token, whatever the filters
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together reach this probability
    min_p: float = 0.0  # only those at least this likely, relative to the likeliest
    # Divides positive logits of tokens in prompt or answer, multiplies negative ones (arXiv 1909.05858).
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0  # subtracted for each time a token is in the answer
    presence_penalty: float = 0.0  # subtracted if a token is in the answer
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()  # texts that end the answer, not part of it
    stop_after: str = ""  # and only after this one, such as the beginning of the answer itself
    stop_before: str = ""  # stop texts count only before this text, such as a tool call's beginning
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # no end before
    seed: int | None = None  # None: another each time
    n: int = 1  # answers to the same prompt
    logprobs: int | None = None  # log-probabilities of the chosen tokens and of this many likeliest
    prompt_logprobs: int | None = None
    json_schema: str | None = None  # structured output: at most one of these four
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None  # Lark, as llguidance reads it
    reasoning: Reasoning | None = None
    show_special: tuple[int, ...] = ()  # special tokens that are part of the text; others never are

    def __post_init__(self) -> None:
        """UserError names the field that is out of range."""
        many, penalty = (0, 1 << 30), (-100, 100)
        bounds = dict(max_tokens=many, temperature=(0, 100), top_k=many, min_p=(0, 1), repetition_penalty=(0.01, 100))
        bounds |= dict(frequency_penalty=penalty, presence_penalty=penalty, min_tokens=many, n=(1, 128))
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} is {value}, must be from {low} to {high}", field=name)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, must be above 0 and at most 1", field="top_p")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 100:
                raise UserError(f"{name} is {value}, must be from 0 to 100", field=name)
        if len(self.stop) > 64 or any(not s for s in self.stop):
            raise UserError("stop: at most 64 texts, none of them empty", field="stop")
        if sum(map(bool, (self.json_schema, self.regex, self.choice, self.grammar))) > 1:
            raise UserError("json_schema, regex, choice and grammar exclude each other", field="json_schema")

    @property
    def structured(self) -> bool:
        """Whether the answer must follow a schema or grammar."""
        return bool(self.json_schema or self.regex or self.choice or self.grammar)

    @property
    def adjusts(self) -> bool:
        """Whether bias or penalties change the logits."""
        return bool(
            self.logit_bias or self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        )


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was."""

    token: int
    logprob: float  # nats, of the model's own distribution (temperature 1, no filters)
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, best first


@dataclass
class Completion:
    """One answer. finish_reason: "stop" (end token, stop text or grammar complete), "length", "cancelled", or "error"
    (a grammar that cannot go on)."""

    request: int
    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop text or token
    end_token: TokenLogprob | None = None  # the token that ended it, if one did; its log-probability if asked for
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache
    reasoning_tokens: int = 0  # of the answer, its opening and closing included
    embedding: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class EngineEvent:
    """What one step added to an answer. completion goes on growing in the engine's thread until it is whole, at the
    event that says finished; the other fields stay as they are."""

    completion: Completion
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()  # of token_ids, where they were asked for
    finished: bool = False


@dataclass
class Counters:
    """Since the engine started."""

    steps: int = 0
    computed_tokens: int = 0  # that went through the network
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0  # of those, found in the cache
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of those
    preemptions: int = 0
    cancelled: int = 0
    finished: int = 0
