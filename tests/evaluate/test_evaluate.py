"""Scores that can be trusted: the same as another implementation gives, item by item, kept, resumed, refused."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from craton.base import UserError
from craton.engine import score
from craton.evaluate.contamination import contaminated
from craton.evaluate.run import Settings, evaluate
from craton.evaluate.statistics import calibration, interval, paired, wilson
from craton.evaluate.store import Store
from craton.tasks.find import find_task, find_tasks
from tests.conftest import craton

WORDS = "import return class self value json email logging name error for x in range def None True".split()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is kept between tests."""
    monkeypatch.setenv("CRATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_file(path: Path, n: int = 24) -> Path:
    """Choices and completions of words that the tiny model has seen."""
    import random

    r = random.Random(0)
    rows = []
    for i in range(n):
        words = [" ".join(r.choices(WORDS, k=r.randint(1, 4))) for _ in range(4)]
        rows.append({"query": " ".join(r.choices(WORDS, k=r.randint(1, 12))), "choices": words, "gold": i % 4})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_of(results, task):
    model = next(iter(results["models"].values()))
    return [json.loads(line) for line in Path(model["tasks"][task]["samples"]).read_text().splitlines()]


def test_same_as_transformers(model_folder, tmp_path):
    """Log-likelihoods of every choice, by another implementation, from the samples alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows_file(tmp_path / "rows.jsonl")
    text = [
        {"context": "def f(self):\n    return", "continuation": "self.value"},
        {"context": "import", "continuation": "json"},
    ]
    (tmp_path / "ends.jsonl").write_text("".join(json.dumps(r) + "\n" for r in text))
    tasks = find_tasks(f"choose={tmp_path / 'rows.jsonl'},ends={tmp_path / 'ends.jsonl'}")
    results = evaluate([str(model_folder)], tasks, Settings(shots=1), tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for task in ("choose", "ends"):
        facts = next(iter(results["models"].values()))["tasks"][task]
        scores = []
        for s in samples_of(results, task):
            values, lengths = [], []
            for choice in s["choices"]:
                context, whole = tokenizer(s["prompt"]).input_ids, tokenizer(s["prompt"] + choice).input_ids
                with torch.no_grad():
                    logp = network(torch.tensor([whole])).logits[0].log_softmax(-1)
                picked = [logp[i - 1, whole[i]].item() for i in range(len(context), len(whole))]
                values.append(sum(picked))
                lengths.append(len(choice.strip()))
                greedy = all(logp[i - 1].argmax() == whole[i] for i in range(len(context), len(whole)))
            assert s["loglikelihoods"] == pytest.approx(values, rel=1e-4)
            if task == "choose":
                pick = max(range(4), key=values.__getitem__)
                assert s["answer"] == pick and s["score"] == float(pick == s["target"])
                best = max(range(4), key=lambda i: values[i] / lengths[i])
                scores.append(float(best == s["target"]))
            else:
                assert s["score"] == float(greedy)
        if task == "choose":
            assert facts["metrics"]["acc_norm"] == pytest.approx(sum(scores) / len(scores))
        assert facts["value"] == pytest.approx(sum(s["score"] for s in samples_of(results, task)) / facts["n"])
        assert facts["interval"][0] <= facts["value"] <= facts["interval"][1] and facts["shots"] == 1


def test_trees_of_prefixes(model_folder):
    """What is shared is computed once, and whatever is shared the numbers are the same."""
    import random

    from craton.engine.model import load_model

    model = load_model(str(model_folder))
    r = random.Random(1)
    stem = [r.randrange(200) for _ in range(40)]
    pairs = []
    for _ in range(40):
        context = stem[: r.randint(1, 40)] + [r.randrange(200) for _ in range(r.randint(0, 6))]
        pairs.append((context, [r.randrange(200) for _ in range(r.randint(1, 5))]))
    pairs += [pairs[0], (stem, pairs[1][1])]
    seen = []
    found = dict(score.loglikelihoods(model.engine.runner.modules(), pairs, lambda done, of: seen.append((done, of))))
    expected = model.engine.loglikelihood(pairs)
    for i, (total, greedy) in enumerate(expected):
        assert found[i].total == pytest.approx(total, rel=1e-4, abs=1e-5) and found[i].greedy == greedy
    assert seen[-1][0] == seen[-1][1] < sum(len(a) + len(b) - 1 for a, b in pairs) / 2
    whole, _ = score.build_tree([[*a, *b[:-1]] for a, b in pairs])
    assert sum(len(run.tokens) for run in score._depth_first(whole)) == seen[-1][1]


def test_long_runs_are_cut(model_folder, monkeypatch):
    """Batches smaller than a prompt give the same."""
    from craton.engine.model import load_model

    network = load_model(str(model_folder)).engine.runner.modules()
    pairs = [(list(range(5, 95)), [7, 8]), (list(range(5, 95)), [9]), (list(range(5, 50)), [1, 2, 3])]
    once = dict(score.loglikelihoods(network, pairs))
    monkeypatch.setattr(score, "_BATCH_TOKENS", 64)
    monkeypatch.setattr(score, "_LOGIT_BYTES", 4 * 1024 * 2)
    cut = dict(score.loglikelihoods(network, pairs))
    for i in once:
        assert cut[i].total == pytest.approx(once[i].total, rel=1e-5)


def test_kept_and_resumed(model_folder, tmp_path):
    """A rerun computes nothing; a killed run goes on; another model, or another setting, is another matter."""
    rows_file(tmp_path / "rows.jsonl")
    text = f"choose={tmp_path / 'rows.jsonl'},addition=2"
    first = evaluate([str(model_folder)], find_tasks(text), Settings(limit=10), tmp_path / "out")
    calls = []
    real = score.loglikelihoods

    def counted(*args):
        calls.append(len(args[1]))
        return real(*args)

    from craton.evaluate import models

    models.loglikelihoods, before = counted, models.loglikelihoods
    try:
        again = evaluate([str(model_folder)], find_tasks(text), Settings(limit=10), tmp_path / "out")
        assert calls == [] and again["models"] == first["models"]
        evaluate([str(model_folder)], find_tasks(text), Settings(limit=12), tmp_path / "out")
        assert calls == [2 * 4]
        evaluate([str(model_folder)], find_tasks(text), Settings(limit=10, shots=1), tmp_path / "out")
        assert len(calls) == 2
    finally:
        models.loglikelihoods = before


def test_a_killed_run_loses_little(model_folder, tmp_path, cache):
    """What was computed before a SIGKILL is there after it."""
    rows_file(tmp_path / "rows.jsonl", 400)
    command = [sys.executable, "-m", "craton", "eval", str(model_folder), "--tasks", f"c={tmp_path / 'rows.jsonl'}"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], env={**os.environ, "CRATON_CACHE": str(cache)}
    )
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if (cache / "evaluations.sqlite").exists() and Store().db.execute("SELECT count(*) FROM seen").fetchone()[
            0
        ] > 50:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = craton(*command[3:], "--out", tmp_path / "out", "--json", env={**os.environ, "CRATON_CACHE": str(cache)})
    assert done.returncode == 0, done.stderr
    assert next(iter(json.loads(done.stdout)["models"].values()))["tasks"]["c"]["n"] == 400


def test_page_and_folder(model_folder, tmp_path):
    """Two models side by side, one page, nothing from elsewhere; a folder that holds other things is refused."""
    from craton.report.evaluation import write_evaluation

    other = tmp_path / "other"
    subprocess.run(["cp", "-r", model_folder, other], check=True)
    weights = next(other.glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    save_file({k: v + 0.2 * torch.randn_like(v) if v.ndim > 1 else v for k, v in tensors.items()}, weights)
    rows_file(tmp_path / "rows.jsonl")
    results = evaluate(
        [str(model_folder), str(other)],
        find_tasks(f"c={tmp_path / 'rows.jsonl'},addition=2"),
        Settings(limit=12),
        tmp_path / "out",
    )
    page = write_evaluation(tmp_path / "out").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and '<td class="name">other</td>' in page
    assert [d["task"] for d in results["differences"]] == ["c", "addition=2"]
    assert results["differences"][0]["p"] <= 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="in use, and not by an evaluation"):
        evaluate([str(model_folder)], find_tasks("addition=2"), Settings(limit=2), tmp_path / "mine")


def test_shots_that_do_not_fit(model_folder, tmp_path):
    """How many would is said, and nothing is written."""
    rows = [{"question": " ".join(WORDS), "answer": "x"} for _ in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = find_task(f"t={tmp_path / 'rows.jsonl'}")
    with pytest.raises(UserError, match=r"30 shots and item .* are \d+ tokens.*context is 1024; \d+ would fit"):
        evaluate([str(model_folder)], [task], Settings(shots=30), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    long = [{"query": " ".join(WORDS * 100), "choices": ["a", "b"], "gold": 0}]
    (tmp_path / "long.jsonl").write_text(json.dumps(long[0]) + "\n")
    found = evaluate([str(model_folder)], [find_task(f"l={tmp_path / 'long.jsonl'}")], Settings(), tmp_path / "out")
    assert "1 items are longer than the context" in next(iter(found["models"].values()))["tasks"]["l"]["warnings"][0]


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["nowhere", "--tasks", "addition"], "nowhere: no such model"),
        (["{model}", "--tasks", "addittion"], "did you mean 'addition'"),
        (["{model}", "--tasks", "addition", "--limit", "0"], "--limit is 0"),
        (["{model}", "--tasks", "addition", "--chat"], "has no chat template"),
        (["openai:gpt", "--tasks", "addition"], "set OPENAI_API_KEY"),
        (["http://127.0.0.1:9#m", "--tasks", "addition"], "no answer"),
        (["http://127.0.0.1:9", "--tasks", "addition"], "which of the server's models"),
        (["{model}", "--tasks", "addition", "--corpus", "nowhere"], "no corpus"),
    ],
)
def test_bad_input(model_folder, arguments, problem, tmp_path):
    """One line, exit code 2, nothing written."""
    given = [a.replace("{model}", str(model_folder)) for a in arguments]
    environment = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}
    done = craton("eval", *given, "--out", tmp_path / "out", env=environment)
    assert done.returncode == 2 and problem in done.stderr.replace("\n", " "), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_checkpoints_are_models(model_folder, tmp_path):
    """The last checkpoint of a run scores as the folder that it left."""
    last = sorted((model_folder / "training").glob("step-*"))[-1]
    found = evaluate([str(model_folder), str(last)], find_tasks("canaries"), Settings(limit=6), tmp_path / "out")
    a, b = (Path(m["tasks"]["canaries"]["samples"]).read_text().splitlines() for m in found["models"].values())
    for x, y in zip(map(json.loads, a), map(json.loads, b), strict=True):
        assert x["loglikelihoods"] == pytest.approx(y["loglikelihoods"], rel=1e-5)


class Server(ThreadingHTTPServer):
    """A server that answers what it is told to; keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}#m"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body, dict(self.headers)))
        status, value = self.server.answer(self.path, body, len(self.server.asked))
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def said(text):
    return 200, {
        "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }


def test_remote_models(tmp_path, monkeypatch):
    """Answers through the chat API, tried again where that helps, and kept."""
    monkeypatch.setenv("CRATON_API_KEY", "secret")

    def answer(path, body, number):
        if number == 1:
            return 429, {"error": {"message": "slow down"}}
        a, b = map(int, body["messages"][-1]["content"].rstrip("=").split("+"))
        return said(str(a + b))

    server = Server(answer)
    monkeypatch.setattr("craton.engine.remote.time.sleep", lambda s: None)
    found = evaluate([server.url], find_tasks("addition=2"), Settings(limit=5), tmp_path / "out")
    facts = found["models"][server.url]["tasks"]["addition=2"]
    assert facts["value"] == 1.0 and facts["chat"] and len(server.asked) == 6
    assert all(headers["authorization"] == "Bearer secret" for _, _, headers in server.asked)
    evaluate([server.url], find_tasks("addition=2"), Settings(limit=5), tmp_path / "out")
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    "rubbish", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": 3}]}', b"", b"\xff"]
)
def test_rubbish_is_refused(rubbish, tmp_path):
    """An endpoint that answers what is no answer: one line, nothing written."""
    server = Server(lambda *_: (200, rubbish))
    with pytest.raises(UserError, match="answered") as error:
        evaluate([server.url], find_tasks("addition=2"), Settings(limit=2), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_servers_that_score_nothing(tmp_path):
    """Named, with what to do instead."""
    rows_file(tmp_path / "rows.jsonl")
    for answer in (
        (404, {"error": {"message": "no such path"}}),
        (200, {"choices": [{"index": 0, "text": "x", "logprobs": None}]}),
    ):
        server = Server(lambda *_, answer=answer: answer)
        with pytest.raises(UserError, match="cannot score given texts") as error:
            evaluate([server.url], find_tasks(f"c={tmp_path / 'rows.jsonl'}"), Settings(limit=2), tmp_path / "out")
        assert error.value.code == "no_likelihoods"


def test_keys_stay_at_home(monkeypatch):
    """Each key goes to its own host."""
    from craton.engine.remote import Client, key_for, open_client

    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "MISTRAL_API_KEY", "DEEPSEEK_API_KEY"):
        monkeypatch.setenv(name, name.lower())
    monkeypatch.delenv("CRATON_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert open_client("anthropic:x").http.headers["x-api-key"] == "anthropic_api_key"
    assert open_client("gemini:x").http.headers["x-goog-api-key"] == "gemini_api_key"
    assert open_client("mistral:x").http.headers["authorization"] == "Bearer mistral_api_key"
    assert key_for("https://elsewhere.example/v1") == "" and key_for("https://api.openai.com.evil.example/v1") == ""
    assert "authorization" not in Client("https://elsewhere.example/v1", "m").http.headers


def test_dialects(monkeypatch):
    """Anthropic's and Gemini's shapes, there and back."""
    from craton.engine.remote import Client, _chat_body, _chat_reply

    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    path, body = _chat_body(Client("https://x/v1", "m", "anthropic"), messages, {"max_tokens": 5, "stop": ["\n", "x"]})
    assert (
        path == "/messages" and body["system"] == "s" and body["stop_sequences"] == ["x"] and len(body["messages"]) == 2
    )
    path, body = _chat_body(Client("https://x/v1", "m", "gemini"), messages, {"max_tokens": 5, "temperature": 0.0})
    assert path == "/models/m:generateContent" and body["contents"][1]["role"] == "model"
    assert body["generationConfig"] == {"maxOutputTokens": 5, "temperature": 0.0}
    reply = _chat_reply["anthropic"](
        {"content": [{"type": "text", "text": "hi"}], "stop_reason": "max_tokens", "usage": {"output_tokens": 2}}
    )
    assert (reply.text, reply.finish, reply.completion_tokens) == ("hi", "length", 2)
    reply = _chat_reply["gemini"]({"candidates": [{"content": {"parts": [{"text": "hi"}]}, "finishReason": "STOP"}]})
    assert (reply.text, reply.finish) == ("hi", "stop")


def test_contamination(corpus, tmp_path):
    """Items that stand in the corpus are found, others are not."""
    from craton.corpus.store import Corpus

    c = Corpus(corpus)
    seen = c.tokenizer.decode(c.read("train", 200, 120).tolist())
    rows = [
        {"query": seen, "choices": ["a", "b"], "gold": 0},
        {"query": "Nobody ever wrote " * 9, "choices": ["a", "b"], "gold": 0},
    ]
    rows += [{"query": "short", "choices": ["a", "b"], "gold": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = find_task(f"t={tmp_path / 'rows.jsonl'}")
    found = contaminated(task, task.items(), [corpus], Store())
    assert found["items"] == [0] and found["too_short"] == 1 and found["share"] == 0.5


def test_statistics():
    """Against figures that are known."""
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 20)[0] == 0.0 and wilson(0, 20)[1] == pytest.approx(0.1611252, abs=1e-6)
    assert interval([1.0, 0.0] * 50) == pytest.approx(wilson(50, 100))
    low, high = interval([0.1, 0.5, 0.9] * 40)
    assert low < 0.5 < high and high - low < 0.15
    a, b = [0.0] * 10 + [1.0] * 10, [1.0] * 9 + [0.0] * 1 + [1.0] * 9 + [0.0]
    found = paired(a, b)
    assert found["difference"] == pytest.approx(0.4) and found["p"] == pytest.approx(2 * (1 + 10) / 2**10)
    assert paired(a, a)["p"] == 1.0
    assert paired([0.1 * i for i in range(20)], [0.1 * i + 0.5 for i in range(20)])["p"] < 0.01
    sure = calibration([[0.0, -9.0]] * 10, [0] * 5 + [1] * 5)
    assert sure["ece"] == pytest.approx(0.5, abs=1e-3)
    assert calibration([[math.log(0.5), math.log(0.5)]] * 10, [0] * 5 + [1] * 5)["ece"] == pytest.approx(0.0)


@pytest.mark.slow
def test_same_as_lm_eval(model_folder, tmp_path):
    """The harness itself, on the same items: log-likelihoods, accuracy, and greedy answers."""
    lm_eval = pytest.importorskip("lm_eval")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lm_eval.models.huggingface import HFLM

    rows_file(tmp_path / "rows.jsonl")
    results = evaluate(
        [str(model_folder)], find_tasks(f"c={tmp_path / 'rows.jsonl'}"), Settings(shots=2), tmp_path / "out"
    )
    samples = samples_of(results, "c")
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    task = {
        "task": "c", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "same.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "target_delimiter": "",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{target}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    lm = HFLM(pretrained=str(model_folder), dtype="float32", device="cpu", batch_size=4)
    found = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, log_samples=True)
    assert found["results"]["c"]["acc,none"] == pytest.approx(
        next(iter(results["models"].values()))["tasks"]["c"]["metrics"]["acc"]
    )
    for ours, theirs in zip(samples, sorted(found["samples"]["c"], key=lambda s: s["doc_id"]), strict=True):
        assert ours["loglikelihoods"] == pytest.approx([r[0] for r in theirs["filtered_resps"]], rel=1e-4)
