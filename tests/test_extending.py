"""docs/extending.md does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"


def block(title: str) -> str:
    """The example under a heading."""
    section = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    code = re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S)
    assert len(code) == 1
    return code[0]


def run(code: str) -> dict:
    space = {"__name__": "example"}
    exec(compile(code, str(PAGE), "exec"), space)
    return space


def test_every_block_is_run_here():
    titles = re.findall(r"^## (.*)$", PAGE.read_text(), re.M)
    assert titles == ["A family", "A job", "A task", "An operation on a device", "An endpoint"]


def test_a_family(tmp_path, monkeypatch):
    from craton.weights import folder

    transformers = pytest.importorskip("transformers")
    monkeypatch.setitem(folder.FAMILIES, "seed_oss", run(block("A family"))["FAMILY"])
    config = transformers.SeedOssConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    theirs = transformers.SeedOssForCausalLM(config).eval()
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    theirs.save_pretrained(tmp_path / "m")
    ours = folder.load_network(tmp_path / "m")
    ids = torch.randint(300, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    folder.write_network(tmp_path / "again", ours)
    assert folder.read_config(tmp_path / "again") == ours.config
    raw = (tmp_path / "m" / "config.json").read_text().replace('"mlp_bias"', '"mlp_bais"')
    (tmp_path / "m" / "config.json").write_text(raw)
    with pytest.raises(folder.UserError, match="mlp_bais is not known for seed_oss .did you mean 'mlp_bias'"):
        folder.read_config(tmp_path / "m")


def test_a_job():
    """What is shown is what test_jobs.py trains."""
    source = (Path(__file__).parent / "train" / "preference.py").read_text()
    for function in block("A job").strip().split("\n\n\n"):
        assert function in source
    assert len(source.splitlines()) < 100


def test_an_operation_on_a_device():
    """In a process of its own: what is registered stays."""
    check = """
x = torch.randn(33, 7)
x[0, 0] = float("nan")
for dtype in (torch.float32, torch.float64):
    a = x.detach().clone().to(dtype).requires_grad_()
    y = torch.ops.craton.relu_squared(a)
    y[1:].sum().backward()
    wanted = x.to(dtype).relu().square()
    torch.testing.assert_close(y.detach(), wanted, equal_nan=True)
    torch.testing.assert_close(a.grad[1:], 2 * x[1:].to(dtype).relu())
with torch.no_grad():
    torch.testing.assert_close(torch.ops.craton.relu_squared(x), x.relu().square(), equal_nan=True)
assert torch.ops.craton.relu_squared(torch.empty(2, 3, device="meta")).shape == (2, 3)
print("held")
"""
    code = "import craton.model.ops\n" + block("An operation on a device") + check
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "held\n", done.stderr


def test_an_endpoint(model_folder):
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    from craton.serve import app as serve_app
    from craton.serve.guard import Settings
    from craton.serve.metrics import Metrics
    from craton.serve.reply import State
    from craton.serve.served import open_served

    space = run(block("An endpoint"))
    models = {}
    metrics = Metrics(models)
    models["m"] = open_served("m", str(model_folder), 60.0, 100, metrics.observe)
    state = State(models, Settings(), metrics)
    app = FastAPI(lifespan=serve_app._lifespan)
    app.state.craton = state
    app.include_router(space["routes"](state))
    serve_app._handle_errors(app, [])
    with TestClient(app) as client:
        whole = client.post("/ask", json={"text": "import os", "max_tokens": 8})
        assert whole.status_code == 200 and whole.json()["answer"].strip()
        assert client.post("/ask", json={"text": "x", "model": "other"}).status_code == 404
        wrong = client.post("/ask", json={"text": "x", "max_tokens": -1})
        assert wrong.status_code == 400 and "max_tokens" in wrong.json()["error"]["message"]


def test_a_task(model_folder, tmp_path, monkeypatch):
    from craton.evaluate.run import Settings, evaluate

    monkeypatch.setenv("CRATON_CACHE", str(tmp_path / "cache"))
    space = run(block("A task"))
    assert space["rows"](0, 5) == space["rows"](0, 9)[:5]
    found = evaluate([str(model_folder)], [space["TASK"]], Settings(limit=20), tmp_path / "out")
    facts = found["models"][str(model_folder)]["tasks"]["longest"]
    assert facts["n"] == 20 and facts["shots"] == 2 and facts["interval"][0] <= facts["value"] <= facts["interval"][1]
