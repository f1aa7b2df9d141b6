"""The scheduler against a cache that remembers what was written into it. Neither needs torch."""

import subprocess
import sys
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from craton.engine.blocks import BlockPool
from craton.engine.generation import Generation, PictureSpan, Slice
from craton.engine.scheduler import Scheduler
from craton.model.paging import BLOCK, blocks_for


def identity(g: Generation, at: int) -> tuple:
    """Everything that keys and values at a position depend on."""
    seen = tuple((p.digest, p.start) for p in g.pictures if p.start <= at)
    return g.adapter, tuple(g.tokens[: at + 1]), seen


def next_token(g: Generation) -> int:
    return hash(identity(g, len(g.tokens) - 1)) % 7


@dataclass
class World:
    """Runs the plans of a scheduler. cache: (block, place in it) -> identity."""

    scheduler: Scheduler
    cache: dict[tuple[int, int], tuple]

    def step(self) -> list[Slice]:
        s = self.scheduler
        plan = s.schedule()
        assert sum(p.new for p in plan) <= s.step_tokens and len(s.running) <= s.max_running
        assert len({p.generation for p in plan}) == len(plan)
        for part in plan:
            g = part.generation
            assert g in s.running and part.new > 0 and len(g.blocks) >= blocks_for(part.past + part.new)
            for at in range(part.past, part.past + part.new):
                self.cache[g.blocks[at // BLOCK], at % BLOCK] = identity(g, at)
        for part in plan:  # after all have written: what one needs no other has written over
            g = part.generation
            for at in range(part.past + part.new):
                assert self.cache[g.blocks[at // BLOCK], at % BLOCK] == identity(g, at)
        for part in plan:
            g = part.generation
            s.computed(part)
            if g.computed == len(g.tokens):
                g.tokens.append(next_token(g))
                if g.answered == g.max_new:
                    s.remove(g)
        self.check()
        return plan

    def check(self) -> None:
        pool, held = self.scheduler.pool, [0] * self.scheduler.pool.total
        for g in (*self.scheduler.running, *self.scheduler.waiting):
            for block in g.blocks:
                held[block] += 1
        assert held == pool.holders
        assert pool.free == held.count(0)
        assert set(pool.known.values()) == set(pool.key) == set(pool.prefix_id)


def alone(g: Generation) -> list[int]:
    copy = Generation(g.tokens[: g.prompt], g.prompt, g.max_new, g.adapter, g.pictures)
    while copy.answered < copy.max_new:
        copy.tokens.append(next_token(copy))
    return copy.tokens


@st.composite
def generations(draw) -> Generation:
    """Prompts of few tokens, so that many begin alike; some with an adapter, some with pictures."""
    shared = draw(st.integers(0, 40))
    tokens = [1] * shared + draw(st.lists(st.integers(0, 1), min_size=1, max_size=24))
    adapter = draw(st.sampled_from([None, None, "a", "b"]))
    pictures = ()
    if draw(st.booleans()):
        start = draw(st.integers(0, len(tokens) - 1))
        span = PictureSpan(start, min(len(tokens), start + draw(st.integers(1, 20))), draw(st.sampled_from("xy")))
        pictures = (span,)
    return Generation(tokens, len(tokens), draw(st.integers(1, 24)), adapter, pictures)


@settings(deadline=None, max_examples=150)
@given(
    wanted=st.lists(generations(), min_size=1, max_size=12),
    blocks=st.integers(6, 30),
    room=st.integers(1, 64),
    running=st.integers(1, 8),
    share=st.booleans(),
    data=st.data(),
)
def test_answers_are_those_that_each_gets_alone(wanted, blocks, room, running, share, data):
    scheduler = Scheduler(blocks, step_tokens=room, max_running=running, share_prefixes=share)
    world, waiting, cancelled, steps = World(scheduler, {}), list(wanted), set(), 0
    while waiting or scheduler.busy:
        if waiting and (not scheduler.busy or data.draw(st.booleans())):
            scheduler.add(waiting.pop())
        if data.draw(st.integers(0, 30)) == 0 and scheduler.running:
            g = data.draw(st.sampled_from(scheduler.running))
            cancelled.add(id(g))
            scheduler.remove(g)
        if data.draw(st.integers(0, 60)) == 0:
            scheduler.restart()
            world.cache.clear()
        world.step()
        steps += 1
        assert steps < 5000
    assert scheduler.pool.free == blocks
    for g in wanted:
        assert id(g) in cancelled or g.tokens == alone(g)


@settings(deadline=None, max_examples=100)
@given(one=generations(), other=generations())
def test_blocks_are_shared_only_by_what_is_equal(one, other):
    scheduler = Scheduler(64, step_tokens=512)
    world = World(scheduler, {})
    one.max_new = other.max_new = 1
    scheduler.add(one)
    world.step()
    scheduler.add(other)
    world.step()
    same = 0
    while (same + 1) * BLOCK < other.prompt and (same + 1) * BLOCK <= one.prompt:
        at = (same + 1) * BLOCK - 1
        if identity(one, at) != identity(other, at) or one.pictures_in(same) != other.pictures_in(same):
            break
        same += 1
    assert other.cached == same * BLOCK


def test_adapters_and_pictures_keep_blocks_apart():
    prompt = [5] * 50
    kinds = [
        (None, ()),
        ("a", ()),
        ("b", ()),
        (None, (PictureSpan(3, 20, "cat"),)),
        (None, (PictureSpan(3, 20, "dog"),)),
    ]
    scheduler = Scheduler(64)
    world = World(scheduler, {})
    for round_ in range(2):
        for adapter, pictures in kinds:
            g = Generation(list(prompt), 50, 1, adapter, pictures)
            scheduler.add(g)
            world.step()
            assert g.cached == (48 if round_ else 0)


def test_the_last_to_come_gives_way():
    scheduler = Scheduler(4, step_tokens=64, share_prefixes=False)
    world = World(scheduler, {})
    first, second = (Generation([i] * 16, 16, 40) for i in (1, 2))
    scheduler.add(first)
    scheduler.add(second)
    while scheduler.busy:
        world.step()
        assert first.done or first in scheduler.running
    assert scheduler.counters.preemptions > 0 and first.tokens == alone(first) and second.tokens == alone(second)


def test_rather_no_guesses_than_a_preemption():
    scheduler = Scheduler(2, step_tokens=64, guess=lambda g: [0] * 8)
    g = Generation([1] * 20, 20, 12)
    scheduler.add(g)
    scheduler.schedule()
    scheduler.computed(Slice(g, 0, 20))
    g.tokens.append(3)
    g.tokens += [3] * 8
    (part,) = scheduler.schedule()
    assert part.new <= 12 and not scheduler.counters.preemptions


def test_a_pool_forgets_what_is_overwritten():
    pool = BlockPool(2)
    a = pool.allocate()
    first = pool.register(a, 0, (1,) * BLOCK)
    pool.release([a])
    assert pool.find([1] * 20, 16) == ([a], first)
    pool.release([a])
    assert {pool.allocate(), pool.allocate()} == {0, 1} and pool.allocate() is None
    assert pool.find([1] * 20, 16) == ([], 0)


def test_without_torch():
    """The whole of this file, in an interpreter that cannot import torch."""
    code = (
        "import sys; sys.modules['torch'] = None; import pytest; "
        f"sys.exit(pytest.main(['-q', '--noconftest', '-p', 'no:cacheprovider', {__file__!r}, '-k', 'not without']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
