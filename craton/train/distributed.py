"""One process or many. Under torchrun the network is sharded with FSDP2 over a mesh of named axes; alone, nothing is
done.

Sums over processes are made in an order that does not depend on how many there are. A batch is cut into pieces, a
multiple of VIRTUAL_SHARDS on CPUs; a round gives each process the next piece, and gradients are added piece after piece
onto what the rounds before left. So 1, 2, 3 and 6 processes add the same numbers in the same order.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from craton.train import machine

VIRTUAL_SHARDS = 6
Box = tuple[tuple[int, ...], tuple[int, ...]]  # where a piece of a tensor begins, and its shape


class Processes:
    """This process among its peers. Sums and broadcasts do nothing when there is one."""

    def __init__(self, device: str):
        self.rank, self.world = machine.world()
        self.device = device
        self.mesh = None
        if "WORLD_SIZE" in os.environ and self.world > 1:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=10))
            self.mesh = init_device_mesh(device, (self.world,), mesh_dim_names=("data",))
        self.sums: list[_OrderedSum] = []

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    # ---- words and numbers ----

    def agree(self, value: Any) -> Any:
        """The first process's value, on all."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in their order, on all."""
        if self.mesh is None:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def stack(self, values: Tensor) -> Tensor:
        """Every process's tensor of one shape: (processes, ...), on all."""
        if self.mesh is None:
            return values[None]
        out = values.new_empty(self.world, *values.shape)
        dist.all_gather(list(out.unbind()), values.contiguous())
        return out

    def barrier(self) -> None:
        """Wait for each other."""
        if self.mesh is not None:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.mesh is not None:
            dist.destroy_process_group()

    # ---- pieces of a batch ----

    def pieces(self, groups: int, groups_a_piece: int) -> int:
        """Into how many pieces a batch of so many groups of rows is cut, a multiple of the processes."""
        ordered = self.device == "cpu" and VIRTUAL_SHARDS % self.world == 0
        step = VIRTUAL_SHARDS if ordered else self.world
        return step * max(1, -(-groups // (step * groups_a_piece)))

    def begin_step(self) -> None:
        """The gradients of a new batch follow."""
        for ordered in self.sums:
            ordered.previous = None

    def begin_piece(self, parameters: list[nn.Parameter]) -> None:
        """The gradients of the next piece follow; those of the pieces before are held by their sums."""
        if self.sums:
            for p in parameters:
                p.grad = None

    # ---- the network on its shard ----

    def shard(
        self, network: nn.Module, units: list[list[nn.Module]], forwards: Iterable[tuple[nn.Module, str]], bf16: bool
    ) -> None:
        """FSDP2: each unit, then the rest; parameters become DTensors. The network may be on the meta device."""
        if self.mesh is None:
            return
        policy = MixedPrecisionPolicy()
        if bf16 and self.device == "cuda":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for unit in units:
            fully_shard(unit if len(unit) > 1 else unit[0], mesh=self.mesh, mp_policy=policy)
        fully_shard(network, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        for module, method in forwards:
            register_fsdp_forward_method(module, method)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                self._sum_gradients(module)

    def _sum_gradients(self, module: FSDPModule) -> None:
        if self.device == "cuda":
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            return
        ordered = _OrderedSum()
        module.set_custom_reduce_scatter(ordered)  # type: ignore[arg-type]
        module.set_modules_to_backward_prefetch([module])  # nothing is gathered before its time
        self.sums.append(ordered)


class _OrderedSum:
    """Reduce-scatter of one unit's gradients: onto the sum so far, process after process."""

    def __init__(self) -> None:
        self.previous: Tensor | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that FSDP asks for."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """input (processes * n,): this process's gradients, a part for each process; output (n,)."""
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        parts = parts.view(-1, output_tensor.numel())
        if self.previous is None:
            output_tensor.copy_(parts[0])
            parts = parts[1:]
        else:
            output_tensor.copy_(self.previous)
        for part in parts:
            output_tensor.add_(part)
        self.previous = output_tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box(tensor: Tensor) -> Box:
    """Where this process's part lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU. Collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _materialise(network: nn.Module, device: str) -> None:
    """Memory for a network on the meta device; parameters that are one stay one."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            places.setdefault(p, []).append((module, name))
    network.to_empty(device=device)
    for (module, name), *others in places.values():
        for other, other_name in others:
            if getattr(other, other_name) is not getattr(module, name):
                setattr(other, other_name, getattr(module, name))


@torch.no_grad()
def fill(network: nn.Module, device: str, rows: Callable[[str, tuple[int, ...], int, int], Tensor]) -> None:
    """Give a network on the meta device memory on its device, each process its part: parameters from `rows(name, whole
    shape, first row, number of rows)`, and buffers that are stored likewise."""
    if any(p.is_meta for p in network.parameters()):
        _materialise(network, device)
    else:
        network.to(device)
    for name, p in [*network.named_parameters(), *stored_buffers(network)]:
        (first, *_), (count, *_) = box(p)
        if count:
            local(p).copy_(rows(name, tuple(p.shape), first, count))


def stored_buffers(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that are part of a network's state, not made from something else."""
    kept = network.state_dict()
    return [(name, buffer) for name, buffer in network.named_buffers() if name in kept]


def clip_gradients(parameters: list[nn.Parameter], limit: float, scale: float = 1.0) -> float:
    """The global norm of `scale` times the gradients; they are multiplied by scale, and further down to `limit` where
    the norm is above it (0: never). Summed in fp64 and rounded to fp32, so that it does not depend on how parameters
    are sharded. Collective."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if grads[0].is_cuda:
        squares = torch.stack(torch._foreach_norm(grads)).double().square().sum()  # few kernels
    else:
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads]).sum()
    if dist.is_initialized():
        dist.all_reduce(squares)
    norm = float(squares.sqrt().float()) * abs(scale)
    if limit and norm > limit:
        scale *= limit / norm
    if scale != 1.0:
        torch._foreach_mul_(grads, scale)
    return norm


@contextmanager
def open_processes(device: str) -> Iterator[Processes]:
    """This process among its peers, for the time of a run."""
    processes = Processes(device)
    try:
        yield processes
    finally:
        processes.close()
