"""The compiled CPU kernels, one object per instruction set. Optional: without a compiler craton runs on plain PyTorch.

No OpenMP runtime is linked; see craton/model/kernels.cpp.
"""

import platform

from setuptools import Extension, setup

FLAGS = ["-O3", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp"]
LEVELS = ("v3", "v4") if platform.machine() in ("x86_64", "AMD64") and platform.system() == "Linux" else ()

setup(
    ext_modules=[
        Extension(
            f"craton.model._kernels_{level}",
            ["craton/model/kernels.cpp"],
            extra_compile_args=[*FLAGS, f"-march=x86-64-{level}"],
            optional=True,
        )
        for level in LEVELS
    ]
)
