"""On a GPU everything takes the plain meaning of each operation: the same numbers as on the CPU, up to rounding."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from craton.engine.engine import Engine
from craton.engine.request import Sampling
from craton.engine.sampler import draw_each
from craton.model import nll, ops
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.initialise import initialise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CONFIG = ModelConfig(300, 64, 96, 2, 4, 2, 16, max_position_embeddings=256, eos_token_id=0)


def network(device="cpu", dtype=torch.float32):
    made = Decoder(CONFIG)
    initialise(made, 0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    return made.to(device, dtype)


@pytest.mark.parametrize("known", [True, False])
def test_losses_and_gradients(known):
    ids = torch.randint(300, (3, 41), generator=torch.Generator().manual_seed(0))
    target = ids[:, 1:].contiguous()
    target[0, :9] = nll.IGNORE
    results = []
    for device in ("cpu", "cuda"):
        n = network(device)
        x, y, weight = ids[:, :-1].contiguous().to(device), target.to(device), torch.ones(3, 40, device=device)
        total = n.weighted_nll(x, y, weight)[0] if known else n.token_nll(x, y).sum()
        total.backward()
        results.append([total.detach().cpu(), *(p.grad.cpu() for p in n.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_bf16_loss_keeps_fp32_gradients_of_the_head():
    x = torch.randn(50, 64, device="cuda", requires_grad=True)
    w = torch.randn(300, 64, device="cuda", requires_grad=True)
    target = torch.randint(300, (50,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        each = nll.token_nll(x, w, target)
    each.sum().backward()
    wanted = torch.nn.functional.cross_entropy(x.double() @ w.double().t(), target, reduction="none")
    assert each.dtype == torch.float32 and w.grad.dtype == torch.float32
    torch.testing.assert_close(each.double(), wanted, atol=0.5, rtol=0.05)


def test_a_target_outside_the_vocabulary_ends_the_process():
    code = (
        "import torch; from craton.model import nll; d = 'cuda'\n"
        "x, w = torch.randn(4, 8, device=d), torch.randn(50, 8, device=d)\n"
        "print(nll.token_nll(x, w, torch.tensor([1, 2, 50, 3], device=d)).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode and "assert" in done.stderr.lower() and not done.stdout


def test_greedy_answers_are_those_of_the_cpu():
    prompts = [[5, 9, 2], [7] * 40, list(range(1, 100))]
    answers = []
    for device in ("cpu", "cuda"):
        engine = Engine(network(device))
        done = engine.generate(prompts, Sampling(60, 0.0, ignore_eos=True))
        answers.append([c[0].token_ids for c in done])
    assert answers[0] == answers[1] and all(len(a) == 60 for a in answers[0])


def test_draws_follow_the_distribution():
    scores = torch.tensor([0.0, 1.0, 2.0, -torch.inf], device="cuda").expand(4000, 4).contiguous()
    u = [(i + 0.5) / 4000 for i in range(4000)]
    tokens = draw_each(scores, [Sampling(temperature=1.0)] * 4000, u)
    share = torch.tensor(tokens).bincount(minlength=4) / 4000
    torch.testing.assert_close(share, scores[0].cpu().softmax(-1), atol=0.01, rtol=0)
    nucleus = draw_each(scores, [Sampling(temperature=1.0, top_p=0.6)] * 4000, u)
    assert set(nucleus) == {2}


def test_training_learns(tmp_path):
    text = "".join(f"{a} plus {b} is {a + b}. " for a in range(60) for b in range(60))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "sums.txt").write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    craton = [sys.executable, "-m", "craton"]
    build = [*craton, "corpus", "build", tmp_path / "in", "--out", tmp_path / "c", "--skip", "quality"]
    train = [*craton, "train", tmp_path / "c", "--out", tmp_path / "m", "--depth", "2", "--steps", "60"]
    for command in (build, [*train, "--set", "data.sequence_length=64", "--set", "data.batch_tokens=2048"]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and not math.isnan(rows[-1]["gradient_norm"])
    pairs = [{"prompt": f"{a} plus {b} is ", "completion": f"{a + b}."} for a in range(9) for b in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    rest = [tmp_path / "pairs.jsonl", "--steps", "6", "--out"]
    commands = [
        [*craton, "tune", tmp_path / "m", *rest, tmp_path / "a", "--lora", "4"],
        [*craton, "tune", tmp_path / "m", *rest, tmp_path / "f", "--full"],
        [*craton, "quantize", tmp_path / "m", "--bits", "8", "--out", tmp_path / "q"],
        [*craton, "tune", tmp_path / "q", *rest, tmp_path / "qa", "--lora", "4"],
        [*craton, "generate", tmp_path / "q", "3 plus 4 is ", "--max-tokens", "5"],
    ]
    for command in commands:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, (command, done.stderr)
    assert ops.matmul_t(torch.ones(2, 3, device="cuda"), torch.ones(4, 3, device="cuda")).sum() == 24
