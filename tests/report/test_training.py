"""The report of a run: what a reader needs, in few pixels, and nothing that is not so."""

import json
import math
import shutil

import numpy as np
import pytest

from craton.corpus.build import BuildOptions, build
from craton.corpus.store import Corpus
from craton.report.page import write_report
from craton.train import explain
from craton.train.start import train
from tests.conftest import prose, small


def test_it_explains_itself(corpus, tmp_path):
    train([str(corpus)], tmp_path / "m", small(run__evaluate_every=10), command="craton train corpus --out m")
    page = (write_report(tmp_path / "m")).read_text()
    for words in (
        "Is that good?", "gzip -9", "token frequencies alone", "Ten times the budget", "How it learned to write",
        "Loss by context", "Does it recite?", "Where its parameters are", "What to do next", "1 layer of width 64",
        "made by", "differ from their defaults",
    ):  # fmt: skip
        assert words in page, words
    assert "0.01414213562" not in page and "FLOP" in page and "e+" not in page.split("<details>")[0].split("</svg>")[-1]


def test_short_contexts_and_budgets_of_compute(corpus, tmp_path):
    recipe = small(data__sequence_length=32, model__max_position_embeddings=32, run__budget="2e10flops")
    recipe.run.steps = None
    train([str(corpus)], tmp_path / "m", recipe)
    assert "What to do next" in write_report(tmp_path / "m").read_text()
    recited = json.loads((tmp_path / "m" / "record.json").read_text())["recitation"]
    assert recited["tokens"] == 16 and recited["train"]["passages"]


def test_many_sources_are_a_few_rows(tmp_path, model_folder):
    out = tmp_path / "m"
    shutil.copytree(model_folder, out)
    record = json.loads((out / "record.json").read_text())
    one = record["corpora"][0]["sources"][0]
    record["corpora"][0]["sources"] = [one | {"name": f"s{i}", "bytes": 1000 + i} for i in range(200)]
    (out / "record.json").write_text(json.dumps(record))
    page = write_report(out).read_text()
    assert "and 190 more sources" in page and "s199" in page and ">s3<" not in page


def test_records_of_before_are_still_shown(tmp_path, model_folder):
    out = tmp_path / "m"
    shutil.copytree(model_folder, out)
    record = json.loads((out / "record.json").read_text())
    for key in "references by_source by_position looks recitation forecast command planned_steps problem".split():
        record.pop(key, None)
    (out / "record.json").write_text(json.dumps(record))
    assert "Is that good?" in write_report(out).read_text()


def test_references_are_what_they_say(corpus):
    opened = Corpus(corpus)
    found = explain.references([opened])
    assert 1 < found["xz"] < 4 and 1 < found["gzip"] < 4
    ids = opened.read("heldout", 0, opened.length("heldout"))
    counts = np.bincount(opened.read("train", 0, opened.length("train")), minlength=opened.tokenizer.vocab_size) + 1
    nats = -np.log(counts / counts.sum())[ids].sum()
    assert found["unigram"] == pytest.approx(nats / math.log(2) / found["bytes"])


def test_a_model_that_knows_its_text_by_heart_is_told(tmp_path):
    """One page, read a thousand times; the control has read each page once or twice."""
    for name, pages in (("few", 3), ("many", 300)):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": prose(i, 40)}) + "\n" for i in range(pages)))
        build(BuildOptions([str(source)], [], [], vocab_size=500), tmp_path / name)
    heart = small(run__steps=220, data__batch_tokens=1024, optimizer__matrix_lr=0.02)
    train([str(tmp_path / "few")], tmp_path / "heart", heart)
    train([str(tmp_path / "many")], tmp_path / "control", small(run__steps=60))
    recited = json.loads((tmp_path / "heart" / "record.json").read_text())["recitation"]["train"]
    control = json.loads((tmp_path / "control" / "record.json").read_text())["recitation"]
    assert recited["recited"] >= recited["passages"] // 4 > 0
    assert control["train"]["recited"] == 0 == control["heldout"]["recited"]
    assert "The model recites" in write_report(tmp_path / "heart").read_text()


def test_loss_by_source_and_position(tmp_path):
    for name, start in (("a", 0), ("b", 500)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": prose(start + i, 60)}) + "\n" for i in range(60))
        )
    build(BuildOptions([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], [], [], vocab_size=500), tmp_path / "c")
    train([str(tmp_path / "c")], tmp_path / "m", small())
    record = json.loads((tmp_path / "m" / "record.json").read_text())
    assert set(record["by_source"]) <= {str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")}
    low, high = min(record["by_source"].values()), max(record["by_source"].values())
    assert low <= record["heldout_bits_per_byte"] + 1e-9 and high >= record["heldout_bits_per_byte"] - 1e-9
    positions = [p for p, _ in record["by_position"]]
    assert positions == sorted(positions) and positions[0] == 1
