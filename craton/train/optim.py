"""Optimizers: Muon for the matrices, AdamW for embedding, head and norms; or AdamW for everything.

Both work on plain and on sharded (DTensor) parameters. Muon: Jordan 2024 (kellerjordan.github.io/posts/muon) with
Polar Express coefficients (arXiv 2505.16932) and cautious weight decay (arXiv 2510.12402).
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from craton.model import kernels
from craton.model.ops import matmul_t

# Each line turns singular values a bit nearer to 1 by s -> a s + b s^3 + c s^5; made for these five in this order.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest matrix with singular values 1 to g (m, n), approximately, in g's dtype."""
    fast = g.is_cuda or "avx512_bf16" in kernels.cpu_facts().get("flags", "").split()
    x = g.bfloat16() if fast else g
    x = x / (x.norm() * 1.02 + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    for a, b, c in POLAR_EXPRESS:
        s = matmul_t(x, x)
        x = a * x + matmul_t(b * s + c * matmul_t(s, s), x.t())
    return (x.t() if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation. lr is the spectral norm of an update, times sqrt(rows / columns) where above
    1."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, mu, decay = group["lr"], group["momentum"], group["weight_decay"]
            updates = []
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - mu)
                updates.append(p.grad.lerp_(state["momentum"], mu))  # Nesterov; the gradient is not needed again
            for p, u in zip(group["params"], _orthogonalise_all(updates), strict=True):
                if decay:
                    p.mul_(1 - lr * decay * (u * p >= 0))
                p.add_(u, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def _orthogonalise_all(updates: list[Tensor]) -> list[Tensor]:
    """Sharded matrices are gathered, each is orthogonalised on one rank, and shared out again."""
    if not updates or not isinstance(updates[0], DTensor):
        return [orthogonalise(u) for u in updates]
    world = dist.get_world_size()
    out: list[Tensor] = []
    for i, u in enumerate(updates):
        assert isinstance(u, DTensor)
        full, owner = u.full_tensor(), i % world
        full = orthogonalise(full) if dist.get_rank() == owner else torch.empty_like(full)
        dist.broadcast(full, owner)
        out.append(distribute_tensor(full, u.device_mesh, u.placements, src_data_rank=None))
    return out


class Optimizers:
    """The run's optimizers as one: step, learning-rate factor, and state by parameter name."""

    def __init__(
        self,
        network: nn.Module,
        name: str,
        lrs: dict[str, float],
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        self.names: dict[Tensor, str] = {p: n for n, p in network.named_parameters()}
        parts: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "head": [], "norm": []}
        for n, p in network.named_parameters():
            kind = (
                "norm"
                if p.ndim == 1
                else "embedding"
                if "embed_tokens" in n
                else "head"
                if "lm_head" in n
                else "matrix"
            )
            parts[kind].append(p)
        groups = [
            {"params": ps, "lr": lrs[k], "weight_decay": weight_decay if k == "matrix" and name == "adamw" else 0.0}
            for k, ps in parts.items()
            if ps and (name == "adamw" or k != "matrix")
        ]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=betas, eps=1e-10, fused=True)]
        if name == "muon":
            self.parts.append(Muon(parts["matrix"], lrs["matrix"], momentum, weight_decay))
        for part in self.parts:
            for group in part.param_groups:
                group["peak"] = group["lr"]

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak learning rates; gradients are cleared."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * factor
            part.step()
            part.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """'field/parameter' -> tensor, whole ones also where sharded."""
        out = {}
        for part in self.parts:
            for p, fields in part.state.items():
                for key, value in fields.items():
                    full = value.full_tensor() if isinstance(value, DTensor) else value
                    out[f"{key}/{self.names[p]}"] = full
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        by_name = {n: p for p, n in self.names.items()}
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for part in self.parts:
            part.state.clear()
        for key, value in tensors.items():
            field, name = key.split("/")
            p = by_name[name]
            if isinstance(p, DTensor) and value.ndim:
                value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
            elif field != "step":
                value = value.to(p.device)
            owner[p].state[p][field] = value.clone()
