"""Blocks compile whole and once, which is what makes them fast on a GPU; shown with a compiler that only traces."""

import pytest
import torch
from torch._dynamo.utils import counters

from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.initialise import initialise
from craton.train.start import train
from tests.conftest import small

SIZES = dict(max_position_embeddings=256, eos_token_id=0)
FAMILIES = {
    "llama": ModelConfig(300, 64, 96, 10, 4, 2, 16, **SIZES),
    "qwen": ModelConfig(300, 64, 96, 10, 4, 2, 16, attention_bias=True, qk_norm="head", **SIZES),
    "gemma": ModelConfig(
        300, 64, 96, 10, 4, 1, 16, norm_placement="both", qk_norm="head", norm_unit_offset=True, embedding_scale=8.0,
        hidden_act="gelu_pytorch_tanh", **SIZES
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_graph_breaks_and_no_compiling_again(family, documents, recompute):
    """Ten layers, more than PyTorch would compile anew: the first, without a pending addition, and all the others, each
    once for training and once for looking."""
    torch._dynamo.reset()
    counters.clear()
    network = Decoder(FAMILIES[family])
    initialise(network, 0)
    network.model.recompute = recompute
    for block in network.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    start = torch.arange(64, dtype=torch.int32).expand(2, 64) // 20 * 20 if documents else None
    graphs = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            network.weighted_nll(ids, ids, torch.ones(2, 64), start)[0].backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            network.weighted_nll(ids, ids, torch.ones(2, 64), start)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] <= 4 and not counters["graph_break"]


def test_a_run_that_is_compiled(corpus, tmp_path, monkeypatch):
    """From end to end, with looks and rows of other lengths; the embedding, which has nothing to compile, too."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: real(self, backend="eager", **more))
    summary = train([str(corpus)], tmp_path / "m", small(run__steps=3, run__compile="on", run__evaluate_every=2))
    assert summary["status"] == "finished" and summary["steps"] == 3
