"""Search by words is bm25s's to the last bit; by both legs, what it is said to be; and runs are TREC's."""

import json
import random

import bm25s
import numpy as np
import pytest
import Stemmer

from craton.base import UserError
from craton.retrieval.index import Index, best, build
from craton.retrieval.search import fused, ndcg, ranked, read_qrels, search
from tests.conftest import WORDS, craton


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("records"), random.Random(0)
    rows = []
    for i in range(300):
        words = [draw.choice(WORDS) + draw.choice(["", "s", "ing"]) for _ in range(draw.randrange(0, 60))]
        rows.append({"_id": str(i), "title": draw.choice(["", "The " + draw.choice(WORDS)]), "text": " ".join(words)})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    queries = [{"_id": f"q{i}", "text": " ".join(draw.choice(WORDS) for _ in range(3)) + " the"} for i in range(20)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    build([str(folder / "corpus.jsonl")], folder / "index")
    return folder, rows, queries


def test_words_are_scored_as_lucene_does(records):
    folder, rows, queries = records
    stemmer, how = Stemmer.Stemmer("english"), {"stopwords": "en", "show_progress": False}
    theirs = bm25s.BM25(method="lucene")
    texts = [f"{r['title']} {r['text']}".strip() for r in rows]
    theirs.index(bm25s.tokenize(texts, stemmer=stemmer, **how), show_progress=False)
    index = Index(folder / "index")
    for query in queries:
        words = bm25s.tokenize([query["text"]], stemmer=stemmer, return_ids=False, **how)[0]
        wanted = theirs.get_scores(words)
        np.testing.assert_allclose(index.lexical.scores(query["text"]), wanted, atol=1e-6)
        found = [name for name, _ in ranked(index, query["text"], 10)]
        assert found == [rows[i]["_id"] for i in best(wanted, 10)]


def test_runs(records, tmp_path):
    folder, rows, queries = records
    done = craton(
        "search", folder / "index", "--queries", folder / "queries.jsonl", "--run", tmp_path / "r.trec", "-k", "5"
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ") for line in (tmp_path / "r.trec").read_text().splitlines()]
    assert all(len(line) == 6 and line[1] == "Q0" for line in lines)
    for query in queries:
        own = [line for line in lines if line[0] == query["_id"]]
        assert [int(line[3]) for line in own] == list(range(1, len(own) + 1))
        assert [float(line[4]) for line in own] == sorted((float(line[4]) for line in own), reverse=True)
    assert len({line[0] for line in lines}) == len(queries)


def test_a_query_from_the_command_line(records):
    folder = records[0]
    done = craton("search", folder / "index", "river", "-k", "2", "--json")
    found = json.loads(done.stdout)["results"]
    assert len(found) == 2 and all(
        r["text"] + r.get("title", "") and r["end"] - r["start"] == len(r["text"]) for r in found
    )
    nothing = craton("search", folder / "index", "zzzz")
    assert nothing.returncode == 0 and "nothing found" in nothing.stdout
    for wrong in (
        ["search", folder / "index"],
        ["search", folder / "index", " "],
        ["search", folder / "index", "x", "-k", "0"],
    ):
        assert craton(*wrong).returncode == 2
    with pytest.raises(UserError, match="empty"):
        search(Index(folder / "index"), "  ")


def test_both_legs():
    lexical, dense = np.array([3.0, 0, 1, 0], np.float32), np.array([0.1, 0.9, 0.8, 0.2], np.float32)
    assert fused(lexical, None, 0.3) is lexical
    assert fused(lexical, dense, 1.0).argmax() == 0 and fused(lexical, dense, 0.0).argmax() == 1
    assert fused(np.zeros(4, np.float32), dense, 1.0).argmax() == 1  # no word is known


def test_gains(tmp_path):
    assert ndcg(["a", "b"], {"a": 2, "b": 1}) == 1.0 and ndcg(["x"], {"a": 1}) == 0.0
    wanted = (1 / np.log2(2) + 3 / np.log2(4)) / (3 / np.log2(2) + 1 / np.log2(3))
    assert ndcg(["b", "x", "a"], {"a": 3, "b": 1}) == pytest.approx(wanted)
    (tmp_path / "q.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\n")
    (tmp_path / "q.trec").write_text("q1 0 d1 2\n")
    assert read_qrels(tmp_path / "q.tsv") == read_qrels(tmp_path / "q.trec") == {"q1": {"d1": 2}}
    (tmp_path / "bad").write_text("q1 d1 2\nq1 d1\n")
    with pytest.raises(UserError, match="bad:2"):
        read_qrels(tmp_path / "bad")


def test_scores_are_trec_evals(records, tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    folder, _, queries = records
    draw = random.Random(1)
    rows = [(q["_id"], str(draw.randrange(300)), draw.randrange(3)) for q in queries for _ in range(40)]
    (tmp_path / "qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"{a}\t{b}\t{c}\n" for a, b, c in rows)
    )
    command = [
        "search",
        folder / "index",
        "--queries",
        folder / "queries.jsonl",
        "--run",
        tmp_path / "run",
        "-k",
        "100",
    ]
    done = craton(*command, "--qrels", tmp_path / "qrels.tsv", "--json")
    found = json.loads(done.stdout)["scores"]
    run, relevant = {}, read_qrels(tmp_path / "qrels.tsv")
    for line in (tmp_path / "run").read_text().splitlines():
        query, _, name, rank, *_ = line.split()
        run.setdefault(query, {})[name] = -float(rank)
    theirs = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10", "recall.100", "recip_rank"}).evaluate(run)
    for ours, name in (("ndcg@10", "ndcg_cut_10"), ("recall@100", "recall_100")):
        assert found[ours]["mean"] == pytest.approx(np.mean([t[name] for t in theirs.values()]), abs=1e-4)
    assert found["mrr@10"]["queries"] == len(theirs) and found["mrr@10"]["interval"] > 0
