"""Muon's orthogonalisation and the optimizers' bookkeeping."""

import pytest
import torch

from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.initialise import initialise
from craton.train.optim import Optimizers, orthogonalise


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (176, 64)])
def test_orthogonalise_approaches_the_polar_factor(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    o = orthogonalise(g)
    s = torch.linalg.svdvals(o)
    assert s.sort().values[2] > 0.75 and s.max() < 1.25  # the very smallest of a square matrix are left behind
    assert torch.nn.functional.cosine_similarity(o.flatten(), (u @ v).flatten(), 0) > 0.97


def test_every_parameter_is_in_one_group():
    for name in ("muon", "adamw"):
        network = Decoder(ModelConfig(50, 32, 64, 2, 2, 1, 16))
        initialise(network, 0)
        optimizers = Optimizers(
            network, name, {"matrix": 0.02, "embedding": 0.1, "head": 0.01, "norm": 0.01}, 0.95, (0.8, 0.95), 0.1
        )
        held = [p for part in optimizers.parts for g in part.param_groups for p in g["params"]]
        assert len(held) == len(set(held)) == len(list(network.parameters()))
        before = {n: p.clone() for n, p in network.named_parameters()}
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        optimizers.step(1.0)
        assert all(not torch.equal(before[n], p) for n, p in network.named_parameters())
        again = Optimizers(
            network, name, {"matrix": 0.02, "embedding": 0.1, "head": 0.01, "norm": 0.01}, 0.95, (0.8, 0.95), 0.1
        )
        again.load(optimizers.state())
        assert {k: v.tolist() for k, v in again.state().items()} == {
            k: v.tolist() for k, v in optimizers.state().items()
        }
