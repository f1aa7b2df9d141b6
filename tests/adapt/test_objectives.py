"""Objectives against TRL's own losses, on the same log-probabilities: values and gradients."""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from craton.adapt import objectives
from craton.adapt.methods import Labelled, PolicyGradient, Preference, fine_tuning
from craton.adapt.rows import Answers
from craton.corpus.batches import Batch

trl = pytest.importorskip("trl")
PAIRS, TIME = 6, 9


def one(x):
    return x


def made(seed=0, rows=2 * PAIRS):
    """Token log-probabilities with a gradient, weights of answers, and a reference's sums."""
    r = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, TIME, generator=r) * 3 - 0.01
    size = torch.randint(2, TIME + 1, (rows,), generator=r)
    weight = (torch.arange(TIME) >= TIME - size[:, None]).float()
    reference = ((logp + 0.3 * torch.randn(rows, TIME, generator=r)) * weight).sum(-1)
    return logp.requires_grad_(), weight, reference


class Network:
    """Gives log-probabilities that are already there."""

    def __init__(self, logp):
        self.logp = logp

    def token_nll(self, ids, target, start=None):
        return -self.logp


def answers(weight, **more):
    ids = torch.zeros(weight.shape, dtype=torch.long)
    return Answers(ids, ids, weight, weight.sum(-1).long(), **more)


def interleaved(x):
    """Rows of pairs as craton has them, from TRL's: all better ones before all worse ones."""
    return torch.stack(x.chunk(2), 1).flatten(0, 1)


def trainer(**more):
    fake = MagicMock()
    fake.accelerator.gather_for_metrics = fake.accelerator.gather = one
    fake.accelerator.device = "cpu"
    fake._metrics = defaultdict(lambda: defaultdict(list))
    fake.model.training, fake._tp_size, fake._total_train_tokens = True, 1, 0
    fake.aux_loss_enabled = fake.use_weighting = False
    for name, value in more.items():
        setattr(fake, name, value)
    return fake


def outputs(logp, weight):
    zeros = torch.zeros(weight.shape)
    return SimpleNamespace(
        log_probs=logp * weight, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros(weight.shape, dtype=torch.bool)
    )


def same(ours, theirs, ours_leaf, theirs_leaf):
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_leaf.grad, theirs_leaf.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, beta", [("dpo", 0.1), ("dpo", 0.5), ("ipo", 0.1), ("ipo", 0.4)])
def test_dpo_and_ipo(kind, beta):
    """Against DPOTrainer."""
    logp, weight, reference = made()
    theirs_logp = logp.detach().clone().requires_grad_()
    fake = trainer(
        beta=beta, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", label_smoothing=0.0,
        loss_types=["sigmoid" if kind == "dpo" else "ipo"], loss_weights=[1.0],
    )  # fmt: skip
    mask = torch.cat([torch.zeros(len(weight), 1), weight], 1)
    chosen, rejected = reference.chunk(2)
    inputs = {"input_ids": torch.zeros(mask.shape, dtype=torch.long), "attention_mask": torch.ones(mask.shape)}
    inputs |= {"completion_mask": mask.long(), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    theirs = trl.DPOTrainer._compute_loss(fake, lambda **k: outputs(theirs_logp, weight), inputs, False)
    losses = Preference(kind, beta)(
        Network(interleaved(logp)), answers(interleaved(weight), reference=interleaved(reference))
    )
    same(losses.total / losses.count, theirs, logp, theirs_logp)


@pytest.mark.parametrize("seed", [0, 1])
def test_kto(seed):
    """Against KTOTrainer; the distance from the reference is that of answers behind other prompts."""
    logp, weight, reference = made(seed, 8)
    others, other_weight, other_reference = made(seed + 10, 8)
    good = torch.tensor([True, False, True, True, False, False, True, False])
    theirs_logp = logp.detach().clone().requires_grad_()
    fake = trainer(
        beta=0.1, loss_type="kto", calculate_KL=True, precompute_ref_logps=True, desirable_weight=1.0,
        undesirable_weight=1.0, _compute_kl_logps=lambda model, batch: (others * other_weight).sum(-1).detach(),
    )  # fmt: skip
    mask = torch.cat([torch.zeros(len(weight), 1), weight], 1).long()
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(mask.shape), "completion_mask": mask, "label": good}
    inputs |= {"ref_logps": reference, "ref_KL_logps": other_reference}
    theirs = trl.KTOTrainer._compute_loss(fake, lambda **k: outputs(theirs_logp, weight), inputs, False)
    both = torch.cat([logp, others.detach()]), torch.cat([weight, other_weight])
    b = answers(both[1], reference=torch.cat([reference, other_reference]), good=good)
    losses = Labelled(0.1, 16)(Network(both[0]), b)
    same(losses.total / losses.count, theirs, logp, theirs_logp)


def test_orpo():
    """Against ORPOTrainer's odds ratio, and its first part: the loss of the better answers."""
    from trl.experimental.orpo import ORPOTrainer

    logp, weight, _ = made()
    theirs_logp = logp.detach().clone().requires_grad_()
    mean = (theirs_logp * weight).sum(-1) / weight.sum(-1)
    ratio = ORPOTrainer.odds_ratio_loss(
        SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu")), *mean.chunk(2)
    )[0]
    chosen, chosen_weight = theirs_logp.chunk(2)[0], weight.chunk(2)[0]
    theirs = -(chosen * chosen_weight).sum() / chosen_weight.sum() - ratio.mean()
    losses = Preference("orpo", 0.1)(Network(interleaved(logp)), answers(interleaved(weight)))
    same(losses.total / losses.count, theirs, logp, theirs_logp)


def test_simpo():
    """Against CPOTrainer."""
    from trl.experimental.cpo import CPOTrainer

    logp, weight, _ = made()
    theirs_logp = logp.detach().clone().requires_grad_()
    mean = (theirs_logp * weight).sum(-1) / weight.sum(-1)
    fake = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=1.0, beta=2.0, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs = CPOTrainer.cpo_loss(fake, *mean.chunk(2))[0].mean()
    losses = Preference("simpo", 2.0, 1.0)(Network(interleaved(logp)), answers(interleaved(weight)))
    same(losses.total / losses.count, theirs, logp, theirs_logp)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo(kind, beta):
    """Against GRPOTrainer, with ratios far enough from 1 to be clipped."""
    logp, weight, _ = made()
    r = torch.Generator().manual_seed(3)
    old = logp.detach() + 0.4 * torch.randn(logp.shape, generator=r)
    reference = logp.detach() + 0.2 * torch.randn(logp.shape, generator=r)
    advantage = torch.randn(len(logp), generator=r)
    theirs_logp = logp.detach().clone().requires_grad_()
    fake = trainer(
        beta=beta, loss_type={"gspo": "grpo"}.get(kind, kind), epsilon_low=0.2, epsilon_high=0.28,
        importance_sampling_level="sequence" if kind == "gspo" else "token", top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, max_completion_length=TIME, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
    )  # fmt: skip
    fake.args.delta, fake.args.use_bias_correction_kl, fake.args.steps_per_generation = None, False, 1
    fake.accelerator.num_processes = 1
    fake._get_per_token_logps_and_entropies = lambda *a, **k: (theirs_logp, torch.zeros(logp.shape), None)
    ids = torch.zeros(logp.shape, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :2], "prompt_mask": ids[:, :2] + 1, "completion_ids": ids, "completion_mask": weight}
    inputs |= {"advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": reference}
    inputs |= {"num_items_in_batch": weight.sum()}
    theirs = trl.GRPOTrainer._compute_loss(fake, None, inputs)
    b = answers(weight, advantage=advantage, sampled=old, reference=reference)
    losses = PolicyGradient(kind, 0.2, 0.28, beta, TIME)(Network(logp), b)
    same(losses.total / losses.count, theirs, logp, theirs_logp)


def test_advantages_are_those_of_a_group():
    """Centred; scaled as GRPOTrainer scales them."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]])
    plain = objectives.advantages(rewards, scaled=False)
    assert torch.allclose(plain.sum(-1), torch.zeros(3), atol=1e-6) and plain[1].abs().max() == 0
    scaled = objectives.advantages(rewards, scaled=True)
    expected = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)
    torch.testing.assert_close(scaled, expected)


def test_fine_tuning_is_cross_entropy(model_folder):
    """Against PyTorch's own on the network's logits, where weights are 0 and 1; gradients too."""
    import craton

    network = craton.load(str(model_folder)).network.float().requires_grad_(True)
    r = torch.Generator().manual_seed(0)
    size = network.config.vocab_size
    ids, target = (torch.randint(0, size, (3, 20), generator=r) for _ in range(2))
    weight = (torch.rand(3, 20, generator=r) > 0.5).float()
    losses = fine_tuning(network, Batch(ids, target, weight, None))
    (losses.total / losses.count).backward()
    grads = {n: p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    masked = target.masked_fill(weight == 0, -100)
    expected = torch.nn.functional.cross_entropy(network(ids).flatten(0, 1), masked.flatten())
    expected.backward()
    torch.testing.assert_close(losses.total / losses.count, expected, atol=1e-5, rtol=1e-5)
    for name, p in network.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_divergences(kind):
    """Against PyTorch's KL divergence."""
    a, b = (torch.log_softmax(torch.randn(5, 11, generator=torch.Generator().manual_seed(s)), -1) for s in (0, 1))
    student, teacher = (a, b)
    ours = objectives.DIVERGENCES[kind](student, teacher)
    first, second = (student, teacher) if kind == "forward" else (teacher, student)
    expected = torch.nn.functional.kl_div(first, second, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(ours, expected)
