"""Muon's orthogonalisation and the optimizers' bookkeeping."""

import dataclasses

import pytest
import torch

from craton.base import UserError
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.initialise import initialise
from craton.train.optim import Optimizers, groups, orthogonalise
from craton.train.pretrain import kind
from craton.train.recipe import OptimizerPart


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (176, 64)])
def test_orthogonalise_approaches_the_polar_factor(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    o = orthogonalise(g)
    s = torch.linalg.svdvals(o)
    assert s.sort().values[2] > 0.75 and s.max() < 1.25  # the very smallest of a square matrix are left behind
    assert torch.nn.functional.cosine_similarity(o.flatten(), (u @ v).flatten(), 0) > 0.97


SETTINGS = OptimizerPart(matrix_lr=0.02, embedding_lr=0.1, head_lr=0.01, norm_lr=0.01, weight_decay=0.1)


def made(network, name):
    o = dataclasses.replace(SETTINGS, name=name)
    return Optimizers(groups(network, kind, o), o)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_in_one_group(name):
    network = Decoder(ModelConfig(50, 32, 64, 2, 2, 1, 16))
    initialise(network, 0)
    optimizers = made(network, name)
    held = [p for part in optimizers.parts for g in part.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(network.parameters()))
    before = {n: p.clone() for n, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizers.step(1.0)
    assert all(not torch.equal(before[n], p) for n, p in network.named_parameters())
    again, state = made(network, name), optimizers.state()
    again.load(state, lambda key, box: state[key])
    assert {k: v.tolist() for k, v in again.state().items()} == {k: v.tolist() for k, v in state.items()}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_frozen_parameters_and_experts(name):
    """Muon once failed on stacks of matrices and on parameters without gradients."""
    config = ModelConfig(
        50, 32, 64, 2, 2, 1, 16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, qk_norm=""
    )
    network = Decoder(config)
    initialise(network, 0)
    for n, p in network.named_parameters():
        p.requires_grad_("layers.1" in n)
    optimizers = made(network, name)
    assert set(optimizers.names.values()) == {n for n, _ in network.named_parameters() if "layers.1" in n}
    before = {n: p.clone() for n, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizers.step(1.0)
    assert all(torch.equal(before[n], p) is ("layers.1" not in n) for n, p in network.named_parameters())
    with pytest.raises(UserError, match="frozen"):
        groups(network.requires_grad_(False), kind, SETTINGS)


def test_a_stack_is_orthogonalised_matrix_by_matrix():
    torch.manual_seed(0)
    g = torch.randn(3, 24, 40)
    assert torch.equal(orthogonalise(g), torch.stack([orthogonalise(m) for m in g]))
