"""The engine: requests in, tokens out.

Each step takes the next token of every running answer, and pieces of prompts in what room is left, through the
network in one forward pass (continuous batching, arXiv 2309.06180; chunked prefill, arXiv 2403.02310). When the cache
is full, the answer that came last gives its blocks up and is computed again later.

Same request, same answer: on a CPU with the engine's kernels a token's logits do not depend, to the bit, on what runs
beside it, on cache hits, on how a prompt was cut, on preemption or on guesses.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from tokenizers.decoders import DecodeStream

from craton.base import UserError
from craton.engine.blocks import BlockPool
from craton.engine.request import Completion, Counters, Event, Sampling, TokenLogprob
from craton.engine.runner import Runner
from craton.engine.sampler import adjusted, draw, token_logprobs, uniform
from craton.engine.speculate import PromptLookup
from craton.engine.structured import Grammars, Matcher
from craton.model.cache import BLOCK, Step, bytes_per_token
from craton.model.decoder import Decoder
from craton.text.tokenizer import Tokenizer

_LOGIT_BYTES = 64 << 20  # logits of one step at most


@dataclass(eq=False)
class Sequence:
    """One answer in the making."""

    completion: Completion
    sampling: Sampling
    tokens: list[int]  # prompt and answer
    prompt: int  # tokens of the prompt
    most: int  # tokens that the answer may have
    seed: int
    adapter: str | None = None
    leader: "Sequence | None" = None  # an answer to the same prompt, whose cache it waits for
    score_from: int | None = None  # first prompt position whose log-probability is wanted
    embed: bool = False
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the cache
    identity: int = 0  # of the last known block
    known: int = 0  # blocks made known
    matcher: Matcher | None = None
    lookup: PromptLookup | None = None
    drafted: int = 0  # tokens that the draft model has seen
    guesses: list[int] = field(default_factory=list)
    decode: DecodeStream | None = None
    held: str = ""  # text that may yet turn out to begin a stop text
    total: torch.Tensor | None = None  # of hidden states
    cancelled: bool = False
    admitted: bool = False
    thinking: bool = False
    forced: list[int] = field(default_factory=list)  # tokens to come, whatever the model says

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.tokens) - 1


class Engine:
    """Not thread-safe but for `cancel`: one thread steps.

    network: on the device where it is to run. speculate: "" (no guessing), "lookup" (from the text so far); a draft
    network with the same vocabulary guesses instead. cache_bytes: of keys and values. step_tokens: in one forward pass.
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
    ):
        config = self.config = network.config
        self.tokenizer, self.step_tokens, self.most_running, self.share_prefixes = (
            tokenizer,
            step_tokens,
            most_running,
            share_prefixes,
        )
        if speculate not in ("", "lookup"):
            raise UserError(f"speculate is {speculate!r}; known: '', 'lookup'")
        self.speculate, self.guesses = speculate, guesses
        each = bytes_per_token(config) + (bytes_per_token(draft.config) if draft else 0)
        blocks = max(2, (cache_bytes or _default_cache(each, config.max_position_embeddings)) // (each * BLOCK))
        self.pool = BlockPool(blocks)
        self.context = min(config.max_position_embeddings, blocks * BLOCK)
        self.runner = Runner(network, blocks, self.context)
        self.draft: Runner | None = None
        if draft is not None:
            if draft.config.vocab_size != config.vocab_size:
                raise UserError(
                    f"the draft model's vocabulary is {draft.config.vocab_size}, the model's {config.vocab_size}; "
                    "they must be the same"
                )
            self.draft = Runner(draft, blocks, min(self.context, draft.config.max_position_embeddings))
        self.grammars: Grammars | None = None
        self.grammars_lock = threading.Lock()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.requests: dict[int, list[Sequence]] = {}
        self.counters = Counters()
        self.last_request = 0
        self.inbox: dict[int, deque[Event]] = {}  # of requests that are streamed

    # ---- requests ----

    def add(
        self,
        prompt: Many[int],
        sampling: Sampling | None = None,
        *,
        adapter: str | None = None,
        score_from: int | None = None,
        embed: bool = False,
        matcher: Matcher | None = None,
    ) -> int:
        """A new request; returns its number. UserError if it cannot be served: an empty or too long prompt, ids outside
        the vocabulary, an unknown adapter, a schema that cannot be met. matcher: what `matcher` made of the sampling,
        where that is not to take this thread's time."""
        s = sampling or Sampling()
        prompt = list(prompt)
        if not prompt:
            raise UserError("the prompt is empty; give at least one token")
        if max(prompt) >= self.config.vocab_size or min(prompt) < 0:
            bad = max(prompt) if max(prompt) >= self.config.vocab_size else min(prompt)
            raise UserError(f"token id {bad} is outside the model's vocabulary of {self.config.vocab_size}")
        if len(prompt) + bool(s.max_tokens) > self.context:
            why = (
                ""
                if self.context == self.config.max_position_embeddings
                else f", which the cache has room for, of the model's {self.config.max_position_embeddings}"
            )
            raise UserError(f"the prompt has {len(prompt)} tokens, the context is {self.context}{why}; shorten it")
        if bad_bias := [i for i in s.logit_bias if not 0 <= i < self.config.vocab_size]:
            raise UserError(
                f"logit_bias: token id {bad_bias[0]} is outside the model's vocabulary of {self.config.vocab_size}"
            )
        if bad_stop := [i for i in s.stop_token_ids if not 0 <= i < self.config.vocab_size]:
            raise UserError(
                f"stop_token_ids: {bad_stop[0]} is outside the model's vocabulary of {self.config.vocab_size}"
            )
        if adapter is not None:
            raise UserError(f"adapter {adapter!r} is not loaded")
        if (s.stop or s.structured or s.reasoning) and self.tokenizer is None:
            raise UserError("stop texts, structured output and reasoning need a tokenizer")
        if s.prompt_logprobs is not None and score_from is None:
            score_from = 1
        self.last_request += 1
        most = min(s.max_tokens, self.context - len(prompt))
        seed = s.seed if s.seed is not None else int.from_bytes(os.urandom(8), "little")
        sequences: list[Sequence] = []
        for index in range(s.n):
            leader = sequences[0] if sequences else None
            sequence = Sequence(
                Completion(self.last_request, index, prompt_tokens=len(prompt)),
                s,
                list(prompt),
                len(prompt),
                most,
                seed,
                adapter,
                leader,
                score_from if leader is None else None,
                embed,
            )
            sequence.matcher = matcher.copy() if matcher else self.matcher(s)
            if self.speculate == "lookup":
                sequence.lookup = PromptLookup(self.guesses)
            sequence.thinking = s.reasoning is not None and s.reasoning.begin is None
            if self.tokenizer is not None:
                sequence.decode = DecodeStream(ids=self._before(prompt), skip_special_tokens=False)
            sequences.append(sequence)
        self.requests[self.last_request] = sequences
        self.waiting.extend(sequences)
        self.counters.prompt_tokens += len(prompt)
        return self.last_request

    def _before(self, prompt: list[int]) -> list[int]:
        """The tokens that an answer's text is read after, so that its first space is not lost."""
        assert self.tokenizer is not None
        return (
            [t for t in prompt[-6:] if t not in self.tokenizer.special_ids] if self.tokenizer.drops_first_space else []
        )

    def matcher(self, s: Sampling) -> Matcher | None:
        """The schema or grammar of a request, compiled; None if it has none. UserError if it is wrong. From any
        thread."""
        if not s.structured:
            return None
        with self.grammars_lock:
            if self.grammars is None:
                assert self.tokenizer is not None
                self.grammars = Grammars(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)
        return self.grammars.matcher(s)

    def cancel(self, request: int) -> None:
        """Its blocks are free after the next step; unknown and finished requests are passed over. From any thread."""
        for sequence in self.requests.get(request, []):
            sequence.cancelled = True

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    # ---- one step ----

    def step(self) -> list[Event]:
        """One forward pass; what it added to each answer."""
        events = self._advance()
        for event in events:
            if event.completion.request in self.inbox:
                self.inbox[event.completion.request].append(event)
        return events

    def _advance(self) -> list[Event]:
        events = self._drop_cancelled()
        if self.draft is not None:
            self._draft_guesses()
        plan = self._schedule()
        if not plan:
            return events
        self.counters.steps += 1
        self.counters.computed_tokens += sum(new for _, new in plan)
        logits, hidden, outputs = self._forward(self.runner, plan)
        greedy = (
            logits.argmax(-1).tolist()
            if logits is not None and any(s.sampling.temperature == 0 for s, _ in plan)
            else None
        )
        for sequence, new in plan:
            events += self._consume(sequence, new, logits, hidden, outputs[id(sequence)], greedy)
        return events

    def _drop_cancelled(self) -> list[Event]:
        out = []
        for sequence in [s for s in (*self.waiting, *self.running) if s.cancelled]:
            if sequence in self.running:
                self.running.remove(sequence)
            else:
                self.waiting.remove(sequence)
            self.counters.cancelled += 1
            out.append(self._finish(sequence, "cancelled", (), ""))
        return out

    def _schedule(self) -> list[tuple[Sequence, int]]:
        """Who runs in this step, with how many new tokens."""
        plan: list[tuple[Sequence, int]] = []
        room = self.step_tokens
        for sequence in [*sorted(self.running, key=lambda s: s.prefilling)]:
            if sequence not in self.running:  # preempted meanwhile
                continue
            if sequence.lookup is not None and not sequence.prefilling:
                sequence.guesses = sequence.lookup.guess(sequence.tokens)
            new = self._wanted(sequence, room)
            while new and not self._reserve(sequence, sequence.computed + new):
                if sequence.guesses:  # rather no guessing than a preemption
                    sequence.guesses = []
                    new = self._wanted(sequence, room)
                    continue
                victim = self.running[-1]
                self._preempt(victim)
                plan = [(s, n) for s, n in plan if s is not victim]
                if victim is sequence:
                    new = 0
            if new:
                plan.append((sequence, new))
                room -= new
        while self.waiting and room > 0 and len(self.running) < self.most_running:
            sequence = self.waiting[0]
            if (
                sequence.leader is not None
                and sequence.leader.prefilling
                and sequence.leader.completion.finish_reason is None
                and not sequence.leader.cancelled
            ):
                break
            if not self._admit(sequence, room):
                break
            new = self._wanted(sequence, room)
            plan.append((sequence, new))
            room -= new
        return plan

    def _wanted(self, sequence: Sequence, room: int) -> int:
        """New tokens of a sequence in this step, its guesses included."""
        left = len(sequence.tokens) - sequence.computed
        if left > 1 or not sequence.completion.token_ids:
            most = room
            if sequence.score_from is not None:
                most = min(room, max(1, _LOGIT_BYTES // (4 * self.config.vocab_size)))
            return min(left, most)
        spare = sequence.most - len(sequence.completion.token_ids) - 1
        sequence.guesses = sequence.guesses[: max(0, min(spare, room - 1))]
        return min(room, 1 + len(sequence.guesses))

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for this many tokens, or False and none."""
        missing = -(-tokens // BLOCK) - len(sequence.blocks)
        if missing > self.pool.free:
            return False
        for _ in range(missing):
            block = self.pool.allocate()
            assert block is not None
            sequence.blocks.append(block)
        return True

    def _admit(self, sequence: Sequence, room: int) -> bool:
        limit = len(sequence.tokens) - 1
        if sequence.score_from is not None:
            limit = min(limit, sequence.score_from - 1)
        if sequence.embed or not self.share_prefixes:
            limit = 0
        sequence.blocks, sequence.identity = self.pool.find(sequence.tokens, limit)
        sequence.known = len(sequence.blocks)
        sequence.computed = sequence.known * BLOCK
        new = min(room, len(sequence.tokens) - sequence.computed)
        # Leave a block for each answer that runs, or the newcomer would soon be preempted again.
        if (
            -(-(sequence.computed + new) // BLOCK) - len(sequence.blocks) + len(self.running) > self.pool.free
            and self.running
            or not self._reserve(sequence, sequence.computed + new)
        ):
            self.pool.release(sequence.blocks)
            sequence.blocks, sequence.computed = [], 0
            return False
        if not sequence.admitted:
            sequence.completion.cached_tokens = min(sequence.computed, sequence.prompt)
            self.counters.cached_prompt_tokens += sequence.completion.cached_tokens
            sequence.admitted = True
        self.waiting.popleft()
        self.running.append(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.known, sequence.identity, sequence.drafted, sequence.guesses = (
            [],
            0,
            0,
            0,
            0,
            [],
        )
        if sequence.total is not None or sequence.score_from is not None:  # what was gathered so far comes again
            sequence.total, sequence.completion.prompt_logprobs = None, []
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self.counters.preemptions += 1

    def _forward(
        self, runner: Runner, plan: list[tuple[Sequence, int]], only_last: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor, dict[int, tuple[int, int]]]:
        """Logits and hidden states of the tokens that need them; for each sequence the range of its rows."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths, rows = [0], list[int](), list[int]()
        outputs: dict[int, tuple[int, int]] = {}
        for sequence, new in plan:
            past = sequence.drafted if only_last else sequence.computed
            line = sequence.tokens[past : past + new]
            line += sequence.guesses[: new - len(line)]
            at = len(ids)
            ids += line
            positions += range(past, past + new)
            blocks = sequence.blocks
            slots += [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(past, past + new)]
            starts.append(len(ids))
            lengths.append(past + new)
            first = self._first_output(sequence, past, new) if not only_last else new - 1
            outputs[id(sequence)] = (len(rows), len(rows) + new - first)
            rows += range(at + first, at + new)
        most = max(-(-n // BLOCK) for n in lengths)
        tables = [
            s.blocks[: -(-n // BLOCK)] + [0] * (most - -(-n // BLOCK)) for (s, _), n in zip(plan, lengths, strict=True)
        ]
        as_ints = [
            torch.tensor(v, dtype=torch.int32, device=runner.device)
            for v in (positions, slots, starts, lengths, tables)
        ]
        step = Step(runner.cache, *as_ints)
        want = only_last or any(not s.embed for s, _ in plan)
        logits, hidden = runner.forward(
            torch.tensor(ids, dtype=torch.int32), step, torch.tensor(rows, dtype=torch.int32), want and bool(rows)
        )
        return logits, hidden, outputs

    @staticmethod
    def _first_output(sequence: Sequence, past: int, new: int) -> int:
        """The first of a sequence's new tokens whose logits (or hidden state) are needed; `new` for none."""
        if sequence.embed:
            return 0
        first = len(sequence.tokens) - 1 - past
        if sequence.score_from is not None and past < sequence.prompt:
            first = min(first, max(0, sequence.score_from - 1 - past))
        return min(first, new)

    def _consume(
        self,
        sequence: Sequence,
        new: int,
        logits: torch.Tensor | None,
        hidden: torch.Tensor,
        rows: tuple[int, int],
        greedy: list[int] | None,
    ) -> list[Event]:
        past, tokens = sequence.computed, sequence.tokens
        first = past + new - (rows[1] - rows[0])  # position of the first row
        if sequence.embed:
            total = hidden[rows[0] : rows[1]].double().sum(0)
            sequence.total = total if sequence.total is None else sequence.total + total
        if sequence.score_from is not None and rows[0] < rows[1] and first < sequence.prompt - 1:
            assert logits is not None
            end = min(past + new, sequence.prompt - 1)
            part = logits[rows[0] : rows[0] + end - first]
            scores: list[TokenLogprob | None] = list(
                token_logprobs(part, tokens[first + 1 : end + 1], sequence.sampling.prompt_logprobs or 0)
            )
            if not sequence.completion.prompt_logprobs:
                sequence.completion.prompt_logprobs = [None] * (first + 1)
            sequence.completion.prompt_logprobs += scores
        sequence.computed = min(past + new, len(tokens))
        self._make_known(sequence)
        if past + new < len(tokens):
            return []  # more of the prompt to come
        if sequence.most == 0:
            return [self._finish(sequence, "length", (), "")]
        assert logits is not None
        guesses, sequence.guesses = sequence.guesses[: past + new - len(tokens)], []
        self.counters.drafted_tokens += len(guesses)
        row = rows[1] - 1 - len(guesses)
        added: list[int] = []
        text = ""
        for i in range(len(guesses) + 1):
            token, finish = self._choose(sequence, logits[row + i], greedy[row + i] if greedy else None)
            new_tokens = [] if token is None else [token]
            added += new_tokens
            more, stopped = self._text(sequence, new_tokens, finish is not None)
            text += more
            if stopped is not None:
                finish, sequence.completion.stop_reason = "stop", stopped
            if finish or i == len(guesses) or token != guesses[i]:
                break
            self.counters.accepted_tokens += 1
        # The guesses that came true are in the cache already.
        sequence.computed = min(past + new, len(tokens) - 1)
        self._make_known(sequence)
        self.counters.generated_tokens += len(added)
        if finish:
            return [self._finish(sequence, finish, tuple(added), text)]
        return [Event(sequence.completion, tuple(added), text)]

    def _choose(self, sequence: Sequence, logits: torch.Tensor, likeliest: int | None) -> tuple[int | None, str | None]:
        """The next token of an answer, appended to it, and whether it ends there. An end token is no part of it."""
        s, completion, answer = sequence.sampling, sequence.completion, sequence.completion.token_ids
        left = sequence.most - len(answer)
        scores = adjusted(logits, s, sequence.tokens[: sequence.prompt], answer) if s.adjusts else logits
        ends = () if s.ignore_eos else self.config.eos_token_ids
        if len(answer) < s.min_tokens and (ends or s.stop_token_ids):
            scores = scores.index_fill(0, torch.tensor([*ends, *s.stop_token_ids]), -torch.inf)

        def drawn(scores: torch.Tensor) -> int:
            if scores is logits and s.temperature == 0 and likeliest is not None:
                return likeliest
            return draw(scores, s, uniform(sequence.seed, completion.index, len(sequence.tokens)))

        if (
            s.reasoning is not None
            and not answer
            and s.reasoning.begin is not None
            and drawn(scores) == s.reasoning.begin
        ):
            sequence.thinking = True
        complete, thinking = False, sequence.thinking
        if thinking:
            token = self._think(sequence, drawn(scores))
        elif sequence.matcher is None:
            token = drawn(scores)
        else:
            try:
                scores = sequence.matcher.mask(scores, left)
            except UserError as error:  # this answer fails, not its neighbours
                completion.stop_reason = str(error)
                return None, "error"
            token = drawn(scores)
            while not sequence.matcher.accepts(token):
                scores = scores.index_fill(0, torch.tensor([token]), -torch.inf)
                if bool((scores > -torch.inf).any()):
                    token = drawn(scores)
                elif (spelled := sequence.matcher.spelled()) is not None:
                    token = spelled
                    break
                else:
                    completion.stop_reason = "the grammar allows no token here"
                    return None, "error"
            token, complete = sequence.matcher.take(token, left - 1)
        if (token in ends or token in s.stop_token_ids) and len(answer) >= s.min_tokens:
            completion.stop_reason = token if token in s.stop_token_ids else None
            return None, "stop"
        if s.logprobs is not None:
            completion.logprobs += token_logprobs(logits[None], [token], s.logprobs)
        completion.reasoning_tokens += thinking
        answer.append(token)
        sequence.tokens.append(token)
        if complete:
            return token, "stop"
        return token, "length" if len(answer) >= sequence.most else None

    def _think(self, sequence: Sequence, token: int) -> int:
        """A token of the thinking: the model's, or the end's if the budget is used up."""
        reasoning, answer = sequence.sampling.reasoning, sequence.completion.token_ids
        assert reasoning is not None and self.tokenizer is not None
        end = self.tokenizer.marker(reasoning.end)
        if (
            reasoning.budget is not None
            and sequence.completion.reasoning_tokens >= reasoning.budget
            and not sequence.forced
            and token != end[0]
        ):
            sequence.forced = list(end)
        if sequence.forced:
            token = sequence.forced.pop(0)
        sequence.thinking = [*answer[len(answer) - len(end) + 1 :], token][-len(end) :] != end
        return token

    def _make_known(self, sequence: Sequence) -> None:
        if not self.share_prefixes:
            return
        while (sequence.known + 1) * BLOCK <= sequence.computed:
            at = sequence.known * BLOCK
            sequence.identity = self.pool.know(
                sequence.blocks[sequence.known], sequence.identity, tuple(sequence.tokens[at : at + BLOCK])
            )
            sequence.known += 1

    def _text(self, sequence: Sequence, added: list[int], last: bool) -> tuple[str, str | None]:
        """New text of an answer that is safe to show, and the stop text that ended it."""
        completion = sequence.completion
        if sequence.decode is None:
            return "", None
        assert self.tokenizer is not None
        new, hidden = "", self.tokenizer.special_ids.difference(sequence.sampling.show_special)
        for token in added:
            if token in hidden:
                continue
            try:
                new += sequence.decode.step(self.tokenizer.backend, token) or ""
            except Exception:  # the library gives up on some sequences of single bytes; go on after them
                sequence.decode = DecodeStream(skip_special_tokens=False)
        if last:  # what an unfinished character decodes to
            before = self._before(sequence.tokens[: sequence.prompt])
            decode = self.tokenizer.backend.decode
            sent, base = completion.text + sequence.held + new, decode(before, skip_special_tokens=False)
            whole = decode([*before, *(t for t in completion.token_ids if t not in hidden)], skip_special_tokens=False)
            whole = whole.removeprefix(base)
            new += whole[len(sent) :] if whole.startswith(sent) else ""
        text = sequence.held + new
        searched = (
            sequence.sampling.stop
            if len(completion.token_ids) >= sequence.sampling.min_tokens and not sequence.thinking
            else ()
        )
        if searched and (mark := sequence.sampling.stop_before) and mark in completion.text + text:
            searched = ()
        found = min(((at, s) for s in searched if (at := text.find(s)) >= 0), default=None)
        if found is not None:
            text, sequence.held = text[: found[0]], ""
        else:
            keep = 0
            if not last:
                keep = max(
                    (n for s in searched for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n])),
                    default=0,
                )
            text, sequence.held = text[: len(text) - keep], text[len(text) - keep :]
        completion.text += text
        return text, found[1] if found else None

    def _finish(self, sequence: Sequence, reason: str, added: tuple[int, ...], text: str) -> Event:
        completion = sequence.completion
        completion.finish_reason = reason
        if sequence.total is not None:
            mean = sequence.total / sequence.prompt
            completion.embedding = (mean / mean.norm().clamp_min(1e-12)).tolist()
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        if sequence in self.running:
            self.running.remove(sequence)
        siblings = self.requests[completion.request]
        if all(s.completion.finish_reason for s in siblings):
            del self.requests[completion.request]
        self.counters.finished += reason != "cancelled"
        return Event(completion, added, text)

    # ---- guesses of a draft model ----

    @torch.inference_mode()
    def _draft_guesses(self) -> None:
        """Guesses for every answer that is past its prompt, each with the random number its position will have."""
        assert self.draft is not None
        active = [s for s in self.running if not s.prefilling and s.matcher is None and s.completion.token_ids]
        limit = min(self.context, self.draft.network.config.max_position_embeddings)
        active = [
            s
            for s in active
            if len(s.tokens) + self.guesses <= limit and self._reserve(s, len(s.tokens) + self.guesses)
        ]
        for sequence in active:
            sequence.guesses = []
            while len(sequence.tokens) - sequence.drafted > self.step_tokens:  # a long prompt, in pieces
                self._forward(self.draft, [(sequence, self.step_tokens)], only_last=True)
                sequence.drafted += self.step_tokens
        for _ in range(self.guesses):
            plan = [(s, len(s.tokens) + len(s.guesses) - s.drafted) for s in active]
            if not plan:
                return
            logits, _, outputs = self._forward(self.draft, plan, only_last=True)
            assert logits is not None
            for sequence, new in plan:
                sequence.drafted += new
                scores = adjusted(
                    logits[outputs[id(sequence)][0]],
                    sequence.sampling,
                    sequence.tokens[: sequence.prompt],
                    sequence.completion.token_ids,
                )
                at = len(sequence.tokens) + len(sequence.guesses)
                sequence.guesses.append(
                    draw(scores, sequence.sampling, uniform(sequence.seed, sequence.completion.index, at))
                )
        for sequence in active:  # what comes after the tokens that are known may be wrong
            sequence.drafted = min(sequence.drafted, len(sequence.tokens))

    # ---- whole answers ----

    def stream(self, prompt: Many[int], sampling: Sampling | None = None) -> Iterator[Event]:
        """Events of one request, until it is finished."""
        request = self.add(prompt, sampling)
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
        self, prompts: Many[Many[int]], sampling: Sampling | Many[Sampling] | None = None
    ) -> list[list[Completion]]:
        """All answers of each prompt."""
        many = (
            [sampling or Sampling()] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else sampling
        )
        numbers: list[int] = []
        try:
            for p, s in zip(prompts, many, strict=True):
                numbers.append(self.add(p, s))
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

    def loglikelihood(self, pairs: Many[tuple[Many[int], Many[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log-probability of the continuation in nats, and whether greedy
        decoding gives it. The context must have a token."""
        numbers = []
        for context, continuation in pairs:
            if not context or not continuation:
                raise UserError("loglikelihood needs at least one token of context and one of continuation")
            numbers.append(
                self.add([*context, *continuation], Sampling(max_tokens=0, prompt_logprobs=1), score_from=len(context))
            )
        out = []
        for (completion,), (context, _) in zip(self._run(numbers), pairs, strict=True):
            scores = [s for s in completion.prompt_logprobs[len(context) :] if s is not None]
            out.append((sum(s.logprob for s in scores), all(s.top[0][0] == s.token for s in scores)))
        return out

    def embed(self, texts: Many[Many[int]]) -> torch.Tensor:
        """(texts, hidden): the mean of the last hidden states over a text's tokens, scaled to length 1."""
        numbers = [self.add(t, Sampling(max_tokens=0), embed=True) for t in texts]
        return torch.tensor([c.embedding for (c,) in self._run(numbers)])


def _default_cache(bytes_a_token: int, context: int) -> int:
    """A quarter of the memory that is free, at most 4 GiB, and no more than 64 full contexts."""
    try:
        with open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = 8 << 30
    return min(free // 4, 4 << 30, bytes_a_token * (context + BLOCK) * 64)
