"""An encoder learns which passages answer which questions; one that is shown mixed-up pairs does not."""

import json
import random

import numpy as np
import pytest

from craton.base import UserError
from craton.retrieval.contrast import mined, read_pairs
from craton.retrieval.encode import TextEncoder
from tests.conftest import craton
from tests.retrieval.test_encoder import published

COLOURS = ["red", "blue", "green", "black", "white", "brown", "grey", "pink"]
THINGS = ["lamp", "boat", "coat", "door", "horse", "table", "stone", "bell"]


def code(i: int) -> str:
    return COLOURS[i % 8] + " " + THINGS[i // 8]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Questions name a thing in letters that its passage has turned by one: nothing that search by words finds."""
    folder = tmp_path_factory.mktemp("pairs")
    turn = str.maketrans("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza")
    rows = [{"question": code(i), "passage": code(i).translate(turn)} for i in range(64)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    mixed = [r["passage"] for r in rows]
    random.Random(0).shuffle(mixed)
    control = [{"question": r["question"], "passage": p} for r, p in zip(rows, mixed, strict=True)]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in control))
    (folder / "encoder").mkdir()
    published(folder / "encoder", "bert")
    return folder, rows


def accuracy(folder, rows) -> float:
    """Of questions whose own passage is the nearest of all."""
    encoder = TextEncoder(folder, exact=True)
    scores = encoder.queries([r["question"] for r in rows]) @ encoder.passages([r["passage"] for r in rows]).T
    return float((scores.argmax(1) == np.arange(len(rows))).mean())


def test_it_learns_and_a_control_does_not(pairs, tmp_path):
    folder, rows = pairs
    assert accuracy(folder / "encoder", rows) < 0.2
    for name, lowest, highest in (("pairs", 0.8, 1.0), ("mixed", 0.0, 0.3)):
        command = [
            "tune",
            folder / "encoder",
            folder / f"{name}.jsonl",
            "--method",
            "contrastive",
            "--out",
            tmp_path / name,
        ]
        done = craton(*command, "--steps", "150", "--set", "tune.lr=0.001")
        assert done.returncode == 0, done.stderr
        assert lowest <= accuracy(tmp_path / name, rows) <= highest, name
    record = json.loads((tmp_path / "pairs" / "record.json").read_text())
    assert record["summary"]["after"]["held_out_mrr"] > 0 and record["objective"] == "contrastive"
    again = craton(*command[:-1], tmp_path / "pairs", "--steps", "150")
    assert again.returncode == 2 and "not empty" in again.stderr


def test_rows_and_folders(tmp_path):
    (tmp_path / "few.jsonl").write_text('{"question": "a", "passage": "b"}\n')
    with pytest.raises(UserError, match="at least"):
        read_pairs([str(tmp_path / "few.jsonl")])
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(UserError, match="bad.jsonl:1: needs"):
        read_pairs([str(tmp_path / "bad.jsonl")])
    with pytest.raises(UserError, match="BEIR"):
        read_pairs([str(tmp_path)])
    (tmp_path / "qrels").mkdir()
    rows = [{"_id": str(i), "title": "", "text": f"{code(i % 64)} {i}"} for i in range(80)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": code(i)}) + "\n" for i in range(60))
    )
    (tmp_path / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\t{i}\t1\n" for i in range(60))
    )
    found = read_pairs([str(tmp_path)])
    assert len(found.questions) == 60 and len(found.passages) == 80
    for own, negatives in zip(found.relevant, mined(found), strict=True):
        assert negatives and not set(own) & set(negatives)
