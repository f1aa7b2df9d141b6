"""Load the compiled kernels (kernels.cpp) for this CPU, or say once that they are missing.

Everything works without them: ops.py then uses plain PyTorch, two to three times slower on a CPU.
"""

import ctypes
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
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


@lru_cache
def cpu_facts() -> dict[str, str]:
    """First processor's fields of /proc/cpuinfo; empty where there is no such file."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    rows = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in rows}


@lru_cache
def load() -> ctypes.CDLL | None:
    """The kernels for this CPU's instruction set, or None (no compiler at installation, or another CPU)."""
    flags = set(cpu_facts().get("flags", "").split())
    level = "v4" if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags else "v3" if {"avx2", "fma"} <= flags else ""
    found = sorted(Path(__file__).parent.glob(f"_kernels_{level}.*so")) if level else []
    if not found:
        print("craton: compiled CPU kernels not found, using plain PyTorch (slower); "
              "install a C++ compiler and reinstall craton to have them", file=sys.stderr)  # fmt: skip
        return None
    library = ctypes.CDLL(str(found[0]))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


_SERVING = {
    "serve_workspace": [_P, _I, _I],
    "serve_step": [_P, _P, _P, _I, _P, _P, _P, _P, _I],
    "serve_linear": [_P, _P, _I, _P, _I],
    "serve_attention": [_P] * 8 + [_I],
    "serve_pack": [_I, _P, _P, _I, _I, _P, _I],
    "serve_read": [_P, _I, _I],
    "serve_advise": [_P, _I],
}


@lru_cache
def load_serving() -> Any:
    """The engine's kernels (serve.cpp) for this CPU's instruction set, or None, which is said once."""
    flags = set(cpu_facts().get("flags", "").split())
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags
    levels = ["v4vnni"] * (wide and "avx512_vnni" in flags) + ["v4"] * wide + ["v3vnni"] * ("avx_vnni" in flags) + ["v3"] * ({"avx2", "fma", "f16c"} <= flags)
    found = sorted(Path(__file__).parent.glob(f"_serve_{levels[0]}.*so")) if levels else []
    if not found:
        print("craton: compiled CPU kernels of the engine not found, using plain PyTorch (several times slower, and answers may "
              "depend on what else is computed with them); install a C++ compiler and reinstall craton to have them", file=sys.stderr)  # fmt: skip
        return None
    library = ctypes.CDLL(str(found[0]))
    for name, arguments in _SERVING.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _I if name in ("serve_workspace", "serve_read") else None
    return library


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
    """Let glibc reuse large freed blocks instead of returning them: a training step frees and allocates the same
    hundreds of megabytes, and fresh pages from the kernel cost as much as the arithmetic (oneDNN head product here:
    232 GFLOP/s before, 485 after)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
