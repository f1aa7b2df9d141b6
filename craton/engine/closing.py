"""The shortest way, nearly, from the middle of an answer to where its grammar lets it end.

A model that does not mean to stop can fill every string and array until its tokens run out; the engine then takes this
way instead. Two walks look for it. The first always takes what ends the most, which closes whatever consists of
brackets, strings and counted repetitions. Where that goes round for ever (`[0-9]+ apples`, an e-mail address before
its @), the second takes, wherever the grammar allows the same tokens as before, the next of them in turn (a rotor
walk: it leaves every loop that can be left), and the loops are cut out of what it walked. A way that neither finds is
unknown, and an unknown way is never taken.
"""

import json
import re
from collections import Counter
from typing import Any

import numpy as np
from llguidance import LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask  # its torch module imports a compiler
from numpy.typing import NDArray

_CLOSERS = '} ] ) > " , : null 9 5 1 0 false a'.split()  # 9: the digit that meets a lower bound first
_OPENERS = b"([{<\"'"
_LONGEST, _ROUNDS, _STEPS = 2048, 64, 1280  # tokens of a way; visits of one place; steps of the second walk
_SINGLES = 256  # of the shortest tokens, these many are tried
_AGAIN, _OTHERS = 3, 16  # a move that led elsewhere is taken so often before so many others have their turn
_CUTS = 200  # tries to cut a loop out

Move = tuple[int, ...]  # tokens taken together


class Closer:
    """The tokenizer's tokens as far as they close things; made once for an engine."""

    def __init__(self, tokenizer: LLTokenizer, raw: list[bytes], ends: tuple[int, ...]):
        """raw: the bytes of each token."""
        self.tokenizer, self.ends = tokenizer, ends
        self.order = self._single(_CLOSERS)
        self.in_string = self._single(("}", "q", "Z"))
        self.quote = tokenizer.tokenize_str('"')[0]
        by_length = sorted(range(len(raw)), key=lambda i: (any(c in _OPENERS for c in raw[i]), len(raw[i]) or 99, i))
        self.short = np.array(by_length)

    def _single(self, texts: Any) -> list[int]:
        return [t[0] for text in texts if len(t := self.tokenizer.tokenize_str(text)) == 1]

    def literals(self, grammar: str) -> list[Move]:
        """What the patterns of a schema, a regular expression or a grammar spell out; a place that allows any
        character does not tell that these lead on."""
        quoted = [json.loads(p) for p in re.findall(r'"pattern"\s*:\s*("(?:[^"\\]|\\.)*")', grammar)]
        patterns = quoted or re.findall(r"/((?:[^/\\\n]|\\.)+)/", grammar) or [grammar]
        texts = dict.fromkeys(text for p in patterns for text in _spelled_out(p))
        return [tuple(self.tokenizer.tokenize_str(text)) for text in list(texts)[:32]]

    def way_out(self, matcher: Any, literals: list[Move], most: int) -> list[int] | None:
        """At most `most` tokens that end the answer of an LLMatcher from where it is; None if none are found."""
        return self._straight(matcher.deep_copy(), most) or self._by_turns(matcher, literals, most)

    def _straight(self, matcher: Any, most: int) -> list[int] | None:
        bits, taken, visits = allocate_token_bitmask(1, self.tokenizer.vocab_size), list[int](), Counter[bytes]()
        while len(taken) <= min(most, _LONGEST):
            if matcher.is_stopped() or matcher.is_accepting():
                return taken
            fill_next_token_bitmask(matcher, bits)
            place = bits.tobytes()
            visits[place] += 1
            token = self._best(bits[0])
            if token is None or visits[place] > _ROUNDS or not matcher.consume_token(token):
                break
            taken.append(token)
        return None

    def _by_turns(self, start: Any, literals: list[Move], most: int) -> list[int] | None:
        bits, matcher = allocate_token_bitmask(1, self.tokenizer.vocab_size), start.deep_copy()
        moves, places, turns = list[Move](), list[bytes](), dict[bytes, list[Move]]()
        taken = Counter[tuple[bytes, Move]]()
        for _ in range(_STEPS):
            if matcher.is_stopped() or matcher.is_accepting():
                way = [t for move in _without_loops(start, moves, places) for t in move]
                return way if len(way) <= most else None
            fill_next_token_bitmask(matcher, bits)
            place = bits.tobytes()
            if places and place != places[-1]:
                _prefer(turns[places[-1]], taken[places[-1], moves[-1]])
            if place not in turns:
                turns[place] = self._moves(bits[0], literals)
            queue = turns[place]
            move = next((m for m in queue if matcher.validate_tokens(list(m)) == len(m)), None)
            if move is None or not matcher.consume_tokens(list(move)):
                break
            queue.remove(move)
            queue.append(move)
            taken[place, move] += 1
            moves.append(move)
            places.append(place)
        return None

    def _best(self, allowed: NDArray) -> int | None:
        """The allowed token that ends the most."""
        found = next((t for t in self._closers(allowed) if _allows(allowed, t)), None)
        return found if found is not None else next(iter(self._short(allowed)), None)

    def _closers(self, allowed: NDArray) -> list[int]:
        in_string = all(_allows(allowed, t) for t in self.in_string)  # a bracket is a letter here
        return [*self.ends, *([self.quote] if in_string else []), *self.order]

    def _short(self, allowed: NDArray) -> list[int]:
        """The shortest allowed tokens."""
        found = (allowed[self.short >> 5] >> (self.short & 31)) & 1
        return [int(t) for t in self.short[found.nonzero()[0][:_SINGLES]]]

    def _moves(self, allowed: NDArray, literals: list[Move]) -> list[Move]:
        found = [t for t in self._closers(allowed) if _allows(allowed, t)]
        single = [(t,) for t in dict.fromkeys(found + self._short(allowed))]
        return [*single[:1], *literals, *single[1:]]


def _prefer(queue: list[Move], times: int) -> None:
    """The last move led elsewhere: it has the next turn too, and now and then a few others before it."""
    queue.insert(0 if times % _AGAIN else _OTHERS, queue.pop())


def _without_loops(start: Any, moves: list[Move], places: list[bytes]) -> list[Move]:
    """The walk without what it did between two visits of one place, as long as it still ends."""
    at = cuts = 0
    while at < len(moves):
        again = [i for i in range(len(moves) - 1, at, -1) if places[i] == places[at]]
        for back in again[: _CUTS - cuts]:
            cuts += 1
            if _ends(start, moves[:at] + moves[back:]):
                moves, places = moves[:at] + moves[back:], places[:at] + places[back:]
                break
        at += 1
    return moves


def _ends(start: Any, moves: list[Move]) -> bool:
    trial = start.deep_copy()
    tokens = [t for move in moves for t in move]
    if trial.validate_tokens(tokens) < len(tokens):
        return False
    return bool(trial.consume_tokens(tokens) and (trial.is_stopped() or trial.is_accepting()))


def _spelled_out(pattern: str) -> list[str]:
    """The literal runs of a regular expression."""
    plain = re.sub(r"\[(?:[^\]\\]|\\.)*\]|\{[0-9,]*\}|\(\?[a-zA-Z:]*", "\0", pattern)  # not within classes and counts
    runs = re.findall(r"(?:\\[^\w\s]|[^\\\[\](){}|.*+?^$\0])+", plain)
    return [re.sub(r"\\(.)", r"\1", run) for run in runs]


def _allows(words: NDArray, token: int) -> bool:
    """Whether a bit is set in a mask of int32 words."""
    return bool(words[token >> 5] >> (token & 31) & 1)
