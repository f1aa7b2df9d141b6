"""The engine: the same answer whatever else runs, no block lost, penalties and filters as others define them."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from craton.base import UserError
from craton.engine.engine import Engine
from craton.engine.request import Sampling
from craton.engine.sampler import adjusted, draw_each, uniform
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.weights.folder import load_network
from craton.weights.quantize import pack_network
from tests.weights.families import make

CONFIG = ModelConfig(512, 64, 96, 2, 4, 2, 16, max_position_embeddings=512, model_type="llama", qk_norm="")


def network(config=CONFIG, seed=0, bits=None):
    torch.manual_seed(seed)
    made = Decoder(config)
    for p in made.parameters():
        p.data.copy_(torch.randn_like(p) * 0.3 if p.ndim > 1 else 1 + torch.randn_like(p) * 0.1)
    made.requires_grad_(False)
    return pack_network(made, bits) if bits else made


def leaked(engine):
    """Blocks that nobody gave back, and accounting that does not add up."""
    return (
        engine.scheduler.pool.total - engine.scheduler.pool.free,
        sum(engine.scheduler.pool.holders),
        engine.scheduler.running,
        list(engine.scheduler.waiting),
        engine.requests,
    )


CLEAN = (0, 0, [], [], {})


@pytest.mark.parametrize(
    ("bits", "options"), [(None, {}), (4, {}), (None, {"speculate": "lookup"}), (8, {"draft": True})]
)
def test_thousand_requests(bits, options):
    """Lengths, arrivals, neighbours, cancellations, a small cache: each greedy answer is its answer alone."""
    r = random.Random(1)
    net = network(bits=bits)
    if options.get("draft"):
        draft = network(bits=4)  # nearly the same model: some guesses come true
        options = {"draft": draft}
    engine = Engine(
        net, cache_bytes=24 * 16 * 2 * 2 * 2 * 16 * 4 * (2 if "draft" in options else 1), step_tokens=64, **options
    )
    stems = [[r.randrange(512) for _ in range(40)] for _ in range(4)]
    asked, answers, cancelled = {}, {}, set()
    count = 300 if options or bits else 1000
    while len(asked) < count or engine.busy:
        if len(asked) < count and r.random() < 0.6:
            for _ in range(r.randrange(1, 6)):
                prompt = r.choice(stems)[: r.randrange(1, 41)] * r.choice((1, 1, 2)) + [
                    r.randrange(512) for _ in range(r.randrange(0, 12))
                ]
                s = Sampling(r.choice((r.randrange(1, 24), r.randrange(40, 120))), 0.0)
                asked[engine.add(prompt, s)] = prompt, s
        if r.random() < 0.1 and engine.requests:
            victim = r.choice(list(engine.requests))
            engine.cancel(victim)
            cancelled.add(victim)
        for event in engine.step():
            if event.finished:
                answers[event.completion.request] = event.completion
    assert leaked(engine) == CLEAN
    assert engine.counters.cached_prompt_tokens > 1000 and engine.counters.preemptions > 5
    if options:
        assert engine.counters.accepted_tokens > 10
    alone = Engine(net, share_prefixes=False)
    done = 0
    for number, (prompt, s) in list(asked.items())[: 1000 if not options and not bits else 150]:
        if answers[number].finish_reason != "cancelled":
            assert answers[number].token_ids == alone.generate([prompt], s)[0][0].token_ids
            done += 1
    assert done > 100 and {n for n, a in answers.items() if a.finish_reason == "cancelled"} <= cancelled
    assert set(answers) == set(asked)


def test_live_requests_share_prefixes():
    engine = Engine(network())
    prompt = list(range(100, 200))
    first = engine.add(prompt, Sampling(50, 0.0))
    engine.step()
    engine.step()
    used = engine.scheduler.pool.total - engine.scheduler.pool.free
    second = engine.add(prompt + [7], Sampling(50, 0.0))
    engine.step()
    assert engine.counters.cached_prompt_tokens == 96 and first in engine.requests and second in engine.requests
    assert engine.scheduler.pool.total - engine.scheduler.pool.free <= used + 2


def test_several_answers_to_one_prompt():
    engine = Engine(network())
    prompt = list(range(100, 164))
    answers = engine.generate([prompt], Sampling(20, 1.0, seed=3, n=5))[0]
    assert [a.index for a in answers] == list(range(5)) and len({tuple(a.token_ids) for a in answers}) == 5
    assert engine.counters.cached_prompt_tokens == 4 * 48
    again = Engine(network(), step_tokens=16).generate([prompt], Sampling(20, 1.0, seed=3, n=5))[0]
    assert [a.token_ids for a in again] == [a.token_ids for a in answers]
    assert engine.generate([prompt], Sampling(20, 1.0, seed=4))[0][0].token_ids != answers[0].token_ids


@pytest.mark.parametrize("guesser", ["lookup", "draft"])
def test_speculation_keeps_the_distribution(guesser):
    """Sampled answers are the very same with guessing, and their tokens follow the model's own probabilities."""
    config = ModelConfig(16, 64, 96, 1, 4, 2, 16, model_type="llama", qk_norm="")
    net = network(config)
    net.lm_head.weight.data *= 0.05
    options = {"speculate": "lookup"} if guesser == "lookup" else {"draft": network(config, bits=8)}
    if guesser == "draft":
        options["draft"] = network(config)
        options["draft"].lm_head.weight.data *= 0.04
    prompt = [1, 2, 3, 1, 2, 3, 1, 2]
    counts, second = torch.zeros(16), torch.zeros(16, 16)
    engine, plain = Engine(net, **options), Engine(net)
    samplings = [Sampling(6, 1.0, seed=i, ignore_eos=True) for i in range(1500)]
    guessed, alone = engine.generate([prompt] * 1500, samplings), plain.generate([prompt] * 1500, samplings)
    assert [a[0].token_ids for a in guessed] == [a[0].token_ids for a in alone]
    assert 50 < engine.counters.accepted_tokens < engine.counters.drafted_tokens
    for (answer,) in guessed:
        counts[answer.token_ids[0]] += 1
        second[answer.token_ids[0], answer.token_ids[1]] += 1
    with torch.inference_mode():
        p = net(torch.tensor([prompt]))[0, -1].softmax(-1)
        q = torch.stack([net(torch.tensor([[*prompt, t]]))[0, -1].softmax(-1) for t in range(16)])
    joint = p[:, None] * q * 1500
    big = joint > 5
    for observed, expected in ((counts, p * 1500), (second[big], joint[big])):
        freedom = observed.numel() - 1
        assert ((observed - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5  # about 4 sigma


def test_filters_against_transformers():
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(0)
    for trial in range(60):
        logits = torch.randn(2000) * (1 + trial % 5)
        s = Sampling(
            temperature=[0.3, 1.0, 1.7][trial % 3],
            top_k=[0, 5, 1500][trial % 3],
            top_p=[1.0, 0.9, 0.5, 0.999][trial % 4],
            min_p=[0.0, 0.02][trial % 2],
            repetition_penalty=[1.0, 1.3][trial % 2],
        )
        prompt, answer = [3, 5], [8, 8, 2]
        theirs = LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(s.repetition_penalty), TemperatureLogitsWarper(s.temperature)]
        )
        if s.top_k:
            theirs.append(TopKLogitsWarper(s.top_k))
        theirs.append(TopPLogitsWarper(s.top_p))
        if s.min_p:
            theirs.append(MinPLogitsWarper(s.min_p))
        p = theirs(torch.tensor([prompt + answer]), logits[None].double())[0].softmax(-1)
        ours = adjusted(logits, s, prompt, answer)
        us = [uniform(trial, 0, i) for i in range(300)]
        expected = torch.searchsorted(p.cumsum(0), torch.tensor(us, dtype=torch.double), right=True)
        assert draw_each(ours.expand(len(us), -1).contiguous(), [s] * len(us), us) == expected.tolist()


def test_penalties_and_bias():
    logits = torch.zeros(10)
    s = Sampling(frequency_penalty=0.5, presence_penalty=1.0, logit_bias={4: 100.0})
    out = adjusted(logits, s, [1, 1], [2, 2, 3])
    assert out.tolist() == [0, 0, -2.0, -1.5, 100.0, 0, 0, 0, 0, 0] and (logits == 0).all()
    engine = Engine(network())
    assert set(engine.generate([[5, 6]], Sampling(8, 0.0, logit_bias={77: 1000.0}))[0][0].token_ids) == {77}
    free = engine.generate([[5, 6]], Sampling(64, 0.0))[0][0].token_ids
    held = engine.generate([[5, 6]], Sampling(64, 0.0, presence_penalty=100.0))[0][0].token_ids
    assert len(set(held)) == 64 > len(set(free))


@given(st.integers(0, 2**64 - 1), st.integers(0, 127), st.integers(0, 10**6))
def test_uniform(seed, index, position):
    assert 0 <= uniform(seed, index, position) < 1


def test_uniform_is_uniform():
    values = torch.tensor(
        [uniform(s, i, p) for s in range(20) for i in range(20) for p in range(100)], dtype=torch.double
    )
    counts = torch.histc(values, 100, 0, 1)
    assert ((counts - 400) ** 2 / 400).sum() < 99 + 4 * 198**0.5
    assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 0.02


@pytest.mark.parametrize("family", ["llama3.2", "qwen3_moe", "deepseek_v3", "gemma3", "gpt_oss"])
def test_logprobs_equal_the_training_forward(family, tmp_path):
    make(family, tmp_path)
    net = load_network(tmp_path)
    engine = Engine(net, step_tokens=16)
    r = random.Random(0)
    prompts = [[r.randrange(3, 128) for _ in range(n)] for n in (5, 33, 60)]
    for prompt, (answer,) in zip(
        prompts,
        engine.generate(prompts, Sampling(12, 0.8, seed=1, logprobs=4, prompt_logprobs=2, ignore_eos=True)),
        strict=True,
    ):
        ids = torch.tensor([prompt + answer.token_ids])
        with torch.no_grad():
            logp = net(ids).log_softmax(-1)[0]
        for i, score in enumerate(answer.logprobs):
            row = logp[len(prompt) + i - 1]
            assert (
                score.logprob == pytest.approx(float(row[score.token]), abs=1e-4) and score.token == answer.token_ids[i]
            )
            assert [v for _, v in score.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == len(prompt)
        for i, score in enumerate(answer.prompt_logprobs[1:], 1):
            assert score.token == prompt[i] and score.logprob == pytest.approx(float(logp[i - 1, prompt[i]]), abs=1e-4)


def test_loglikelihood_and_embeddings():
    net = network()
    engine = Engine(net, step_tokens=16)
    r = random.Random(0)
    context = [r.randrange(512) for _ in range(50)]
    pairs = [(context, [r.randrange(512) for _ in range(n)]) for n in (1, 7, 30)]
    with torch.no_grad():
        greedy = [int(net(torch.tensor([context]))[0, -1].argmax())]
        pairs.append((context, greedy))
        for (c, t), (score, is_greedy) in zip(pairs, engine.loglikelihood(pairs), strict=True):
            logp = net(torch.tensor([c + t])).log_softmax(-1)[0, len(c) - 1 : -1]
            assert score == pytest.approx(float(logp.gather(-1, torch.tensor(t)[:, None]).sum()), abs=1e-3)
            assert is_greedy == (t == greedy)
        texts = [context, context[:3], pairs[2][1]]
        vectors = engine.embed(texts)
        for text, vector in zip(texts, vectors, strict=True):
            mean = net.model(torch.tensor([text]))[0].mean(0)
            torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=0)
    assert leaked(engine) == CLEAN and engine.counters.cached_prompt_tokens > 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ([512], {}, "outside the model's vocabulary"),
        ([-1], {}, "token id -1"),
        ([1] * 512, {}, "context is 512"),
        ([1], {"logit_bias": {600: 1.0}}, "logit_bias"),
        ([1], {"stop": ("x",)}, "need a tokenizer"),
    ],
)
def test_requests_that_are_refused(prompt, options, message):
    engine = Engine(network())
    with pytest.raises(UserError, match=message):
        engine.add(prompt, Sampling(**options))
    assert leaked(engine) == CLEAN


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"n": 0},
        {"min_p": 2},
        {"logprobs": -1},
        {"max_tokens": -1},
        {"repetition_penalty": 0},
        {"stop": ("",)},
        {"regex": "a", "choice": ("b",)},
        {"temperature": float("nan")},
    ],
)
def test_sampling_that_is_refused(options):
    with pytest.raises(UserError):
        Sampling(**options)


def test_ends(model_folder):
    import craton

    model = craton.load(str(model_folder))
    whole = model.complete("def ", Sampling(60, 0.0, ignore_eos=True))
    assert whole.finish_reason == "length" and len(whole.token_ids) == 60
    at = whole.text[10:20]
    cut = model.complete("def ", Sampling(60, 0.0, ignore_eos=True, stop=("never there", at)))
    assert cut.text == whole.text[: whole.text.index(at)] and cut.finish_reason == "stop" and cut.stop_reason == at
    pieces = [
        e.text
        for e in model.engine.stream(model.tokenizer.encode("def "), Sampling(60, 0.0, ignore_eos=True, stop=(at,)))
    ]
    assert "".join(pieces) == cut.text
    token = whole.token_ids[7]
    stopped = model.complete("def ", Sampling(60, 0.0, ignore_eos=True, stop_token_ids=(token,)))
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(token)] and stopped.stop_reason == token
    kept = model.complete("def ", Sampling(60, 0.0, ignore_eos=True, stop_token_ids=(token,), min_tokens=30))
    assert len(kept.token_ids) >= 30
    assert whole.text == model.tokenizer.decode(whole.token_ids)


def spoken(tmp_path):
    """A tokenizer with SentencePiece's spaces and byte tokens, and a random model of its size."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    from craton.text.tokenizer import Tokenizer

    words = [f"<0x{b:02X}>" for b in range(256)] + ["\u2581", "\u2581world", "\u2581hello", "a", "b", "!"]
    backend = Backend(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    config = ModelConfig(len(words), 64, 96, 1, 4, 2, 16, model_type="llama", qk_norm="")
    return Engine(network(config), Tokenizer(backend, {}))


def test_first_space_and_odd_bytes(tmp_path):
    engine = spoken(tmp_path)
    text = engine.generate([[258]], Sampling(1, 0.0, logit_bias={257: 1e4}))[0][0].text
    assert text == " world"
    r = random.Random(0)
    for i in range(150):  # random bytes, which the library's stream does not always take
        answers = engine.generate([[258], [259]], [Sampling(12, 1.0, seed=i), Sampling(3, 0.0, logit_bias={260: 1e4})])
        assert answers[1][0].text == "bbb" and len(answers[0][0].token_ids) == 12
        events = list(engine.stream([r.randrange(262)], Sampling(12, 1.0, seed=i)))
        assert "".join(e.text for e in events) == events[-1].completion.text
    assert leaked(engine) == CLEAN


def test_streams_beside_each_other():
    engine, alone = Engine(network()), Engine(network())
    s = Sampling(12, 0.0, ignore_eos=True)
    want = [alone.generate([[5, i]], s)[0][0].token_ids for i in range(3)]
    streams = [engine.stream([5, i], s) for i in range(3)]
    got = [[], [], []]
    got[0] += next(streams[0]).token_ids
    assert engine.generate([[9, 9]], s)[0][0].token_ids == alone.generate([[9, 9]], s)[0][0].token_ids
    for i in (1, 0, 2):
        for event in streams[i]:
            got[i] += event.token_ids
    assert got == want and leaked(engine) == CLEAN and not engine.inbox
    left = engine.stream([5, 5], s)
    next(left)
    left.close()
    with pytest.raises(UserError):
        engine.generate([[5], []], s)
    engine.step()
    assert leaked(engine) == CLEAN


def test_stop_texts_with_guesses(model_folder):
    import craton

    model = craton.load(str(model_folder))
    guessing = Engine(model.network, model.tokenizer, draft=model.network)
    prompt = model.tokenizer.encode("def ")
    whole = model.complete("def ", Sampling(60, 0.0, ignore_eos=True)).text
    s = Sampling(60, 0.0, ignore_eos=True, stop=(whole[9:13],), logprobs=0)
    with_guesses, without = guessing.generate([prompt], s)[0][0], model.complete("def ", s)
    assert (
        with_guesses.token_ids == without.token_ids
        and with_guesses.text == without.text
        and len(with_guesses.logprobs) == len(without.logprobs)
    )
    assert guessing.counters.accepted_tokens > 0
    late = model.complete("def ", Sampling(60, 0.0, ignore_eos=True, stop=(whole[9:13],), min_tokens=40))
    assert len(late.token_ids) >= 40
    with pytest.raises(UserError, match="stop_token_ids"):
        model.engine.add(prompt, Sampling(5, stop_token_ids=(10**6,)))


def test_scores_beside_guesses_and_embeddings(monkeypatch):
    """Scored prompts in small pieces, guesses and embeddings in one engine: each as alone."""
    from craton.engine import engine as module

    monkeypatch.setattr(module, "_LOGIT_BYTES", 4 * 512 * 7)
    net, r = network(), random.Random(3)
    texts = [[r.randrange(512) for _ in range(90)] for _ in range(4)]
    repeats = [([1, 2, 3] * 9)[: 20 + i] for i in range(6)]
    busy, alone = Engine(net, speculate="lookup", step_tokens=24), Engine(net)
    want = (
        alone.embed(texts),
        [alone.generate([t], Sampling(0, prompt_logprobs=0))[0][0].prompt_logprobs for t in texts],
    )
    embeds = [busy.add(t, Sampling(0), embed=True) for t in texts]
    scored = [busy.add(t, Sampling(0, prompt_logprobs=0)) for t in texts]
    for t in repeats:
        busy.add(t, Sampling(30, 0.0))
    done = {}
    while busy.busy:
        done |= {e.completion.request: e.completion for e in busy.step() if e.finished}
    torch.testing.assert_close(torch.tensor([done[n].embedding for n in embeds]), want[0])
    assert [done[n].prompt_logprobs for n in scored] == want[1]
