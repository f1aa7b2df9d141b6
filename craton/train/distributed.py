"""One process or many: under torchrun the network is sharded with FSDP2 over a DeviceMesh; alone, nothing is done."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from craton.model.decoder import Decoder
from craton.train import machine


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
            self.mesh = init_device_mesh(device, (self.world,), mesh_dim_names=("shard",))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shard(self, network: Decoder, bf16: bool) -> None:
        """FSDP2: each block, then the rest; parameters become DTensors. It averages gradients over processes; batch
        weights sum to 1 over all of them, so the loop multiplies the loss by their number (`gradients`)."""
        if self.mesh is None:
            return
        policy = (
            MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            if bf16 and self.device == "cuda"
            else MixedPrecisionPolicy()
        )
        for block in network.model.layers:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fully_shard(network, mesh=self.mesh, mp_policy=policy)
        register_fsdp_forward_method(network, "weighted_nll")

    def sum(self, values: Tensor) -> Tensor:
        if self.mesh is not None:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def agree(self, value: Any) -> Any:
        """The first process's value, on all."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()

    def close(self) -> None:
        if self.mesh is not None:
            dist.destroy_process_group()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors gathered, one after another, onto the CPU. Collective."""
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().cpu() for k, v in tensors.items()}


def norm(parameters: list[nn.Parameter], limit: float) -> float:
    """Global gradient norm, summed in fp64 so that it does not depend on how parameters are sharded; gradients are
    scaled down to `limit` where it is above (0: never). Collective."""
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads]).sum()
    if dist.is_initialized():
        dist.all_reduce(squares)
    total = float(squares.sqrt())
    if limit and total > limit:
        torch._foreach_mul_(grads, limit / total)
    return total
