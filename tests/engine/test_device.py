"""The engine's way on a GPU: kernels, steps that follow each other on the device, padded graphs. Where there is no GPU
the kernels are interpreted, and a graph is the function that it was made of."""

import copy
import itertools

import pytest
import torch

from craton.engine.engine import Engine
from craton.engine.request import Sampling
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder, Linear
from craton.model.grouped import GroupedMatrix
from craton.model.initialise import initialise
from craton.model.lora import LoraSpec, adapted, put_adapters
from craton.model.packed import PackedEmbedding, PackedLinear, replace
from tests.model.blocks import random_blocks

pytest.importorskip("triton")
from craton.model.cache import PagedCache
from craton.model.gpu.step import CudaGraphs, DeviceStep, fits

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LLAMA = dict(eos_token_id=0, max_position_embeddings=128)
FAMILIES = {
    "llama": ModelConfig(112, 32, 32, 2, 2, 1, 16, **LLAMA),
    "qwen": ModelConfig(112, 32, 32, 2, 2, 1, 16, attention_bias=True, qk_norm="head", **LLAMA),
    "gemma": ModelConfig(
        112, 32, 32, 2, 2, 1, 16, norm_placement="both", qk_norm="head", norm_unit_offset=True, embedding_scale=8.0,
        hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, **LLAMA
    ),
}  # fmt: skip


def network(family):
    made = Decoder(FAMILIES[family])
    initialise(made, 0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return made.requires_grad_(False)


def device_engine(n, **more):
    """An engine as on a GPU."""
    engine = Engine(n.to(DEVICE), cache_bytes=1 << 20, **more)
    if not CUDA:
        runner = engine.runner
        runner.cache = PagedCache(n.config, runner.cache.blocks + 1)
        trash = runner.cache.blocks - 1
        captured = []

        def capture(body):
            captured.append(body)
            return body

        runner.device_step = DeviceStep(n, runner.cache, engine.context, trash, torch.float32, capture)
        engine.captured = captured
        engine.weights_changed()
    return engine


PROMPTS = [[(5 * i + 3 * j) % 100 + 3 for j in range(3 + 9 * i)] for i in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_answers_as_on_a_cpu(family):
    """Greedy and sampled, beside each other, with ends at several lengths; and the same log-probabilities."""
    n = network(family)
    assert fits(n)
    sampling = [Sampling(4 + 5 * i, (0.0, 1.0, 0.7)[i], seed=i, logprobs=0, min_p=0.1 * (i == 2)) for i in range(3)]
    wanted = Engine(n, cache_bytes=1 << 20).generate(PROMPTS, sampling)
    found = device_engine(n).generate(PROMPTS, sampling)
    for (a,), (b,) in zip(wanted, found, strict=True):
        assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason
        one, other = (torch.tensor([x.logprob for x in c.logprobs]) for c in (a, b))
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_filters_are_the_devices_own():
    """Beside greedy answers; and what goes through the host beside others that do not."""
    n = network("llama")
    filtered = [Sampling(9, 1.0, seed=1, top_p=0.8), Sampling(6, 0.0), Sampling(9, 0.7, seed=2, top_k=9, min_p=0.05)]
    mixed = [Sampling(5, 1.0, seed=1, top_p=0.8, top_k=9), Sampling(5, 0.0, repetition_penalty=1.3),
             Sampling(5, 0.0, logprobs=3, min_tokens=3)]  # fmt: skip
    for sampling in (filtered, mixed):
        wanted = Engine(n, cache_bytes=1 << 20).generate(PROMPTS, sampling)
        engine = device_engine(n)
        found = engine.generate(PROMPTS, sampling)
        assert [c.token_ids for (c,) in found] == [c.token_ids for (c,) in wanted]
        chosen = {kind.filters for *_, kind in engine.runner.device_step.graphs}
        assert (True in chosen) == (sampling is filtered)


def grouped(n, kinds):
    """The network's projections and embedding packed in these of GGUF's types, in turn; and the same written out."""
    packed, dense = copy.deepcopy(n), copy.deepcopy(n)
    turn = itertools.cycle(kinds)
    for name, layer in n.named_modules():
        if isinstance(layer, Linear | torch.nn.Embedding):
            matrix = GroupedMatrix.of_blocks(random_blocks(kind := next(turn), *layer.weight.shape), kind, DEVICE)
            scale = 0.1 / float(matrix.take(torch.arange(matrix.rows)).std())
            halves = matrix.scales.view(torch.float16)
            matrix.scales = (halves * scale).half().view(torch.int32)
            whole = matrix.take(torch.arange(matrix.rows))
            dense.get_submodule(name).weight.data = whole.cpu()
            if isinstance(layer, Linear):
                put = PackedLinear(matrix, None if layer.bias is None else layer.bias.detach())
            else:
                put = PackedEmbedding(matrix)
            replace(packed, name, put)
    return packed, dense


@pytest.mark.parametrize(("family", "kinds"), [("llama", [2]), ("qwen", [2, 8, 3]), ("gemma", [2, 2, 8])])
def test_packed_weights(family, kinds):
    """Of one type, and of types in turn, which lie in one matrix where they are multiplied with the same."""
    torch.manual_seed(0)
    packed, dense = grouped(network(family), kinds)
    sampling = [Sampling(2, 0.0, logprobs=0, ignore_eos=True) for _ in PROMPTS]
    wanted = Engine(dense, cache_bytes=1 << 20).generate(PROMPTS, sampling)
    for some in (PROMPTS, PROMPTS[:1]):
        found = device_engine(packed).generate(some, sampling[: len(some)])
        for (a,), (b,) in zip(wanted, found, strict=False):
            assert a.token_ids == b.token_ids
            one, other = (torch.tensor([x.logprob for x in c.logprobs]) for c in (a, b))
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def with_adapter(n, seed):
    """A copy of the network with an adapter that changes its answers, and the adapter's parts."""
    tuned = copy.deepcopy(n)
    put_adapters(tuned, LoraSpec(4, targets=("q_proj", "v_proj", "down_proj") if seed else ()), seed)
    for name, p in tuned.named_parameters():
        if name.endswith("lora_B"):
            p.data = 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return tuned, {name: layer.adapter for name, layer in adapted(tuned)}


def test_adapters_beside_each_other():
    """Each answer by its own adapter, or none; one that comes later; and the network's own, which is trained."""
    n = network("llama")
    tuned = [with_adapter(n, seed) for seed in (0, 1)]
    sampling = Sampling(3, 0.0, ignore_eos=True)
    wanted = [Engine(t.cpu(), cache_bytes=1 << 20).generate(PROMPTS, sampling) for t, _ in [(n, 0), *tuned]]
    engine = device_engine(n)
    engine.put_adapter("0", tuned[0][1])
    for names in ([None, "0", "0"], [None, "0", "1"], ["1"], ["0"]):
        if "1" in names and "1" not in engine.runner.numbers:
            engine.put_adapter("1", tuned[1][1])
        found = engine._run([engine.add(p, sampling, adapter=a) for p, a in zip(PROMPTS, names, strict=False)])
        for i, (name, (own,)) in enumerate(zip(names, found, strict=True)):
            assert own.token_ids == wanted[0 if name is None else int(name) + 1][i][0].token_ids, (names, i)
    own = device_engine(tuned[0][0])
    assert [c.token_ids for (c,) in own.generate(PROMPTS, sampling)] == [c.token_ids for (c,) in wanted[1]]
    with torch.no_grad():
        for p in tuned[0][0].parameters():
            p.mul_(0.7)
    own.weights_changed()
    engine.drop_adapter("0")
    engine.drop_adapter("1")
    name, part = next(iter(tuned[0][1].items()))
    engine.put_adapter("another", {name: part})  # of other layers, and fewer
    (alone,) = engine._run([engine.add(PROMPTS[0], sampling, adapter="another")])
    assert len(alone[0].token_ids) == 3
    again = Engine(copy.deepcopy(tuned[0][0]).cpu(), cache_bytes=1 << 20).generate(PROMPTS, sampling)
    assert [c.token_ids for (c,) in own.generate(PROMPTS, sampling)] == [c.token_ids for (c,) in again]
    assert [c.token_ids for (c,) in again] != [c.token_ids for (c,) in wanted[1]]


def test_prompts_alone_and_guesses():
    """No token is asked for; or some are guessed."""
    n = network("llama")
    for sampling, more in ((Sampling(0), {}), (Sampling(5, 0.0, ignore_eos=True), {"speculate": "lookup"})):
        prompts = [[5], [7] * 17, [7] * 17]
        wanted = [Engine(n, cache_bytes=1 << 20, **more).generate([p], sampling)[0][0].token_ids for p in prompts]
        engine = device_engine(n, **more)
        found = [engine.generate([p], sampling)[0][0].token_ids for p in prompts]
        assert found == wanted
        assert [c.token_ids for (c,) in engine.generate(prompts, sampling)] == wanted


@pytest.mark.skipif(CUDA, reason="counts what a stand-in captures")
def test_graphs_are_few():
    """Padded batch sizes share one, and nothing is captured again."""
    engine = device_engine(network("llama"))
    for count in (3, 3):
        engine.generate(PROMPTS[:count], Sampling(9, 0.0, ignore_eos=True))
    assert len(engine.captured) == 1


def test_changed_weights_are_seen_without_a_new_graph():
    n = network("llama")
    engine = device_engine(n)
    ask = (PROMPTS, Sampling(6, 0.0, ignore_eos=True))
    engine.generate(*ask)
    with torch.no_grad():
        for p in n.parameters():
            p.mul_(1.5)
    engine.weights_changed()
    wanted = Engine(n.cpu() if not CUDA else network("llama"), cache_bytes=1 << 20)
    if CUDA:
        with torch.no_grad():
            for p in wanted.runner.source.parameters():
                p.mul_(1.5)
        wanted.weights_changed()
    assert [c.token_ids for (c,) in engine.generate(*ask)] == [c.token_ids for (c,) in wanted.generate(*ask)]


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_a_graph_is_captured_once():
    calls = []
    CudaGraphs()(lambda: calls.append(1) or torch.zeros(1, device="cuda"))()
    assert len(calls) == 2
