"""The compiled CPU kernels, one object per instruction set. Optional: without a compiler craton runs on plain PyTorch.

No OpenMP runtime is linked; see craton/model/kernels.cpp (training) and serve.cpp (the engine).
"""

import platform

from setuptools import Extension, setup

FLAGS = ["-O3", "-std=c++17", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi"]
TRAINING = {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}
SERVING = {**TRAINING, "v3vnni": ["-march=x86-64-v3", "-mavxvnni"], "v4vnni": ["-march=x86-64-v4", "-mavx512vnni"]}
HERE = platform.machine() in ("x86_64", "AMD64") and platform.system() == "Linux"

setup(
    ext_modules=[
        Extension(
            f"craton.model._{name}_{level}",
            [f"craton/model/{name}.cpp"],
            depends=["craton/model/simd.h"],
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for name, levels in (("kernels", TRAINING), ("serve", SERVING))
        for level, flags in levels.items()
        if HERE
    ]
)
