"""Low-rank adapters of linear layers: W x + scale B (A x), W kept as it is (LoRA, arXiv 2106.09685); with a length of
its own for each output where asked for (DoRA, arXiv 2402.09353)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from craton.model import modes, ops
from craton.model.decoder import Decoder, Experts, Head, Linear
from craton.model.packed import PackedLinear, replace

EXPERTS = ("gate_up_proj", "down_proj")  # parameters of Experts that are stacks of matrices


@dataclass(frozen=True)
class LoraSpec:
    """scale: alpha / rank, or alpha / sqrt(rank) where rank-stabilised (arXiv 2312.03732). targets: last parts of names
    of layers; () is every linear layer but the head, which is what learns best (Schulman et al. 2025, LoRA Without
    Regret). The default alpha keeps the best learning rate nearly the same for all ranks, about ten times that of
    training all weights (same source)."""

    rank: int = 32
    alpha: float = 32.0
    rank_stabilised: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class LowRank(nn.Module):
    """scale B (A x): lora_A (rank, inputs), lora_B (outputs, rank). lora_magnitude (outputs,) or none: DoRA's."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None):
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale
        self.lora_magnitude = None if magnitude is None else nn.Parameter(magnitude)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(ops.linear(x, self.lora_A), self.lora_B) * self.scale

    def delta(self) -> Tensor:
        """(outputs, inputs), without DoRA's lengths."""
        return self.lora_B @ self.lora_A * self.scale


class LoraLinear(nn.Module):
    """A linear layer, plain or packed, that is kept, and its adapter."""

    def __init__(self, base: nn.Module, adapter: LowRank):
        super().__init__()
        self.base, self.adapter = base, adapter
        self.base.requires_grad_(False)

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return getattr(self.base, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if modes.leaves_out_adapters():
            return y
        added = self.adapter(x)
        if self.adapter.lora_magnitude is None:
            return y + added.to(y.dtype)
        bias = 0.0 if self.bias is None else self.bias
        return (y - bias + added) * self._ratio() + bias

    def _ratio(self) -> Tensor:
        """Each output's length over that of its weights, which is taken as constant (section 4.3)."""
        with torch.no_grad():
            length = torch.linalg.vector_norm(dense_weight(self.base) + self.adapter.delta(), dim=1)
        assert self.adapter.lora_magnitude is not None
        return self.adapter.lora_magnitude / length

    @property
    def weight(self) -> Tensor:
        """The merged weight, with a gradient for the adapter, where a layer uses it by itself."""
        base = dense_weight(self.base)
        if modes.leaves_out_adapters():
            return base
        whole = base + self.adapter.delta()
        return whole if self.adapter.lora_magnitude is None else whole * self._ratio()[:, None]


class LowRankExperts(nn.Module):
    """An adapter for each expert's matrix: lora_A (experts, rank, inputs), lora_B (experts, outputs, rank)."""

    def __init__(self, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def of_expert(self, x: Tensor, expert: int) -> Tensor:
        """x (tokens, inputs) -> (tokens, outputs), of one expert."""
        return ops.linear(ops.linear(x, self.lora_A[expert]), self.lora_B[expert]) * self.scale

    def delta(self) -> Tensor:
        """(experts, outputs, inputs)."""
        return self.lora_B @ self.lora_A * self.scale


def dense_weight(layer: nn.Module) -> Tensor:
    """(outputs, inputs) of a plain or packed layer, in fp32."""
    if isinstance(layer, PackedLinear):
        packed = layer.packed
        return packed.take(torch.arange(packed.rows)) if packed.written is None else packed.written
    assert isinstance(layer, Linear)
    return layer.weight.float()


def adapted(network: nn.Module) -> Iterator[tuple[str, LoraLinear | Experts]]:
    """The layers that have an adapter, by name."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLinear) or (isinstance(module, Experts) and module.adapters):
            yield name, module


def targets_of(network: Decoder, targets: tuple[str, ...]) -> list[str]:
    """Names of the layers that an adapter of these targets changes. ValueError for a target that is none of them."""
    found = []
    for name, module in network.named_modules():
        if isinstance(module, Linear | PackedLinear) and not isinstance(module, Head) and name != "lm_head":
            found.append(name)
        elif isinstance(module, Experts):
            found += [f"{name}.{own}" for own in EXPERTS]
    last = {name.rpartition(".")[2] for name in found}
    if unknown := next((t for t in targets if t not in last), None):
        raise ValueError(f"no linear layer is named {unknown!r}; there are {', '.join(sorted(last))}")
    return [name for name in found if not targets or name.rpartition(".")[2] in targets]


def put_adapters(network: Decoder, spec: LoraSpec, seed: int) -> int:
    """Give a network's layers fresh adapters, which change nothing yet: A drawn as PEFT draws it, B zero. Everything
    else is kept from then on. Returns how many layers got one. ValueError as `targets_of`, and for DoRA on experts."""
    names = targets_of(network, spec.targets)
    network.requires_grad_(False)
    for number, name in enumerate(names):
        parent, _, own = name.rpartition(".")
        module = network.get_submodule(name if own not in EXPERTS or not _is_stack(network, parent) else parent)
        generator = torch.Generator().manual_seed((seed << 20) + number)
        if isinstance(module, Experts):
            if spec.dora:
                raise ValueError("DoRA of experts is not known; leave it out")
            shape = module.shape_of(own)
            a = _drawn((shape[0], spec.rank, shape[2]), shape[2], generator)
            b = torch.zeros(shape[0], shape[1], spec.rank)
            module.adapters[own] = LowRankExperts(a, b, spec.scale)
            continue
        rows, cols = shape_of(module)
        a = _drawn((spec.rank, cols), cols, generator)
        magnitude = torch.linalg.vector_norm(dense_weight(module), dim=1) if spec.dora else None
        adapter = LowRank(a, torch.zeros(rows, spec.rank), spec.scale, magnitude)
        replace(network, name, LoraLinear(module, adapter))
    return len(names)


def _is_stack(network: nn.Module, name: str) -> bool:
    return isinstance(network.get_submodule(name), Experts)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a plain or packed layer."""
    if isinstance(layer, PackedLinear):
        return layer.packed.rows, layer.packed.cols
    assert isinstance(layer, Linear)
    return layer.weight.shape[0], layer.weight.shape[1]


def _drawn(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> Tensor:
    """Uniform within 1 / sqrt(inputs)."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(inputs)


@torch.no_grad()
def fold(network: Decoder) -> int:
    """Put every adapter into the weights of its layer and take it away; returns how many layers that changed. TypeError
    for packed weights, which cannot hold the sum."""
    changed = 0
    for name, module in list(adapted(network)):
        if isinstance(module, Experts):
            for own, low in module.adapters.items():
                weight = getattr(module, own)
                delta = low.delta()  # type: ignore[operator]
                weight.copy_((weight.float() + delta.to(weight.device)).to(weight.dtype))
                changed += bool(delta.any())
            module.adapters = nn.ModuleDict()
            continue
        if not isinstance(module.base, Linear):
            raise TypeError(name)
        weight, whole = module.base.weight, module.weight
        changed += not torch.equal(whole, weight.float())
        weight.copy_(whole.to(weight.device, weight.dtype))
        replace(network, name, module.base)
    return changed


def write_head_out(network: Decoder) -> None:
    """A packed head as a plain one, since losses need its matrix; it is kept as it is."""
    packed = network.lm_head
    if isinstance(packed, PackedLinear):
        head = Head(network.config)
        head.weight = nn.Parameter(dense_weight(packed), requires_grad=False)
        network.lm_head = head
