"""Optimizers: Muon for the matrices, AdamW for embedding, head and norms; or AdamW for everything.

Which parameter is what, the job says. Both work on plain and on sharded (DTensor) parameters; frozen ones are passed
over. Muon: Jordan 2024 (kellerjordan.github.io/posts/muon) with Polar Express coefficients (arXiv 2505.16932) and
cautious weight decay (arXiv 2510.12402).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from craton.base import UserError
from craton.model import kernels, ops
from craton.model.gpu import train_kernels
from craton.train.distributed import Box, box, local
from craton.train.recipe import OptimizerPart

# Each line turns singular values a bit nearer to 1 by s -> a s + b s^3 + c s^5; made for these five in this order.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_STACK_BYTES = 256 << 20  # matrices of one shape that a GPU orthogonalises at once


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest matrices with singular values 1 to g (..., m, n), approximately, in g's dtype."""
    if g.device.type == "cpu" and g.ndim > 2:  # one after the other: a matrix fills a CPU's cores
        return torch.stack([orthogonalise(matrix) for matrix in g]) if len(g) else g
    fast = g.is_cuda or "avx512_bf16" in kernels.cpu_facts().get("flags", "").split()
    x = g.bfloat16() if fast else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        if x.is_cuda and x.ndim == 3:  # additions within the products
            s = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
            continue
        product = ops.matmul_t if x.ndim == 2 else lambda a, b: a @ b.mT
        s = product(x, x)
        x = a * x + product(b * s + c * product(s, s), x.mT)
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation. lr is the spectral norm of an update, times sqrt(rows / columns) where above 1.
    A parameter of three dimensions is a stack of matrices."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for same in _by_shape(with_gradient):
                if train_kernels is not None and same[0].is_cuda and not isinstance(same[0], DTensor):
                    self._step_together(same, group)
                    continue
                updates = [self._momentum(p, group["momentum"]) for p in same]
                for p, u in zip(same, _orthogonalised(same, updates), strict=True):
                    weight, scale = local(p), max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                    if group["weight_decay"]:
                        weight.mul_(1 - group["lr"] * group["weight_decay"] * (u * weight >= 0))
                    weight.sub_(u * (group["lr"] * scale))

    def _step_together(self, same: Sequence[Tensor], group: dict[str, Any]) -> None:
        """The same for all matrices of a shape at once, in few kernels."""
        rate = group["lr"] * max(1.0, same[0].shape[-2] / same[0].shape[-1]) ** 0.5
        many = max(1, _STACK_BYTES // (2 * same[0].numel()))
        for at in range(0, len(same), many):
            some = same[at : at + many]
            gradients = [p.grad for p in some if p.grad is not None]
            stack = train_kernels.nesterov([self._state(p) for p in some], gradients, group["momentum"], torch.bfloat16)
            train_kernels.muon_update(
                [p.data for p in some], orthogonalise(stack).contiguous(), group["lr"] * group["weight_decay"], rate
            )

    def _state(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum: Tensor = state["momentum"]
        return momentum

    def _momentum(self, p: Tensor, mu: float) -> Tensor:
        """This process's part of the Nesterov update."""
        assert p.grad is not None
        momentum, gradient = local(self._state(p)), local(p.grad)
        momentum.mul_(mu).add_(gradient * (1 - mu))
        return gradient.mul_(1 - mu).add_(momentum * mu)  # the gradient is not needed again


class ExactAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) in operations that each round once, so that a value's bits do not depend on where it
    lies in its shard: PyTorch's fused one treats the last few values of a tensor otherwise than the rest."""

    def __init__(self, params: Any, betas: tuple[float, float], eps: float):
        super().__init__(params, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                steps, g = float(state["step"]), local(p.grad)
                mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
                mean.mul_(beta1).add_(g * (1 - beta1))
                square.mul_(beta2).add_((g * g).mul_(1 - beta2))
                size = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
                if group["weight_decay"]:
                    local(p).mul_(1 - lr * group["weight_decay"])
                local(p).sub_((mean / size).mul_(lr / (1 - beta1**steps)))


def _fits_vectors(p: nn.Parameter) -> bool:
    """Whether every shard of a parameter is whole vectors, which the fused AdamW treats all alike."""
    return p.ndim > 1 and p.shape[-1] % 16 == 0


def _by_shape(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(tuple(p.shape), []).append(p)
    return list(groups.values())


def _orthogonalised(parameters: list[nn.Parameter], updates: list[Tensor]) -> list[Tensor]:
    """The updates, this process's parts of matrices of one shape, as parts of orthogonal matrices."""
    first = parameters[0]
    if first.ndim == 3:  # sharded by matrices, if at all
        return [orthogonalise(u) for u in updates]
    if isinstance(first, DTensor):
        return _orthogonalised_shards(parameters, updates)
    stack = max(1, _STACK_BYTES // (2 * first.numel())) if first.is_cuda else 1
    if stack == 1:
        return [orthogonalise(u) for u in updates]
    out: list[Tensor] = []
    for at in range(0, len(updates), stack):
        out += orthogonalise(torch.stack(updates[at : at + stack])).unbind()
    return out


def _orthogonalised_shards(parameters: list[nn.Parameter], updates: list[Tensor]) -> list[Tensor]:
    """As many matrices as there are processes at a time: each gets the rows of one of them from the others, and gives
    them back."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rows, columns = parameters[0].shape
    size = -(-rows // world)  # of a shard, the last ones may be smaller
    counts = [max(0, min(size, rows - r * size)) * columns for r in range(world)]
    out: list[Tensor] = []
    for at in range(0, len(updates), world):
        some = updates[at : at + world]
        away = [counts[rank] if i < len(some) else 0 for i in range(world)]
        home = counts if rank < len(some) else [0] * world
        sent = torch.cat([u.flatten() for u in some])
        matrix = sent.new_empty(sum(home))
        dist.all_to_all_single(matrix, sent, home, away)
        if rank < len(some):
            matrix = orthogonalise(matrix.view(rows, columns)).flatten()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, matrix, away, home)
        out += [piece.view_as(u) for piece, u in zip(received.split(counts[rank]), some, strict=True)]
    return out


@dataclass
class Group:
    """Parameters of one kind that share a learning rate."""

    kind: str
    lr: float
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)


def groups(network: nn.Module, kind: Callable[[str, nn.Parameter], str], o: OptimizerPart) -> list[Group]:
    """The trained parameters by their kind, in the order of the network. UserError if there are none."""
    lrs = {"matrix": o.matrix_lr, "embedding": o.embedding_lr, "head": o.head_lr, "norm": o.norm_lr}
    out: dict[str, Group] = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            group = out.setdefault(k := kind(name, p), Group(k, lrs[k] or 0.0))
            group.names.append(name)
            group.params.append(p)
    if not out:
        raise UserError("nothing is to be trained: every parameter of the network is frozen")
    return list(out.values())


class Optimizers:
    """The run's optimizers as one: step, learning-rate share, and state by parameter name."""

    def __init__(self, parts: list[Group], o: OptimizerPart):
        self.names = {p: name for group in parts for name, p in zip(group.names, group.params, strict=True)}
        muon = o.name == "muon"
        decay = o.weight_decay or 0.0
        self.parts: list[torch.optim.Optimizer] = []
        betas, eps = (o.beta1, o.beta2), 1e-10
        for fused in (True, False):
            some = []
            for g in parts:
                params = [p for p in g.params if (p.is_cuda or _fits_vectors(p)) is fused]
                if params and not (muon and g.kind == "matrix"):
                    some.append({"params": params, "lr": g.lr, "weight_decay": decay if g.kind == "matrix" else 0.0})
            if some and fused:
                self.parts.append(torch.optim.AdamW(some, betas=betas, eps=eps, fused=True))
            elif some:
                self.parts.append(ExactAdamW(some, betas, eps))
        for g in parts:
            if muon and g.kind == "matrix":
                self.parts.append(Muon(g.params, g.lr, o.momentum, decay))
        for part in self.parts:
            for group in part.param_groups:
                group["peak"] = group["lr"]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return list(self.names)

    def step(self, share: float) -> None:
        """One update at `share` of the peak learning rates; gradients are cleared."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * share
            part.step()
            part.zero_grad()

    def clear(self) -> None:
        """As if no step had been made."""
        for part in self.parts:
            part.state.clear()
            part.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """'field/parameter' -> tensor, sharded as the parameter is."""
        return {
            f"{key}/{self.names[p]}": value  # type: ignore[index]
            for part in self.parts
            for p, fields in part.state.items()
            for key, value in fields.items()
        }

    def load(self, keys: Iterable[str], read: Callable[[str, Box], Tensor]) -> None:
        """Take up a state: for each key of `state` its part, from read(key, where the part lies)."""
        by_name = {n: p for p, n in self.names.items()}
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        self.clear()
        for key in keys:
            name = key.partition("/")[2]
            p = by_name[name]
            if key.startswith("step/"):
                owner[p].state[p]["step"] = read(key, ((), ()))
                continue
            value = torch.zeros_like(p)
            local(value).copy_(read(key, box(p)))
            owner[p].state[p][key.partition("/")[0]] = value
