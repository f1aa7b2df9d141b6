"""lm-eval through the server gives the scores that the engine gives in this process."""

import json
import random

import pytest

import craton
from craton.engine.request import Sampling

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")
pytestmark = pytest.mark.slow


def tasks(folder):
    """A multiple-choice task and one of generation, from files made here."""
    r = random.Random(0)
    words = [
        "import",
        "return",
        "class",
        "self",
        "value",
        "json",
        "email",
        "logging",
        "name",
        "error",
        "for x in range",
    ]
    rows = [
        {
            "q": " ".join(r.choices(words, k=r.randint(2, 12))),
            "choices": [" " + " ".join(r.choices(words, k=r.randint(1, 4))) for _ in range(4)],
            "gold": r.randrange(4),
        }
        for _ in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    return [
        {
            "task": "choose",
            **data,
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            "task": "write",
            **data,
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
            "metric_list": [{"metric": "exact_match"}],
        },
        {
            "task": "roll",
            **data,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{q}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ]


def test_same_scores(server, model_folder, tmp_path, monkeypatch):
    from lm_eval.api.model import TemplateLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = craton.load(str(model_folder))

    class InProcess(TemplateLM):
        """The engine as lm-eval sees it, asked as local-completions asks."""

        tokenizer_name, eot_token_id = "craton", model.tokenizer.document_id

        def tok_encode(self, string, **_):
            return model.tokenizer.backend.encode(string, add_special_tokens=False).ids

        def _loglikelihood_tokens(self, requests, **_):
            return model.engine.loglikelihood([(c, t) for _, c, t in requests])

        def loglikelihood_rolling(self, requests, **_):
            out = []
            for r in requests:
                ids = self.tok_encode(r.args[0])
                out.append(model.engine.loglikelihood([([self.eot_token_id], ids)])[0][0])
            return out

        def generate_until(self, requests, **_):
            out = []
            for r in requests:
                text, how = r.args
                out.append(
                    model.engine.generate(
                        [self.tok_encode(text)], Sampling(how["max_gen_toks"], 0.0, stop=tuple(how["until"]))
                    )[0][0].text
                )
            return out

    arguments = {
        "model": "base",
        "base_url": server.url + "/v1/completions",
        "tokenizer": str(model_folder),
        "tokenized_requests": True,
        "num_concurrent": 4,
        "max_length": 128,
        "max_retries": 1,
    }
    results = []
    for lm in (InProcess(), "local-completions"):
        more = {"model_args": arguments} if isinstance(lm, str) else {}
        results.append(lm_eval.simple_evaluate(lm, tasks=tasks(tmp_path), bootstrap_iters=0, log_samples=True, **more))
    ours, served = results
    for task in ("choose", "write", "roll"):
        a, b = (sorted(r["samples"][task], key=lambda s: s["doc_id"]) for r in (ours, served))
        for x, y in zip(a, b, strict=True):
            for p, q in zip(x["filtered_resps"], y["filtered_resps"], strict=True):
                if task == "choose":
                    assert p[0] == pytest.approx(q[0], abs=1e-4) and p[1] == q[1]
                elif task == "roll":
                    assert p == pytest.approx(q, abs=1e-4)
                else:
                    assert p == q
        for name, value in ours["results"][task].items():
            if isinstance(value, float):
                assert served["results"][task][name] == pytest.approx(value, abs=1e-6), (task, name)
