"""GPU kernels compile for cards that need not be there, and fit into what those have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(("capability", "shared_kib"), [(90, 227), pytest.param(86, 99, marks=pytest.mark.slow)])
def test_kernels_fit(capability, shared_kib, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.model.compile_kernels", str(capability)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) > 30
    for name, shared, _, stack in lines:
        assert int(shared) <= shared_kib * 1024, name
        if capability == 90:
            assert int(stack) <= 128, name  # more would be a loop that goes through memory
