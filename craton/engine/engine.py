"""The engine: requests in, tokens out.

Each step is one forward pass over the slices that the scheduler chose; then every answer that has logits gets its next
token. Same request, same answer: on a CPU with the engine's kernels a token's logits do not depend, to the bit, on what
runs beside it, on cache hits, on how a prompt was cut, on preemption or on guesses.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from craton.base import UserError, free_memory
from craton.engine.answer import Answer
from craton.engine.batch import Assembled, assemble
from craton.engine.choose import append, choose, runs_ahead
from craton.engine.collect import Collector
from craton.engine.draft import PromptLookup
from craton.engine.draft_model import DraftModel
from craton.engine.generation import Generation, Slice
from craton.engine.request import Completion, Counters, EngineEvent, Sampling, TokenLogprob
from craton.engine.runner import Runner, cache_dtype
from craton.engine.sampler import uniform
from craton.engine.scheduler import Scheduler
from craton.engine.structured import Grammars, Matcher
from craton.engine.text import TextStream
from craton.model.cache import bytes_per_token
from craton.model.decoder import Decoder
from craton.model.lora import LowRank
from craton.model.paging import AHEAD, BLOCK
from craton.text.tokenizer import Tokenizer
from craton.weights.adapter import low_ranks

_LOGIT_BYTES = 64 << 20  # logits of one step at most


class Engine:
    """Not thread-safe but for `cancel` and `matcher`: one thread steps.

    network: on the device where it is to run. cache_bytes: of keys and values. step_tokens: in one forward pass.
    speculate: "" (no guessing) or "lookup" (from the text so far); a draft network with the same vocabulary guesses
    instead. end_ids: tokens that end an answer, besides the configuration's. exact: activations are not rounded to 8
    bits where weights are packed, which takes several times as long. dtype: of what a GPU computes, if it is not to be
    the weights'. UserError for options that cannot be.
    """

    def __init__(
        self,
        network: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        cache_bytes: int | None = None,
        step_tokens: int = 512,
        speculate: str = "",
        draft: Decoder | None = None,
        guesses: int = 4,
        most_running: int = 256,
        share_prefixes: bool = True,
        end_ids: tuple[int, ...] = (),
        exact: bool = False,
        dtype: torch.dtype | None = None,
    ):
        config = self.config = network.config
        self.tokenizer = tokenizer
        self.end_ids = tuple(dict.fromkeys([*config.eos_token_ids, *end_ids]))
        if speculate not in ("", "lookup"):
            raise UserError(f"speculate is {speculate!r}; known: '', 'lookup'", field="speculate")
        if draft is not None and draft.config.vocab_size != config.vocab_size:
            sizes = f"{draft.config.vocab_size}, the model's {config.vocab_size}"
            raise UserError(f"the draft model's vocabulary is {sizes}; they must be the same")
        self.speculate, self.guesses = speculate, guesses
        device = network.model.norm.weight.device
        size = (dtype if dtype is not None and device.type != "cpu" else cache_dtype(network)).itemsize
        each = sum(bytes_per_token(n.config, size) for n in (network, draft) if n is not None)
        room = cache_bytes or _default_cache(device, each, config.max_position_embeddings)
        blocks = max(2, room // (each * BLOCK))
        usable = blocks - (device.type != "cpu")  # the last one is for padding there
        self.context = min(config.max_position_embeddings, usable * BLOCK)
        self.runner = Runner(network, blocks, self.context, exact, dtype)
        self.draft = None if draft is None else DraftModel(draft, blocks, self.context, guesses)
        counters = self.counters = Counters()
        scored = max(1, _LOGIT_BYTES // (4 * config.vocab_size))
        limits = dict(step_tokens=step_tokens, scored_tokens=scored, max_running=most_running)
        self.scheduler = Scheduler(
            usable, share_prefixes=share_prefixes, counters=counters, guess=self._guess, **limits
        )
        self.answers: dict[Generation, Answer] = {}
        self.requests: dict[int, list[Answer]] = {}
        self.last_request = self.last_adapter = 0
        self.adapters: dict[str, str] = {}  # by name, what they are known by below
        self.leaving: set[str] = set()  # dropped, but still used
        self.inbox: dict[int, deque[EngineEvent]] = {}  # of requests that are streamed
        self.own_grammars: Grammars | None = None
        self.grammars_lock = threading.Lock()

    # ---- requests ----

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        adapter: str | None = None,
        score_from: int | None = None,
        embed: bool = False,
        matcher: Matcher | None = None,
    ) -> int:
        """A new request; returns its number. UserError if it cannot be served: an empty or too long prompt, ids outside
        the vocabulary, an unknown adapter, a schema that cannot be met.

        score_from: the first prompt position whose log-probability is wanted. embed: the mean hidden state is wanted.
        matcher: what `matcher` made of the sampling, where that is not to take this thread's time.
        """
        s, prompt = sampling or Sampling(), list(prompt)
        self._check(prompt, s, adapter)
        if s.prompt_logprobs is not None and score_from is None:
            score_from = 1
        self.last_request += 1
        seed = s.seed if s.seed is not None else int.from_bytes(os.urandom(8), "little")
        answers: list[Answer] = []
        most = min(s.max_tokens, self.context - len(prompt))
        for index in range(s.n):
            own = None if adapter is None else self.adapters[adapter]
            generation = Generation(list(prompt), len(prompt), most, own, every_state=embed)
            if answers:
                generation.leader = answers[0].generation
            else:
                generation.score_from = score_from
            completion = Completion(self.last_request, index, prompt_tokens=len(prompt))
            answers.append(self._answer(generation, completion, s, seed, matcher))
        self.requests[self.last_request] = answers
        for answer in answers:
            self.answers[answer.generation] = answer
            self.scheduler.add(answer.generation)
        self.counters.prompt_tokens += len(prompt)
        return self.last_request

    def _answer(self, g: Generation, completion: Completion, s: Sampling, seed: int, matcher: Matcher | None) -> Answer:
        answer = Answer(g, completion, s, seed)
        answer.matcher = matcher.copy() if matcher else self.matcher(s)
        answer.thinking = s.reasoning is not None and s.reasoning.begin is None
        if self.speculate == "lookup":
            answer.lookup = PromptLookup(self.guesses)
        if g.score_from is not None or g.every_state:
            answer.collector = Collector(s.prompt_logprobs or 0)
        if self.tokenizer is not None:
            answer.text = TextStream(self.tokenizer, g.tokens[: g.prompt], s)
            if s.reasoning is not None:
                answer.thinking_end = tuple(self.tokenizer.encode_rendered(s.reasoning.end))
        return answer

    def _check(self, prompt: list[int], s: Sampling, adapter: str | None) -> None:
        size = self.config.vocab_size
        if not prompt:
            raise UserError("the prompt is empty; give at least one token", field="prompt")
        for field, ids in (("prompt", prompt), ("logit_bias", s.logit_bias), ("stop_token_ids", s.stop_token_ids)):
            if (bad := next((i for i in ids if not 0 <= i < size), None)) is not None:
                raise UserError(f"{field}: token id {bad} is outside the model's vocabulary of {size}", field=field)
        if len(prompt) + bool(s.max_tokens) > self.context:
            own = self.config.max_position_embeddings
            why = "" if self.context == own else f", which the cache has room for, of the model's {own}"
            raise too_long(len(prompt), self.context, why)
        if adapter is not None and adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UserError(f"adapter {adapter!r} is not loaded; loaded: {known}", field="adapter")
        if (s.stop or s.structured or s.reasoning) and self.tokenizer is None:
            raise UserError("stop texts, structured output and reasoning need a tokenizer")

    def matcher(self, s: Sampling) -> Matcher | None:
        """The schema or grammar of a request, compiled; None if it has none. UserError if it is wrong. From any
        thread."""
        return self.grammars().matcher(s) if s.structured else None

    def grammars(self) -> Grammars:
        """Made at first use. From any thread."""
        with self.grammars_lock:
            if self.own_grammars is None:
                assert self.tokenizer is not None
                self.own_grammars = Grammars(self.tokenizer, self.config.vocab_size, self.end_ids)
        return self.own_grammars

    # ---- adapters ----

    def load_adapter(self, name: str, folder: Path) -> None:
        """Requests may name it from now on. UserError if it is not one for this network."""
        self.put_adapter(name, low_ranks(self.runner.source, folder))

    def put_adapter(self, name: str, parts: dict[str, LowRank]) -> None:
        """The same of what was read already. Another one of the same name takes the place of the one before, which ends
        the answers that it has begun."""
        self.last_adapter += 1
        key = f"{name}@{self.last_adapter}"  # what is cached for one is never used for another
        self.runner.load_adapter(key, parts)
        if name in self.adapters:
            self.drop_adapter(name)
        self.adapters[name] = key

    def drop_adapter(self, name: str) -> None:
        """Requests may not name it any more; it goes when the last answer that uses it is finished. UserError if there
        is none of this name."""
        if name not in self.adapters:
            raise UserError(f"adapter {name!r} is not loaded", field="adapter")
        self.leaving.add(self.adapters.pop(name))
        self._let_go()

    def _let_go(self) -> None:
        """Adapters that were dropped and that nothing uses any more."""
        used = {generation.adapter for generation in self.answers}
        for key in self.leaving - used:
            self.runner.drop_adapter(key)
            self.leaving.discard(key)

    def cancel(self, request: int) -> None:
        """Its blocks are free after the next step; unknown and finished requests are passed over. From any thread."""
        for answer in self.requests.get(request, []):
            answer.cancelled = True

    def fail_all(self) -> None:
        """Forget all requests, and what was computed for them."""
        self.scheduler.clear()
        self.requests.clear()
        self.answers.clear()

    def forget(self) -> None:
        """What was computed before is not used for requests to come, and not counted."""
        self.scheduler.pool.clear()
        self.counters = self.scheduler.counters = Counters()

    def weights_changed(self) -> None:
        """The network has other weights now: nothing that was computed with the old ones is used again."""
        self.runner.weights_changed()
        self.scheduler.restart()

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.busy

    @property
    def backlog(self) -> int:
        """Tokens of prompts that are not computed yet."""
        running = sum(len(g.tokens) - g.computed for g in self.scheduler.running if g.prefilling)
        return running + sum(len(g.tokens) for g in self.scheduler.waiting if g.leader is None)

    # ---- one step ----

    def step(self) -> list[EngineEvent]:
        """One forward pass; what it added to each answer."""
        events = self._advance()
        for event in events:
            if event.completion.request in self.inbox:
                self.inbox[event.completion.request].append(event)
        return events

    def _advance(self) -> list[EngineEvent]:
        events = self._drop_cancelled()
        if self.draft is not None:
            self.draft.guess([self.answers[g] for g in self.scheduler.running], self.scheduler)
        plan = self.scheduler.schedule()
        if not plan:
            return events
        if self.runner.device_step is not None and all(self._runs_ahead(part) for part in plan):
            return events + self._run_ahead(plan)
        self.counters.steps += 1
        self.counters.computed_tokens += sum(part.new for part in plan)
        made = assemble(plan, self.runner.cache, numbers=self.runner.numbers)
        want_logits = bool(made.rows.numel()) and any(not part.generation.every_state for part in plan)
        logits, hidden = self.runner.forward(made.ids, made.batch, made.rows, want_logits)
        return events + self._consume(plan, made, logits, hidden)

    def _runs_ahead(self, part: Slice) -> bool:
        generation = part.generation
        begins = part.new == 1 and part.past == len(generation.tokens) - 1 and generation.max_new > generation.answered
        return begins and runs_ahead(self.answers[generation])

    def _run_ahead(self, plan: list[Slice]) -> list[EngineEvent]:
        """Several tokens of each answer, which the device chose by itself; those after an answer's end are lost."""
        answers = [self.answers[part.generation] for part in plan]
        steps = min(AHEAD, max(part.generation.max_new - part.generation.answered for part in plan))
        for part in plan:
            g = part.generation
            if not self.scheduler.reserve(g, min(part.past + steps, g.prompt + g.max_new)):
                steps = 1
                break
        numbers = [
            [uniform(a.seed, a.completion.index, p.past + 1 + turn) if a.sampling.temperature else 0.0
             for p, a in zip(plan, answers, strict=True)]
            for turn in range(steps)
        ]  # fmt: skip
        tokens, scores = self.runner.device_step.decode(
            [part.generation.tokens[-1] for part in plan],
            [part.past for part in plan],
            [part.generation.blocks for part in plan],
            [(a.sampling.temperature, a.sampling.min_p, a.sampling.top_k, a.sampling.top_p) for a in answers],
            numbers,
            [self.runner.adapter_number(part.generation.adapter) for part in plan],
        )
        self.counters.steps += steps
        self.counters.computed_tokens += steps * len(plan)
        each = zip(plan, answers, zip(*tokens, strict=True), zip(*scores, strict=True), strict=True)
        return [self._take(part, answer, own, logprobs) for part, answer, own, logprobs in each]

    def _take(self, part: Slice, answer: Answer, tokens: Sequence[int], scores: Sequence[float]) -> EngineEvent:
        """Tokens that were chosen already, as far as the answer goes."""
        part.generation.guesses = []
        added, text, finish = list[int](), "", None
        for token, logprob in zip(tokens, scores, strict=True):
            choice = append(answer, token, False, partial(_known, TokenLogprob(token, logprob)), self.end_ids)
            new = [] if choice.token is None else [choice.token]
            finish = choice.finish
            more, stopped = self._text(answer, new, finish is not None)
            if stopped is not None:
                finish, answer.completion.stop_reason = "stop", stopped
            added += new
            text += more
            if finish is not None:
                break
        self.scheduler.computed(Slice(part.generation, part.past, len(tokens)))
        return self._advanced(part, answer, added, text, finish)

    def _guess(self, generation: Generation) -> list[int] | None:
        lookup = self.answers[generation].lookup
        return None if lookup is None else lookup.guess(generation.tokens)

    def _drop_cancelled(self) -> list[EngineEvent]:
        cancelled = [a for a in self.answers.values() if a.cancelled]
        self.counters.cancelled += len(cancelled)
        return [self._finish(answer, "cancelled", (), "") for answer in cancelled]

    def _consume(self, plan: list[Slice], made: Assembled, logits: Tensor | None, hidden: Tensor) -> list[EngineEvent]:
        """Collect what prompts were computed for, and go on with the answers whose prompts are complete."""
        events: list[EngineEvent] = []
        ready: list[tuple[Slice, Answer, int]] = []  # with the row of the first choice
        for part, (begin, end) in zip(plan, made.outputs, strict=True):
            answer = self.answers[part.generation]
            if answer.collector is not None:
                answer.collector.add(part, None if logits is None else logits[begin:end], hidden[begin:end])
            whole = part.past + part.new >= len(part.generation.tokens)
            self.scheduler.computed(part)
            if not whole:
                continue  # more of the prompt to come
            if part.generation.max_new == 0:
                events.append(self._finish(answer, "length", (), ""))
            else:
                guessed = part.past + part.new - len(part.generation.tokens)
                part.generation.guesses = part.generation.guesses[:guessed]
                self.counters.drafted_tokens += guessed
                ready.append((part, answer, end - 1 - guessed))
        if ready:
            assert logits is not None
            events += self._continue(ready, logits)
        return events

    def _continue(self, ready: list[tuple[Slice, Answer, int]], logits: Tensor) -> list[EngineEvent]:
        """The next token of each answer; and, as long as its guesses come true, the next but one."""
        added: dict[Answer, list[int]] = {answer: [] for _, answer, _ in ready}
        texts = dict.fromkeys(added, "")
        finishes: dict[Answer, str | None] = dict.fromkeys(added)
        going, turn = ready, 0
        while going:
            rows = [row + turn for _, _, row in going]
            same = len(rows) == logits.shape[0] and rows == list(range(len(rows)))
            choices = choose([a for _, a, _ in going], logits if same else logits[rows], self.end_ids)
            further = []
            for item, choice in zip(going, choices, strict=True):
                _, answer, _ = item
                new = [] if choice.token is None else [choice.token]
                finish = choice.finish
                more, stopped = self._text(answer, new, finish is not None)
                if stopped is not None:
                    finish, answer.completion.stop_reason = "stop", stopped
                added[answer] += new
                texts[answer] += more
                finishes[answer] = finish
                guesses = answer.generation.guesses
                if finish is None and turn < len(guesses) and choice.token == guesses[turn]:
                    self.counters.accepted_tokens += 1
                    further.append(item)
            going, turn = further, turn + 1
        return [self._advanced(part, a, added[a], texts[a], finishes[a]) for part, a, _ in ready]

    def _advanced(self, part: Slice, answer: Answer, added: list[int], text: str, finish: str | None) -> EngineEvent:
        generation = answer.generation
        answer.completion.cached_tokens = generation.cached or 0
        if generation.guesses:  # those that came true are in the cache already; the newest token is not
            generation.guesses = []
            end = min(part.past + part.new, len(generation.tokens) - 1)
            self.scheduler.computed(Slice(generation, part.past, end - part.past))
        self.counters.generated_tokens += len(added)
        if finish:
            return self._finish(answer, finish, tuple(added), text)
        return EngineEvent(answer.completion, tuple(added), text, _newest(answer.completion, added))

    def _text(self, answer: Answer, new: list[int], last: bool) -> tuple[str, str | None]:
        if answer.text is None:
            return "", None
        more, stopped = answer.text.feed(new, last=last, thinking=answer.thinking)
        answer.completion.text = answer.text.text
        return more, stopped

    def _finish(self, answer: Answer, reason: str, added: tuple[int, ...], text: str) -> EngineEvent:
        completion, generation = answer.completion, answer.generation
        completion.finish_reason = reason
        if answer.collector is not None:
            completion.prompt_logprobs = answer.collector.scores
            completion.embedding = answer.collector.embedding(generation.prompt)
        self.scheduler.remove(generation)
        del self.answers[generation]
        siblings = self.requests[completion.request]
        if all(a.completion.finish_reason for a in siblings):
            del self.requests[completion.request]
        if self.leaving:
            self._let_go()
        self.counters.finished += reason != "cancelled"
        return EngineEvent(completion, added, text, _newest(completion, added), True)

    # ---- whole answers ----

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        matcher: Matcher | None = None,
        adapter: str | None = None,
    ) -> Iterator[EngineEvent]:
        """Events of one request, until it is finished."""
        request = self.add(prompt, sampling, matcher=matcher, adapter=adapter)
        inbox = self.inbox[request] = deque()
        try:
            while inbox or request in self.requests:
                if not inbox:
                    self.step()
                while inbox:
                    yield inbox.popleft()
        finally:
            del self.inbox[request]
            if request in self.requests:  # nobody listens any more
                self.cancel(request)
                self.step()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[list[Completion]]:
        """All answers of each prompt, in order."""
        if sampling is None or isinstance(sampling, Sampling):
            sampling = [sampling or Sampling()] * len(prompts)
        numbers: list[int] = []
        try:
            for prompt, s in zip(prompts, sampling, strict=True):
                numbers.append(self.add(prompt, s))
        except UserError:
            for number in numbers:
                self.cancel(number)
            raise
        return self._run(numbers)

    def _run(self, numbers: list[int]) -> list[list[Completion]]:
        done: dict[int, list[Completion]] = {n: [] for n in numbers}
        while any(n in self.requests for n in numbers):
            for event in self.step():
                if event.finished and event.completion.request in done:
                    done[event.completion.request].append(event.completion)
        return [sorted(done[n], key=lambda c: c.index) for n in numbers]

    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], exact: bool = True
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log-probability of the continuation in nats, and whether greedy
        decoding gives it. The context must have a token. exact: whatever the engine does otherwise, activations are not
        rounded."""
        if exact and self.runner.packed and not self.runner.exact:
            self.scheduler.pool.clear()  # what is cached was made of rounded ones, and the other way round
            with self.runner.exactly():
                out = self.loglikelihood(pairs)
            self.scheduler.pool.clear()
            return out
        numbers = []
        for context, continuation in pairs:
            if not context or not continuation:
                raise UserError("loglikelihood needs at least one token of context and one of continuation")
            sampling = Sampling(max_tokens=0, prompt_logprobs=1)
            numbers.append(self.add([*context, *continuation], sampling, score_from=len(context)))
        out = []
        for (completion,), (context, _) in zip(self._run(numbers), pairs, strict=True):
            scores = [s for s in completion.prompt_logprobs[len(context) :] if s is not None]
            out.append((sum(s.logprob for s in scores), all(s.top[0][0] == s.token for s in scores)))
        return out

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(texts, hidden): the mean of the last hidden states over a text's tokens, scaled to length 1."""
        numbers = [self.add(t, Sampling(max_tokens=0), embed=True) for t in texts]
        return torch.tensor([c.embedding for (c,) in self._run(numbers)])


def too_long(tokens: int | str, context: int, why: str, field: str = "prompt") -> UserError:
    """The error of a prompt of so many tokens. why: more about the context."""
    message = f"the prompt has {tokens} tokens, the context is {context}{why}; shorten it"
    return UserError(message, field=field, code="context_length_exceeded")


def _known(score: TokenLogprob, _: int) -> TokenLogprob:
    return score


def _newest(completion: Completion, added: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """Scores of the tokens that were added last."""
    scores = completion.logprobs
    return tuple(scores[len(scores) - len(added) :]) if scores and added else ()


def _default_cache(device: torch.device, bytes_a_token: int, context: int) -> int:
    """No more than 64 full contexts. On a CPU a quarter of the memory that is free, at most 4 GiB; on a GPU, whose
    memory is for nothing else, three quarters of what is free there."""
    most = bytes_a_token * (context + BLOCK) * 64
    if device.type == "cuda":
        return min(torch.cuda.mem_get_info(device)[0] * 3 // 4, most)
    return min(free_memory() // 4, 4 << 30, most)
