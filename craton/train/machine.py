"""What this machine is and can do: facts for the record, and peaks measured in a second."""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from craton import __version__
from craton.model import kernels
from craton.model.ops import matmul_t


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronise(where: str) -> None:
    """Wait for what a GPU still computes."""
    if where == "cuda":
        torch.cuda.synchronize()


def gemm_peak(where: str, dtype: torch.dtype, seconds: float = 0.6) -> float:
    """Best FLOP/s of a large matrix product, over the libraries at hand (on CPUs PyTorch's BLAS and oneDNN)."""
    n = 8192 if where == "cuda" else 1536
    a, b = torch.randn(n, n, device=where, dtype=dtype), torch.randn(n, n, device=where, dtype=dtype)
    best = 0.0
    for product in {matmul_t, lambda x, y: x @ y.t()}:
        end = time.perf_counter() + seconds / 2
        while time.perf_counter() < end:
            synchronise(where)
            start = time.perf_counter()
            product(a, b)
            synchronise(where)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def facts(where: str) -> dict[str, Any]:
    """For the record: versions, processor, threads. Nothing that names the user or the host."""
    cpu = kernels.cpu_facts()
    out: dict[str, Any] = {
        "craton": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu.get("model name", platform.processor()),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if where == "cuda" else "cpu",
    }
    if where == "cpu":
        out["products"] = "oneDNN" if kernels.prefer_onednn() else "PyTorch BLAS"
        out["kernels"] = kernels.training_kernels() is not None
    return out


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
        return done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def energy_joules() -> float | None:
    """Energy counter of the processors (RAPL), or None where it cannot be read. It wraps after hours."""
    try:
        return sum(int(p.read_text()) for p in Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj")) / 1e6 or None
    except (OSError, ValueError):
        return None


def world() -> tuple[int, int]:
    """(rank, processes) as torchrun tells them; (0, 1) alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def process_began() -> float:
    """When this process started, as time.monotonic() counts; now where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        age = 0.0
    return time.monotonic() - age
