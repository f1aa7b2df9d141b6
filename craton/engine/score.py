"""Log-likelihoods of many continuations at once. What requests begin with together is computed once: they become a
tree of token runs (a radix tree, as SGLang's, arXiv 2312.07104), which is walked depth first in batches without
padding. The choices of an item share its context, and items share their shots, to the token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from craton.model import plain
from craton.model.attention import AttentionSpec
from craton.model.decoder import Decoder
from craton.text.tokenizer import Tokenizer

_BATCH_TOKENS = 4096
_FAMILY_TOKENS = 256  # more would be masked than is saved
_TOGETHER = 16  # families in one call
_LOGIT_BYTES = 64 << 20  # logits that exist at once
_KEPT_BYTES = 1 << 30  # keys and values of one batch, about

Pair = tuple[Sequence[int], Sequence[int]]  # context, continuation


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: its log-probability in nats, whether each token was the likeliest, and how many there are."""

    total: float
    greedy: bool
    tokens: int


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, as lm-eval divides them: spaces that end the context go to the
    continuation, and the token that begins documents stands for an empty context."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return [tokenizer.document_id], tokenizer.encode_rendered(continuation)
    before = tokenizer.encode(context)
    return before, tokenizer.encode(context + continuation)[len(before) :]


@dataclass(eq=False)
class Run:
    """Tokens from `start` on of every sequence that comes this way."""

    start: int
    tokens: list[int]
    parent: "Run | None"
    children: list["Run"] = field(default_factory=list)
    # Position in the sequence -> requests that want the next token's probability there, with that token.
    wanted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # keys and values, a pair a layer

    def path(self) -> list["Run"]:
        """From the root to this one."""
        out, run = list["Run"](), self
        while run is not None:
            out.append(run)
            run = run.parent  # type: ignore[assignment]
        return out[::-1]


def build_tree(sequences: list[list[int]]) -> tuple[list[Run], dict[tuple[int, ...], Run]]:
    """Runs that no other comes before, and for each sequence the run it ends in."""
    roots: list[Run] = []
    ends: dict[tuple[int, ...], Run] = {}
    path: list[Run] = []
    before: list[int] = []
    for sequence in sorted(sequences):
        same = _shared(before, sequence)
        while path and path[-1].start >= same:
            path.pop()
        if path and path[-1].start + len(path[-1].tokens) > same:
            path.append(_cut(path.pop(), same, roots, path[-1] if path else None))
        if same < len(sequence):
            parent = path[-1] if path else None
            run = Run(same, sequence[same:], parent)
            (roots if parent is None else parent.children).append(run)
            path.append(run)
        ends[tuple(sequence)] = path[-1]
        before = sequence
    return roots, ends


def _shared(a: list[int], b: list[int]) -> int:
    """Tokens that two sequences begin with together."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)


def _cut(run: Run, at: int, roots: list[Run], parent: Run | None) -> Run:
    """Divide a run before position `at`; returns the upper part, which takes its place."""
    upper = Run(run.start, run.tokens[: at - run.start], parent, [run])
    siblings = roots if parent is None else parent.children
    siblings[siblings.index(run)] = upper
    run.start, run.tokens, run.parent = at, run.tokens[at - run.start :], upper
    return upper


class _Batch:
    """The past that a network sees: runs one after the other, each behind its own ancestors. Runs behind the same
    ancestors that nothing follows are attended to at once (a family), and families of about one size in one call."""

    def __init__(self, runs: list[Run], device: torch.device):
        self.runs = runs
        self.earlier = [r for r in dict.fromkeys(a for run in runs for a in run.path()) if r.kept]
        place: dict[Run, int] = {}  # of a run's first token among those of earlier batches and of this one
        at = 0
        for run in (*self.earlier, *runs):
            place[run] = at
            at += len(run.tokens)
        self.begin = sum(len(run.tokens) for run in self.earlier)
        places = [p for run in runs for p in range(run.start, run.start + len(run.tokens))]
        self.positions = torch.tensor(places, device=device)
        self.ids = torch.tensor([[t for run in runs for t in run.tokens]], device=device)
        families: list[list[Run]] = []
        for run in runs:
            if families and _alike(families[-1], run):
                families[-1].append(run)
            else:
                families.append([run])
        families.sort(key=_length)
        self.groups: list[_Group] = []
        while families:
            most = max(64, _length(families[0]) * 5 // 4)
            near = [f for f in families[:_TOGETHER] if _length(f) <= most]
            families = families[len(near) :]
            self.groups.append(_Group(near, place, self.begin, device))
        order = torch.cat([group.to for group in self.groups])
        self.back = torch.empty_like(order)
        self.back[order] = torch.arange(len(order), device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
        """As `craton.model.cache.Past` says."""
        at = 0
        for run in self.runs:
            if run.children:
                run.kept.append((k[0, at : at + len(run.tokens)], v[0, at : at + len(run.tokens)]))
            at += len(run.tokens)
        keys = torch.cat([*(run.kept[layer][0] for run in self.earlier), k[0]])
        values = torch.cat([*(run.kept[layer][1] for run in self.earlier), v[0]])
        out = []
        for group in self.groups:
            mask = group.mask(spec.window)
            own = q[0][group.queries]
            o = plain.masked_attention(own, keys[group.keys], values[group.keys], mask, spec.scale, spec.softcap, sinks)
            out.append(o.flatten(0, 1)[group.real])
        return torch.cat(out)[self.back][None]


class _Group:
    """Families side by side, padded to the largest: queries (families, new tokens) and keys (families, tokens) say
    which tokens of a batch they are."""

    def __init__(self, families: list[list[Run]], place: dict[Run, int], begin: int, device: torch.device):
        rows = []
        for family in families:
            before = [t for run in family[0].path()[:-1] for t in range(place[run], place[run] + len(run.tokens))]
            own = [t for run in family for t in range(place[run], place[run] + len(run.tokens))]
            at = [run.start + i for run in family for i in range(len(run.tokens))]
            which = [i for i, run in enumerate(family) for _ in run.tokens]
            rows.append((before, own, at, which))
        new, most = max(len(r[1]) for r in rows), max(len(r[0]) + len(r[1]) for r in rows)
        self.queries = torch.zeros(len(rows), new, dtype=torch.long)
        self.keys = torch.zeros(len(rows), most, dtype=torch.long)
        self.position = torch.full((len(rows), new), -1)  # of the queries; -1 where there is none
        self.key_position = torch.full((len(rows), most), 1 << 40)
        self.seen = torch.zeros(len(rows), new, most, dtype=torch.bool)
        for i, (before, own, at, which) in enumerate(rows):
            p, n = len(before), len(own)
            self.queries[i, :n] = torch.tensor(own) - begin
            self.keys[i, : p + n] = torch.tensor([*before, *own])
            self.position[i, :n] = torch.tensor(at)
            self.key_position[i, : p + n] = torch.tensor([*range(p), *at])
            of = torch.tensor(which)
            self.seen[i, :n, :p] = True
            self.seen[i, :n, p : p + n] = (of[None] == of[:, None]) & (
                torch.tensor(at)[None] <= torch.tensor(at)[:, None]
            )
        self.seen[:, :, 0] |= self.position < 0  # padding sees something, or it would be no number
        self.real = (self.position.flatten() >= 0).nonzero()[:, 0].to(device)
        self.to = self.queries.flatten().to(device)[self.real]
        self.queries, self.keys, self.device = self.queries.to(device), self.keys.to(device), device
        self.masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """(families, 1, new tokens, tokens): which keys each query sees."""
        if window not in self.masks:
            seen = self.seen
            if window is not None:
                near = self.key_position[:, None, :] > self.position[:, :, None] - window
                seen = seen & (near | (self.position < 0)[:, :, None])
            self.masks[window] = seen[:, None].to(self.device)
        return self.masks[window]


def _length(family: list[Run]) -> int:
    """Tokens that a family looks at."""
    return family[0].start + sum(len(run.tokens) for run in family)


def _alike(family: list[Run], run: Run) -> bool:
    """Whether a run can be attended to with a family: nothing comes after either, and the same before both."""
    first = family[0]
    alone = first.children or run.children or first.parent is not run.parent or first.start != run.start
    return not alone and sum(len(r.tokens) for r in family) + len(run.tokens) <= _FAMILY_TOKENS


def _depth_first(roots: list[Run]) -> Iterator[Run]:
    waiting = roots[::-1]
    while waiting:
        run = waiting.pop()
        yield run
        waiting += run.children[::-1]


def _batches(roots: list[Run], most: int) -> Iterator[list[Run]]:
    """Runs in order, together not much more than `most` tokens; a longer one is cut first."""
    batch, room = list[Run](), most
    for run in _depth_first(roots):
        while len(run.tokens) > most:
            upper = _cut(run, run.start + most, roots, run.parent)
            upper.wanted = {p: w for p, w in run.wanted.items() if p < run.start}
            run.wanted = {p: w for p, w in run.wanted.items() if p >= run.start}
            if batch:
                yield batch
            yield [upper]
            batch, room = [], most
        if batch and len(run.tokens) > room:
            yield batch
            batch, room = [], most
        batch.append(run)
        room -= len(run.tokens)
    if batch:
        yield batch


@torch.inference_mode()
def loglikelihoods(
    network: Decoder, pairs: Sequence[Pair], progress: Callable[[int, int], None] = lambda done, of: None
) -> Iterator[tuple[int, Likelihood]]:
    """For each (context, continuation), both with a token at least: its number and its likelihood, as they become
    known, in another order. network: in fp32 on a CPU. progress: called with tokens computed, and in all."""
    sequences = [[*context, *continuation[:-1]] for context, continuation in pairs]
    roots, ends = build_tree(sequences)
    left = [len(continuation) for _, continuation in pairs]
    for number, (context, continuation) in enumerate(pairs):
        run: Run | None = ends[tuple(sequences[number])]
        for position in range(len(sequences[number]) - 1, len(context) - 2, -1):
            while run is not None and run.start > position:
                run = run.parent
            assert run is not None
            run.wanted.setdefault(position, []).append((number, continuation[position - len(context) + 1]))
    total, greedy = [0.0] * len(pairs), [True] * len(pairs)
    tokens, done = sum(len(run.tokens) for run in _depth_first(roots)), 0
    heads, key, value = network.config.cache_dims
    most = max(64, min(_BATCH_TOKENS, _KEPT_BYTES // (4 * network.config.num_hidden_layers * heads * (key + value))))
    live: list[Run] = []
    for batch in _batches(roots, most):
        live = [run for run in live if run in batch[0].path()]
        live += batch
        for number, logprob, likeliest in _compute(network, batch):
            total[number] += logprob
            greedy[number] &= likeliest
            left[number] -= 1
            if not left[number]:
                yield number, Likelihood(total[number], greedy[number], len(pairs[number][1]))
        for run in live:
            if run not in batch[-1].path():
                run.kept.clear()
        done += sum(len(run.tokens) for run in batch)
        progress(done, tokens)


def _compute(network: Decoder, batch: list[Run]) -> Iterator[tuple[int, float, bool]]:
    """(request, log-probability of a token it asks for, whether that is the likeliest), for all in the batch."""
    made = _Batch(batch, network.model.norm.weight.device)
    hidden = network.model(made.ids, past=made)[0]
    rows: list[int] = []
    asked: list[tuple[int, int, int]] = []  # row of `rows`, request, token
    begin = 0
    for run in batch:
        for position, requests in run.wanted.items():
            asked += [(len(rows), request, token) for request, token in requests]
            rows.append(begin + position - run.start)
        begin += len(run.tokens)
    if not rows:
        return
    piece = max(1, _LOGIT_BYTES // (4 * network.config.vocab_size))
    at = 0
    for first in range(0, len(rows), piece):
        logits = network.head(hidden[rows[first : first + piece]]).float()
        here = [a for a in asked[at:] if a[0] < first + piece]
        at += len(here)
        which = torch.tensor([[row - first, token] for row, _, token in here], device=logits.device)
        chosen, (most, best) = logits[which[:, 0], which[:, 1]], logits.max(-1)
        normaliser = most + logits.sub_(most[:, None]).exp_().sum(-1).log()  # in place: a large tensor takes time
        values, likeliest = (chosen - normaliser[which[:, 0]]).tolist(), best.tolist()
        for (row, request, token), value in zip(here, values, strict=True):
            yield request, value, likeliest[row - first] == token
