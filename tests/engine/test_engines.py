"""Several engines in one process; caches by the bytes asked for; weights that change."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from craton.engine import engine as engine_module
from craton.engine.engine import Engine
from craton.engine.request import Sampling
from craton.engine.runner import cache_dtype
from craton.model.decoder import Decoder
from craton.weights.folder import load_network
from tests.engine.test_engine import CONFIG, network
from tests.weights.families import make


@pytest.mark.parametrize("families", [("gemma3", "qwen3_moe"), ("deepseek_v3", "gpt_oss")])
def test_two_engines_in_two_threads(families, tmp_path):
    """Families that run module by module, under one mode each: 10,000 tokens beside one another are those of each
    alone. The mode was the whole process's once, and answers changed."""
    networks = []
    for family in families:
        make(family, tmp_path / family)
        networks.append(load_network(tmp_path / family).requires_grad_(False))
    size = min(n.config.vocab_size for n in networks)
    prompts = [[(7 * i + j) % (size - 3) + 3 for j in range(5 + i % 11)] for i in range(50)]
    sampling = [Sampling(50, (0.0, 1.0)[i % 2], seed=i, ignore_eos=True) for i in range(50)]

    def answers(network):
        engine = Engine(network, cache_bytes=8 << 20, step_tokens=64, most_running=16)
        return [c.token_ids for (c,) in engine.generate(prompts, sampling)]

    alone = [answers(n) for n in networks]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            assert list(pool.map(answers, networks)) == alone
    assert sum(len(a) for each in alone for a in each) * 2 == 10_000


def test_a_cache_has_the_bytes_that_were_asked_for(monkeypatch):
    """Sized by the type that it holds, and on a GPU by the GPU's memory."""
    half = network().to(torch.bfloat16)
    assert cache_dtype(half) == torch.float32  # on a CPU
    with torch.device("meta"):
        elsewhere = Decoder(CONFIG).to(torch.bfloat16)
    assert cache_dtype(elsewhere) == torch.bfloat16
    for n in (network(), elsewhere):
        engine = Engine(n, cache_bytes=1 << 20)
        held = engine.runner.cache.keys.nbytes + engine.runner.cache.values.nbytes
        assert (1 << 20) * 0.9 < held <= 1 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    assert engine_module._default_cache(torch.device("cuda"), 1 << 20, 1 << 20) == 30 << 30


def test_changed_weights_are_taken_up():
    n = network()
    engine = Engine(n, cache_bytes=1 << 20)
    ask = ([[5, 6, 7] * 20], Sampling(20, 0.0, ignore_eos=True))
    before = engine.generate(*ask)[0][0].token_ids
    with torch.no_grad():
        for p in n.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    engine.weights_changed()
    after = engine.generate(*ask)[0][0]
    assert after.token_ids == Engine(n, cache_bytes=1 << 20).generate(*ask)[0][0].token_ids != before
    assert after.cached_tokens == 0
