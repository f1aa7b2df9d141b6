"""Commands as a person or a script runs them."""

import json
import subprocess
import sys
import time

import pytest

import craton as package
from craton.base import UserError
from tests.conftest import STDLIB, craton


def last(done):
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_help_is_quick_and_imports_nothing_heavy():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert b"corpus" in subprocess.check_output([sys.executable, "-m", "craton", "--help"])
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    heavy = {"torch", "numpy", "tokenizers", "matplotlib", "transformers"}
    code = f"import sys, craton.cli; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_generate(model_folder):
    first = last(craton("generate", model_folder, "import os", "--max-tokens", 12, "--seed", 3, "--json"))
    again = last(craton("generate", model_folder, "import os", "--max-tokens", 12, "--seed", 3, "--json"))
    assert first == again and set(first) == {"text", "token_ids"} and 1 <= len(first["token_ids"]) <= 12
    model = package.load(str(model_folder))
    assert model.generate("import os", max_tokens=12, temperature=0.8, seed=3) == first["text"]
    assert model.tokenizer.decode(first["token_ids"]) == first["text"]
    plain = craton("generate", model_folder, "import os", "--max-tokens", 12, "--seed", 3)
    assert plain.stdout.startswith("import os" + first["text"][:4])


def test_generate_refuses_bad_input(model_folder, tmp_path):
    for args, message in (
        ((tmp_path / "absent", "x"), "no such model folder"),
        ((model_folder, "word " * 5000), "context is 1024"),
        ((model_folder, "x", "--max-tokens", 0), "at least 1"),
        ((model_folder, "x", "--temperature", -1), "from 0 to"),
    ):
        done = craton("generate", *args)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_foreign_tokenizer_is_refused(model_folder, tmp_path):
    import shutil

    from craton.text.tokenizer import train_tokenizer

    shutil.copytree(model_folder, tmp_path / "m")
    train_tokenizer([p.read_text() for p in STDLIB.glob("*.py")], 2000).save(tmp_path / "m")
    with pytest.raises(UserError, match="the tokenizer has"):
        package.load(str(tmp_path / "m"))


def test_chat(model_folder):
    done = craton("chat", model_folder, "--max-tokens", 8, "--json", input="import\nos\n")
    messages = last(done)["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and "only pretrained" in done.stderr


def test_corpus_show_and_trace(corpus, model_folder):
    shown = craton("corpus", "show", corpus, "--json")
    assert last(shown)["counts"]["documents"] > 30 and "dropped" in shown.stderr
    traced = last(craton("corpus", "trace", model_folder, "--step", 5, "--json"))
    assert traced["batch"] == 4 and sum(d["tokens"] for d in traced["documents"]) == 4 * 129
    assert craton("corpus", "trace", model_folder, "--step", 999).returncode == 2


def test_report(model_folder, tmp_path):
    made = last(craton("report", model_folder, "--json"))
    page = (model_folder / "report.html").read_text()
    assert made["report"].endswith("report.html")
    assert (
        page.count("<svg") == 5
        and "src=" not in page
        and "bits per byte" in page
        and "http"
        not in page.replace("http://www.w3.org", "")
        .replace("http://purl.org", "")
        .replace("http://creativecommons.org", "")
        .replace("https://matplotlib.org", "")
    )
    assert craton("report", tmp_path).returncode == 2


def test_demo(tmp_path):
    result = last(craton("demo", "--out", tmp_path / "demo", "--budget", "20s", "--json"))
    assert result["status"] == "finished" and (tmp_path / "demo" / "report.html").exists()
    assert any(s["text"].strip() for s in result["samples"])
    assert craton("demo", "--out", tmp_path / "demo").returncode == 2


def test_generate_takes_all_of_sampling_and_stdin(model_folder):
    flags = ("--max-tokens", 12, "--seed", 3, "--json")
    typed = last(craton("generate", model_folder, "import os", *flags))
    assert last(craton("generate", model_folder, *flags, input="import os")) == typed
    assert last(craton("generate", model_folder, "-", *flags, input="import os")) == typed
    greedy = last(craton("generate", model_folder, "import os", "--top-k", 1, "--temperature", 2, *flags))
    assert greedy == last(craton("generate", model_folder, "import os", "--top-p", 1e-9, *flags))
    stop = typed["text"].strip()[:1]
    cut = last(craton("generate", model_folder, "import os", "--stop", stop, *flags))
    assert stop not in cut["text"] and typed["text"].startswith(cut["text"])
    several = last(craton("generate", model_folder, "import os", "-n", 3, "--temperature", 1, *flags))["answers"]
    assert len(several) == 3 and len({a["text"] for a in several}) > 1
    refused = craton("generate", model_folder, "x", "--system", "be brief")
    assert refused.returncode == 2 and "for models that chat" in refused.stderr
    assert craton("generate", model_folder, input="").returncode == 2


def test_every_command_shows_examples():
    from craton.cli import app, corpus_app

    for group in (app, corpus_app):
        for command in group.registered_commands:
            assert "\n    craton " in (command.callback.__doc__ or ""), command.callback.__name__


def test_chat_commands_that_fail_cost_nothing(model_folder, tmp_path):
    out = tmp_path / "talk.json"
    lines = f"import\n/save {tmp_path}/absent/x.json\n/save {out}\n/save {out}\n/bye\nnever\n"
    done = craton("chat", model_folder, "--max-tokens", 4, input=lines)
    assert done.returncode == 2 and "absent: no such folder" in done.stdout and "Traceback" not in done.stderr
    assert [m["role"] for m in json.loads(out.read_text())["messages"]] == ["user", "assistant"]
    again = craton("chat", model_folder, "--max-tokens", 4, input=f"import\n/save {out}\n")
    assert "is there already" in again.stdout


def test_a_base_model_has_no_chat_template(model_folder, tmp_path):
    from craton.engine.converse import open_talker

    assert "chat_template" not in json.loads((model_folder / "tokenizer_config.json").read_text())
    config = json.loads((model_folder / "tokenizer_config.json").read_text())
    old = tmp_path / "old"
    import shutil

    shutil.copytree(model_folder, old)  # as versions before made them
    (old / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages[0].content }}"}))
    assert craton("export", old, "--gguf", tmp_path / "old.gguf").returncode == 0
    for path in (model_folder, old, tmp_path / "old.gguf"):
        assert open_talker("m", str(path)).pretrained_only
