"""The decoder against transformers' Qwen 3, and against itself with a cache."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from craton.model.cache import PagedCache, one_sequence
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.initialise import initialise
from craton.weights import qwen3

SHAPES = [
    ModelConfig(300, 64, 192, 2, 4, 2, 16, max_position_embeddings=256),
    ModelConfig(300, 96, 128, 3, 3, 1, 32, max_position_embeddings=256, tie_word_embeddings=True, rope_theta=1e6),
    ModelConfig(257, 40, 72, 1, 2, 2, 20, max_position_embeddings=256),
]


def pair(config):
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(**{k: v for k, v in qwen3.FAMILY.write(config).items() if k not in ("architectures", "model_type")})
    ).float()
    for p in theirs.parameters():
        p.data += torch.randn_like(p) * 0.05
    ours = Decoder(config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("config", SHAPES)
def test_logits_and_gradients_equal_transformers(config):
    ours, theirs = pair(config)
    ids = torch.randint(config.vocab_size, (2, 70))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    weight = torch.full((2, 69), 1 / 138)
    ours.weighted_nll(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weight)[0].backward()
    theirs(ids, labels=ids).loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("config", SHAPES)
def test_cached_steps_equal_one_forward(config):
    network, _ = pair(config)
    ids = torch.randint(config.vocab_size, (1, 50))
    with torch.no_grad():
        whole = network(ids)
        cache = PagedCache(config, 4)
        pieces = [
            network(ids[:, a:b], one_sequence(cache, a, b - a)) for a, b in ((0, 20), (20, 21), (21, 33), (33, 50))
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", SHAPES)
def test_parameter_counts(config):
    network = Decoder(config)
    assert config.parameters == sum(p.numel() for p in network.parameters())
    assert config.matrix_parameters == sum(
        p.numel() for n, p in network.named_parameters() if p.ndim == 2 and "embed" not in n
    ) + (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)


def test_documents_do_not_see_each_other():
    config = SHAPES[0]
    network, _ = pair(config)
    ids = torch.randint(config.vocab_size, (1, 60))
    start = torch.zeros(1, 60, dtype=torch.int32)
    start[0, 25:] = 25
    target, weight = torch.randint(config.vocab_size, (1, 60)), torch.ones(1, 60)
    _, together = network.weighted_nll(ids, target, weight, start)
    _, alone = network.weighted_nll(ids[:, 25:].contiguous(), target[:, 25:].contiguous(), weight[:, 25:], None)
    torch.testing.assert_close(together[:, 25:], alone, atol=2e-5, rtol=1e-4)
    _, crossing = network.weighted_nll(ids, target, weight, None)
    assert (together[:, 25:] - crossing[:, 25:]).abs().max() > 1e-3


def test_initialisation_depends_on_the_seed_alone():
    a, b, c = (Decoder(SHAPES[0]) for _ in range(3))
    initialise(a, 1)
    torch.rand(5)
    initialise(b, 1)
    initialise(c, 2)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="multiple of"):
        ModelConfig(10, 8, 8, 1, 3, 2, 4)
    with pytest.raises(ValueError, match="hidden_size"):
        ModelConfig(10, 0, 8, 1, 2, 2, 4)


def test_training_after_looking():
    """What a forward pass without gradients keeps can be used by one that has them."""
    from craton.model.config import ModelConfig
    from craton.model.decoder import Decoder
    from craton.model.initialise import initialise

    network = Decoder(ModelConfig(50, 32, 32, 1, 2, 2, 16, max_position_embeddings=32, eos_token_id=0))
    initialise(network, 0)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        network(ids)
    network.weighted_nll(ids, ids, torch.ones(1, 8))[0].backward()
