"""A released folder: a card that says what is known, nothing that names the user's folders, and it opens elsewhere."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import craton as package
from craton.base import UserError
from craton.report import release as module
from craton.report.release import release
from tests.conftest import craton


def test_the_folder_and_its_card(model_folder, tmp_path):
    out = tmp_path / "mine"
    result = release(model_folder, out, gguf=True, push=None)
    assert set(result["files"]) >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "mine.gguf"}
    assert "training" not in result["files"] and "metrics.jsonl" not in result["files"]
    card = (out / "README.md").read_text()
    for words in ("base model", "bits per byte", "nothing was looked for", "not stated", "Intended use", "| json |"):
        assert words in card, words
    for path in (out / "README.md", out / "record.json"):
        assert str(model_folder.parent) not in path.read_text() and "/lib/python" not in path.read_text()
    assert card.startswith("---\nlicense: other\n") and "Energy:" in card
    theirs = AutoModelForCausalLM.from_pretrained(out).generate(
        AutoTokenizer.from_pretrained(out)("import os", return_tensors="pt").input_ids,
        max_new_tokens=8,
        do_sample=False,
    )
    assert theirs.shape[1] > 3
    assert package.load(str(out / "mine.gguf")).generate("import os", 8, 0.0) == package.load(str(out)).generate(
        "import os", 8, 0.0
    )
    assert "in transformers: the same tokens" in result["checks"][0]
    with pytest.raises(UserError, match="in use"):
        release(model_folder, out, gguf=False, push=None)


def test_licences_and_evaluation_files_are_named(model_folder, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(model_folder, source)
    record = json.loads((source / "record.json").read_text())
    for s in record["corpora"][0]["sources"]:
        s["license"] = ["Apache-2.0"]
    record["corpora"][0]["evaluation"] = {"items": 900, "too_short": 4, "files": ["hellaswag.jsonl"]}
    (source / "record.json").write_text(json.dumps(record))
    release(source, tmp_path / "out", gguf=False, push=None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "900 items of hellaswag.jsonl" in card and "not stated" not in card


def test_licences_are_words(model_folder, tmp_path):
    from craton.report.card import _front

    def front(*names):
        return _front({"corpora": [{"sources": [{"documents": 1, "license": list(names)}]}]}).splitlines()[1]

    assert front("MIT License") == "license: mit" and front("Apache 2.0") == "license: apache-2.0"
    for other in ("Use permitted for research only", "All rights reserved, limited use", "AGPL-3.0", "LGPL-3.0", ""):
        assert front(other) == "license: other"
    assert front("MIT", "not stated") == "license: other"


def test_sources_of_one_name_stay_apart(model_folder, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(model_folder, source)
    record = json.loads((source / "record.json").read_text())
    one = record["corpora"][0]["sources"][0]
    names = ["/home/me/a/train.jsonl", "/home/me/b/train.jsonl", "ORG/data"]
    record["corpora"][0]["sources"] = [one | {"name": n} for n in names]
    record["by_source"] = {names[0]: 1.0, names[1]: 2.0}
    (source / "record.json").write_text(json.dumps(record))
    release(source, tmp_path / "out", gguf=False, push=None)
    kept = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [s["name"] for s in kept["corpora"][0]["sources"]] == ["train.jsonl", "train.jsonl (2)", "ORG/data"]
    assert kept["by_source"] == {"train.jsonl": 1.0, "train.jsonl (2)": 2.0}


def test_a_model_without_a_record_says_so(model_folder, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(model_folder, source)
    (source / "record.json").unlink()
    done = craton("release", source, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0 and "WARNING  the model has no record" in done.stderr
    assert "nothing is known here of its data" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads(done.stdout)["pushed"] is None


def test_a_damaged_folder_is_not_released(model_folder, tmp_path, monkeypatch):
    source = tmp_path / "m"
    shutil.copytree(model_folder, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    real = module.load_model

    def other(path):
        model = real(path)
        model.network.model.norm.weight.data *= 1.5
        return model

    monkeypatch.setattr(module, "load_model", other)
    with pytest.raises(UserError, match="transformers computes other logits"):
        release(source, tmp_path / "out", gguf=False, push=None)
    assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(UserError, match="no model folder"):
        release(tmp_path, tmp_path / "o2", gguf=False, push=None)


def test_pushing(model_folder, tmp_path, monkeypatch):
    import huggingface_hub

    called = []

    class Api:
        def create_repo(self, name, **more):
            called.append((name, more))
            return f"https://hub.example/{name}"

        def upload_folder(self, **more):
            called.append(more)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(UserError, match="ORG/NAME"):
        release(model_folder, tmp_path / "a", gguf=False, push="name")
    result = release(model_folder, tmp_path / "b", gguf=False, push="me/model")
    assert result["pushed"] == "https://hub.example/me/model"
    assert called[0] == ("me/model", {"private": True, "exist_ok": True}) and called[1]["folder_path"] == tmp_path / "b"
