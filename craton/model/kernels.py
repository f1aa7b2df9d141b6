"""Load the compiled kernels (training.cpp, decode.cpp) for this CPU, or say once that they are missing.

Everything works without them: the operations then run as plain PyTorch, two to three times slower on a CPU.
"""

import ctypes
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from craton.base import processors

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_TRAINING = {
    "add_rms_norm_forward": [_P] * 6 + [_I, _I, _F],
    "rms_norm_backward": [_P] * 7 + [_I, _I],
    "split_norm_rope_forward": [_P] * 9 + [_I] * 5 + [_F],
    "split_norm_rope_backward": [_P] * 12 + [_I] * 5,
    "swiglu_forward": [_P] * 2 + [_I, _I],
    "swiglu_backward": [_P] * 3 + [_I, _I],
    "cross_entropy": [_P] * 4 + [_I, _I],
    "attention_forward": [_P] * 6 + [_I] * 5 + [_F],
    "attention_backward": [_P] * 10 + [_I] * 5 + [_F],
}
_ENGINE = {
    "craton_workspace": [_P, _I, _I],
    "craton_step": [_P, _P, _P, _I, _P, _P, _P, _P, _I],
    "craton_linear": [_P, _P, _I, _P, _I],
    "craton_attention": [_P] * 8 + [_I],
    "craton_choose": [_P, _I, _I] + [_P] * 6 + [_I],
    "craton_packed_bytes": [_I] * 3,
    "craton_pack": [_I, _P, _I, _I, _P, _I],
    "craton_rows": [_P, _P, _I, _P, _I],
    "craton_advise": [_P, _I],
}
_SIZES = ("craton_workspace", "craton_packed_bytes")  # which return one


@lru_cache
def cpu_facts() -> dict[str, str]:
    """First processor's fields of /proc/cpuinfo; empty where there is no such file."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    rows = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in rows}


def _open(name: str, levels: list[str], signatures: dict[str, Any], missing: str) -> ctypes.CDLL | None:
    """The compiled object of the best of these instruction sets, or None, after saying what that means."""
    found = sorted(Path(__file__).parent.glob(f"_{name}_{levels[0]}.*so")) if levels else []
    if not found:
        print(f"craton: {missing}; install a C++ compiler and reinstall craton to have them", file=sys.stderr)
        return None
    library = ctypes.CDLL(str(found[0]))
    for function, arguments in signatures.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = _I if function in _SIZES else None
    return library


def _levels(vnni: bool) -> list[str]:
    """Names of the compiled variants that this CPU runs, the best first; vnni: also those with integer products."""
    flags = set(cpu_facts().get("flags", "").split())
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags
    narrow = {"avx2", "fma", "f16c"} <= flags
    names = (
        ("v4vnni", vnni and wide and "avx512_vnni" in flags),
        ("v4", wide),
        ("v3vnni", vnni and narrow and "avx_vnni" in flags),
        ("v3", narrow),
    )
    return [name for name, runs in names if runs]


@lru_cache
def training_kernels() -> Any:
    """The training kernels, or None (no compiler at installation, or another CPU), which is said once."""
    missing = "compiled CPU kernels not found, using plain PyTorch (slower)"
    return _open("training", _levels(False), _TRAINING, missing)


@lru_cache
def engine_kernels() -> Any:
    """The engine's kernels, or None, which is said once."""
    missing = (
        "compiled CPU kernels of the engine not found, using plain PyTorch (several times slower, "
        "and answers may depend on what else is computed with them)"
    )
    return _open("decode", _levels(True), _ENGINE, missing)


@lru_cache
def prefer_onednn() -> bool:
    """Whether fp32 products go to oneDNN instead of the BLAS that PyTorch was built with.

    MKL uses AVX2 on processors that are not Intel's; oneDNN uses AVX-512 wherever it exists: 2.2 times the FLOP/s
    on AMD Zen 5. The rule is a fact of the processor, not a measurement, so that a resumed run computes the same bits.
    """
    facts = cpu_facts()
    return (
        torch.backends.mkldnn.is_available()
        and facts.get("vendor_id") not in (None, "GenuineIntel")
        and "avx512f" in facts.get("flags", "").split()
    )


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the kernel.

    A training step frees and allocates the same hundreds of megabytes, and fresh pages cost as much as the arithmetic
    (a head product by oneDNN here: 232 GFLOP/s before, 485 after).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def obey_limits() -> None:
    """No more threads than a container grants processors, unless OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > processors():
        torch.set_num_threads(processors())
