"""Kernels for GPUs in Triton, each with the meaning that plain.py gives it, and a decoder's steps made of them. Under
TRITON_INTERPRET=1 they run on a CPU, slowly, which is how tests hold them against that."""

try:
    from craton.model.gpu import train as train_kernels
except ImportError:  # no Triton, as on machines without a GPU
    train_kernels = None  # type: ignore[assignment]
