"""The loop carries what is to come: pairs, pictures, rollouts, frozen parameters. Each learns, and resumes to the
bit."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from craton.base import UserError
from craton.train.distributed import Processes
from craton.train.job import Cost, Job, Looked, Losses
from craton.train.loop import Run, accumulate
from craton.train.recipe import Recipe
from tests.train.preference import PairSource, preference_job


def recipe(steps=60, micro=1 << 20, lr=0.01):
    r = Recipe()
    r.run.steps, r.run.checkpoint_every, r.run.evaluate_every = steps, 20, steps
    r.data.micro_tokens, r.optimizer.name, r.optimizer.weight_decay = micro, "adamw", 0.0
    o = r.optimizer
    o.matrix_lr = o.embedding_lr = o.head_lr = o.norm_lr = lr
    r.schedule.warmup_steps, r.safety.spike_sigmas = 2, 0.0  # sixteen rows a batch are too few to call a spike
    return r


def trained(job, out, r, until=None):
    """A run to its end; or one that was stopped at step `until`, and taken up by another."""
    (out / "training").mkdir(parents=True)
    alone = Processes("cpu")
    if until is not None:
        first = Run(out, job(), dataclasses.replace(r, run=dataclasses.replace(r.run, steps=r.run.steps)), alone, 1e9)
        real, calls = first._step, []
        first._step = lambda *a: (
            (_ for _ in ()).throw(KeyboardInterrupt) if len(calls) == until else (calls.append(1) or real(*a))
        )
        with pytest.raises(KeyboardInterrupt):
            first.train()
    run = Run(out, job(), r, alone, 1e9)
    if until is not None:
        assert run.restore() and run.state.step == until // 20 * 20
    run.train()
    return run


def weights(run):
    return {n: p.detach().clone() for n, p in run.network.named_parameters()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


def last(out: Path):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


# ---- pairs --------------------------------------------------------------------------------------------------------


def test_preferences_are_learned_and_the_control_learns_nothing(tmp_path):
    trained(preference_job, tmp_path / "honest", recipe(300))
    trained(lambda: preference_job(honest=False), tmp_path / "control", recipe(300))
    assert last(tmp_path / "honest")["heldout_accuracy"] >= 0.9
    assert last(tmp_path / "control")["heldout_accuracy"] <= 0.75
    lines = len(Path("tests/train/preference.py").read_text().splitlines()) if Path("tests").exists() else 0
    assert lines < 100


def test_preferences_resume_to_the_bit(tmp_path):
    whole, again = (
        trained(preference_job, tmp_path / "a", recipe()),
        trained(preference_job, tmp_path / "b", recipe(), 33),
    )
    assert same(weights(whole), weights(again))


def test_pairs_stay_together_however_a_batch_is_cut():
    """The sums of a batch are those of its pairs, and so are its gradients, whatever the slices."""
    results = []
    for micro in (1 << 20, 16):
        job, alone = preference_job(), Processes("cpu")
        run = Run(Path("/nowhere"), job, recipe(micro=micro), alone, 1e9)
        sums = accumulate(run.network, run.parameters, job, run.recipe, alone, 3)
        results.append((sums, [p.grad.clone() for p in run.parameters]))
    assert results[0][0]["accuracy"][1] == 8 and results[0][0]["loss"][1] == 8
    assert results[0][0]["loss"][0] == pytest.approx(results[1][0]["loss"][0], rel=1e-6)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for share in range(5):
        batch = PairSource().batch(0, share, 5, None)
        assert len(batch.ids) % 2 == 0 and torch.equal(batch.ids[::2, :4], batch.ids[1::2, :4])


# ---- pictures -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pictures:
    """pixels: (rows, 8, 8) fp32. label: (rows,). caption: not in this source."""

    pixels: torch.Tensor
    label: torch.Tensor
    caption: torch.Tensor | None = None


class PictureSource:
    rows, together = 12, 1

    def batch(self, number, share, shares, network):
        r = torch.Generator().manual_seed(number * 1000 + share)
        n = len(range(share, self.rows, shares))
        label = torch.randint(2, (n,), generator=r)
        pixels = torch.randn(n, 8, 8, generator=r) * 0.3
        pixels[label == 1, :4] += 1.0  # bright above
        pixels[label == 0, 4:] += 1.0
        return Pictures(pixels, label)

    def facts(self):
        return {}


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(64, 16), nn.Linear(16, 2)

    def forward(self, pixels):
        return self.out(torch.relu(self.inner(pixels.flatten(1))))


class TowerStore:
    def build(self):
        with torch.device("meta"):
            return Tower()

    def rows(self, name, shape, first, count):
        g = torch.Generator().manual_seed(len(name))
        return torch.randn(shape, generator=g)[first : first + count] * 0.1

    def units(self, network):
        return []

    def forwards(self, network):
        return []

    def published(self, tensors):
        return {f"tower.{n}": t for n, t in tensors.items()}

    def write_rest(self, out):
        pass


def picture_job():
    def objective(network, batch):
        losses = nn.functional.cross_entropy(network(batch.pixels), batch.label, reduction="sum")
        return Losses(losses, torch.tensor(float(len(batch.label))))

    def look(network, processes):
        seen = PictureSource().batch(9999, 0, 1, network)
        with torch.no_grad():
            return Looked({"accuracy": float((network(seen.pixels).argmax(-1) == seen.label).float().mean())})

    return Job(
        "pictures", PictureSource(), objective, TowerStore(), Cost("pictures", 1, 1e4, 1e4), lambda n, p: "norm", look
    )


def test_a_network_that_is_no_decoder(tmp_path):
    from craton.weights.tensorfile import read_tensors

    run = trained(picture_job, tmp_path / "m", recipe(60))
    row = last(tmp_path / "m")
    assert row["accuracy"] == 1.0 and row["pictures"] == 60 * 12 and row["pictures_per_second"] > 0
    assert set(read_tensors(tmp_path / "m" / "model.safetensors")) == {f"tower.{n}" for n in weights(run)}


# ---- rollouts -----------------------------------------------------------------------------------------------------


class RolloutSource:
    """A bandit: rows are drawn from the network's own distribution, so a batch depends on the weights."""

    rows, together = 24, 4

    def batch(self, number, share, shares, network):
        groups = range(share, self.rows // 4, shares)
        with torch.no_grad():
            p = network(torch.zeros(1, 8, 8))[0].softmax(-1)
        drawn = []
        for group in groups:
            r = torch.Generator().manual_seed(number * 100 + group)
            drawn.append(torch.multinomial(p, 4, replacement=True, generator=r))
        return Pictures(torch.zeros(4 * len(drawn), 8, 8), torch.cat(drawn))

    def facts(self):
        return {}


def rollout_job():
    def objective(network, batch):
        """Reinforce with the mean of a group as its baseline; the second arm pays."""
        reward = batch.label.float().view(-1, 4)
        advantage = (reward - reward.mean(-1, keepdim=True)).flatten()
        logp = network(batch.pixels).log_softmax(-1).gather(1, batch.label[:, None])[:, 0]
        count = torch.tensor(float(len(batch.label)))
        return Losses(-(logp * advantage).sum(), count, {"reward": (reward.sum(), count)})

    return dataclasses.replace(
        picture_job(), name="rollouts", source=RolloutSource(), objective=objective, look=lambda n, p: Looked({})
    )


def test_rollouts_learn_and_resume_to_the_bit(tmp_path):
    whole = trained(rollout_job, tmp_path / "a", recipe(80, lr=0.05))
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["reward"] < 0.8 < 0.95 < rows[-1]["reward"]
    again = trained(rollout_job, tmp_path / "b", recipe(80, lr=0.05), 47)
    assert same(weights(whole), weights(again))
    assert (tmp_path / "b" / "metrics.jsonl").read_text().count("\n") == 80


# ---- what is trained ----------------------------------------------------------------------------------------------


def frozen_job():
    job = preference_job()
    store = job.store

    class Frozen(type(store)):
        def build(self):
            network = super().build()
            for name, p in network.named_parameters():
                p.requires_grad_("lm_head" in name)
            return network

    return dataclasses.replace(job, store=Frozen(store.config, store.seed))


def test_frozen_parameters_stay_and_are_released(tmp_path):
    from craton.train import checkpoint
    from craton.weights.tensorfile import read_tensors

    before = weights(Run(tmp_path / "x", frozen_job(), recipe(), Processes("cpu"), 1e9))
    run = trained(frozen_job, tmp_path / "m", recipe())
    after = weights(run)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"lm_head.weight"}
    newest = sorted((tmp_path / "m" / "training").glob("step-*"))[-1]
    assert set(dict(checkpoint.whole_tensors(newest, "weights"))) == {"lm_head.weight"}
    assert set(read_tensors(tmp_path / "m" / "model.safetensors")) == set(before)
    again = trained(frozen_job, tmp_path / "b", recipe(), 33)
    assert same(after, weights(again))


def test_a_mask_that_covers_nothing_is_refused(tmp_path):
    def nothing(network, batch):
        losses = preference_job().objective(network, batch)
        return Losses(losses.total, losses.count * 0)

    with pytest.raises(UserError, match="nothing could be learned from it"):
        trained(lambda: dataclasses.replace(preference_job(), objective=nothing), tmp_path / "m", recipe())


def test_masks_count_once_however_they_fall(tmp_path):
    """The mean is over the weights of the whole batch, not over pieces of unlike weight."""
    from craton.corpus.batches import Batch
    from craton.train.pretrain import next_token

    config, r = preference_job().store.config, torch.Generator().manual_seed(0)
    ids = torch.randint(64, (6, 9), generator=r)
    weight = torch.zeros(6, 8)
    weight[0], weight[3, :2], weight[5, 7] = 1.0, 0.5, 2.0

    class Masked:
        rows, together = 6, 1

        def batch(self, number, share, shares, network):
            i = slice(share, None, shares)
            return Batch(ids[i, :-1].contiguous(), ids[i, 1:].contiguous(), weight[i].contiguous(), None)

        def facts(self):
            return {}

    job = dataclasses.replace(preference_job(), source=Masked(), objective=next_token)
    run = Run(tmp_path, job, recipe(), Processes("cpu"), 1e9)
    sums = accumulate(run.network, run.parameters, job, run.recipe, Processes("cpu"), 0)
    logits = run.network(ids[:, :-1])
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(6, 8)
    assert sums["loss"] == pytest.approx((float((nll.detach() * weight).sum()), 11.0), rel=1e-5)
    wanted = torch.autograd.grad((nll * weight).sum() / 11, run.parameters)
    for p, w in zip(run.parameters, wanted, strict=True):
        torch.testing.assert_close(p.grad / 11, w, atol=1e-5, rtol=1e-3)
    shutil.rmtree(tmp_path)
    assert config.vocab_size == 64
