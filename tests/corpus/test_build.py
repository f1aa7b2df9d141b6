"""Building corpora: planted copies and evaluation items are found, formats are read, faults are told, kills
survived."""

import errno
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from craton.base import UserError
from craton.corpus import clean, decode, records
from craton.corpus.build import BuildOptions, build
from craton.corpus.store import Corpus
from tests.conftest import WORDS, craton, prose


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t, "license": "CC0"}) + "\n" for t in texts))
    return str(path)


def options(*sources, **more):
    return BuildOptions(
        list(sources),
        more.pop("skip", []),
        more.pop("decontaminate", []),
        vocab_size=more.pop("vocab_size", 400),
        **more,
    )


def altered(text, seed):
    """One word in a hundred replaced, case and punctuation changed here and there."""
    r = random.Random(seed)
    words = text.split(" ")
    for i in range(len(words)):
        if r.random() < 0.01:
            words[i] = r.choice(WORDS)
        elif r.random() < 0.05:
            words[i] = words[i].upper() + r.choice(["", ",", "!"])
    return " ".join(words)


def test_planted_copies_are_found(tmp_path):
    originals = [prose(i, 24) for i in range(3000)]
    r = random.Random(0)
    exact = [t.replace(" ", "  ", 1) + "\n" for t in r.sample(originals, 500)]
    near = [altered(t, i) for i, t in enumerate(r.sample(originals, 500))]
    out = tmp_path / "c"
    manifest = build(options(write(tmp_path / "a.jsonl", originals), write(tmp_path / "b.jsonl", exact + near)), out)
    kept = [s["documents"] for s in manifest["sources"]]
    assert kept[0] >= 3000 * 0.995  # under 0.5 % of the originals falsely dropped
    assert manifest["dropped"]["exact_duplicate"]["documents"] >= 495
    assert kept[1] <= 500 * 0.05 + 5  # at least 95 % of near copies found
    assert manifest["sources"][0]["license"] == ["CC0"]


def test_planted_evaluation_items_are_found(tmp_path):
    items = [" ".join(prose(10_000 + i, 3).split()[: 13 + i % 20]) for i in range(200)]
    (tmp_path / "eval.jsonl").write_text(
        "".join(json.dumps({"question": q, "choices": ["yes", "no"]}) + "\n" for q in items)
    )
    clean = [prose(i, 24) for i in range(500)]
    dirty = [prose(20_000 + i, 12) + f"\n{q.upper()}!\n" + prose(30_000 + i, 12) for i, q in enumerate(items)]
    manifest = build(
        options(
            write(tmp_path / "a.jsonl", clean),
            write(tmp_path / "b.jsonl", dirty),
            decontaminate=[str(tmp_path / "eval.jsonl")],
        ),
        tmp_path / "c",
    )
    assert [s["documents"] for s in manifest["sources"]] == [500, 0]
    assert manifest["evaluation"]["items"] == 200 and manifest["dropped"]["contaminated"]["documents"] == 200


def test_formats_and_round_trip(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    import pyarrow
    import zstandard

    src = tmp_path / "src"
    (src / "sub").mkdir(parents=True)
    texts = {k: prose(i, 12) for i, k in enumerate(("txt", "md", "html", "jsonl", "gz", "xz", "zst", "parquet"))}
    (src / "a.txt").write_text(texts["txt"])
    (src / "sub" / "b.md").write_text(texts["md"])
    (src / "c.html").write_text(
        "<html><body><nav>Home "
        f"About</nav><article><p>{texts['html'].replace(chr(10), '</p><p>')}</p></article></body></html>"
    )
    (src / "code.py").write_text("def f(x):\n    return x + 1\n" * 3)
    line = {k: (json.dumps({"text": texts[k]}) + "\n").encode() for k in ("jsonl", "gz", "xz", "zst")}
    (src / "d.jsonl").write_bytes(line["jsonl"])
    (src / "e.jsonl.gz").write_bytes(gzip.compress(line["gz"]))
    (src / "f.jsonl.xz").write_bytes(lzma.compress(line["xz"]))
    (src / "g.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(line["zst"]))
    pq.write_table(pyarrow.table({"text": [texts["parquet"]]}), src / "h.parquet")
    (src / "picture.png").write_bytes(b"\x89PNG\0\0")
    manifest = build(options(str(src)), tmp_path / "c")
    corpus = Corpus(tmp_path / "c")
    found = {}
    for split in ("train", "heldout"):
        for row in corpus.rows(split):
            ids = corpus.read(split, int(row["start"]), int(row["tokens"]))
            assert ids[0] == corpus.manifest["document_id"]
            found[corpus.name_of(row).split("/")[-1].split(":")[0]] = corpus.tokenizer.decode(ids.tolist())
    names = {
        "txt": "a.txt",
        "md": "b.md",
        "jsonl": "d.jsonl",
        "gz": "e.jsonl.gz",
        "xz": "f.jsonl.xz",
        "zst": "g.jsonl.zst",
        "parquet": "h.parquet",
    }
    assert all(found[name] == texts[key] for key, name in names.items())
    assert found["c.html"].split() == texts["html"].split() and "code.py" in found
    assert manifest["passed_over"]["files"] == 1


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
def test_truncated_archives_are_refused(tmp_path, suffix):
    import zstandard

    compress = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}[suffix]
    half = [
        compress("".join(json.dumps({"text": prose(i)}) + "\n" for i in r).encode())
        for r in (range(200), range(200, 400))
    ]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(half[0] + half[1])  # two frames, as pzstd and cat make
    assert build(options(str(path)), tmp_path / "whole")["sources"][0]["documents"] == 400
    path.write_bytes(half[0] + half[1][: len(half[1]) // 2])
    with pytest.raises(UserError, match=f"a.jsonl.{suffix}: cannot be read"):
        build(options(str(path)), tmp_path / "cut")


def test_long_documents_are_cut_and_stay_together(tmp_path):
    text = "\n\n".join(prose(i, 8) for i in range(900))
    (tmp_path / "long.txt").write_text(text)
    build(options(str(tmp_path / "long.txt")), tmp_path / "c")
    corpus = Corpus(tmp_path / "c")
    rows = corpus.rows("train")
    assert len(rows) > 2 and rows["continued"].sum() >= len(rows) - 3
    ids = corpus.read("train", 0, corpus.length("train"))
    assert (ids == corpus.manifest["document_id"]).sum() == (rows["continued"] == 0).sum()


def test_same_sources_same_corpus(tmp_path):
    source = write(tmp_path / "a.jsonl", [prose(i) for i in range(300)])
    a, b = build(options(source), tmp_path / "1"), build(options(source), tmp_path / "2")
    assert a["files"] == b["files"]


def test_killed_builds_go_on_and_end_the_same(tmp_path):
    source = write(tmp_path / "a.jsonl", [prose(i, 60) for i in range(4000)])
    whole = build(options(source), tmp_path / "whole")
    out, r = tmp_path / "killed", random.Random(0)
    command = _command(source, out)
    for _ in range(6):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(r.uniform(0.2, 2.0))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Corpus(out).manifest["files"] == whole["files"]
    assert not (out / ".work").exists()


def test_a_build_that_stops_after_the_end_was_cut_off_ends_the_same(tmp_path, monkeypatch):
    """Pieces of a repetitive text are near duplicates of each other: they were compared once when it went on."""
    text = "\n\n".join(f"{prose(i % 7, 6)} {i}" for i in range(120))
    (tmp_path / "a.txt").write_text(text)
    whole = build(options(str(tmp_path / "a.txt")), tmp_path / "whole")
    from craton.corpus import build as module

    def stop(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Build, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        build(options(str(tmp_path / "a.txt")), tmp_path / "c")
    monkeypatch.undo()
    again = build(options(str(tmp_path / "a.txt")), tmp_path / "c")
    assert again["files"] == whole["files"] and again["dropped"] == whole["dropped"]


def test_few_large_documents_do_not_have_all_small_ones_held_out(tmp_path):
    for i in range(4):
        (tmp_path / f"novel{i}.txt").write_text(" ".join(prose(1000 * i + j, 40) for j in range(80)))
    for i in range(14):
        (tmp_path / f"note{i}.txt").write_text(prose(90_000 + i, 8))
    build(options(f"{tmp_path}/*.txt"), tmp_path / "c")
    corpus = Corpus(tmp_path / "c")
    names = {corpus.name_of(r).rpartition("/")[2][:4] for r in corpus.rows("heldout")}
    held = corpus.manifest["splits"]["heldout"]
    assert held["documents"] <= 2 and "nove" in names
    assert 0.01 < held["bytes"] / sum(s["bytes"] for s in corpus.manifest["splits"].values()) < 0.06


def test_a_corpus_within_its_source_is_no_source(tmp_path):
    (tmp_path / "a.txt").write_text(prose(1, 60))
    first = build(options(str(tmp_path)), tmp_path / "corpus")
    assert build(options(str(tmp_path)), tmp_path / "corpus")["digest"] == first["digest"]
    with pytest.raises(UserError, match="empty text"):
        build(options(""), tmp_path / "d")


def _command(source, out, *more):
    return [sys.executable, "-m", "craton", "corpus", "build", source, "--out", str(out), "--vocab-size", "400", *more]


def _built(source, out, *more):
    command = _command(source, out, *more)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _workers(process, wanted=1):
    """Its worker processes, once there are so many."""
    for _ in range(400):
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if len(found) >= wanted:
            return [int(p) for p in found]
        time.sleep(0.02)
    raise AssertionError("no workers")


def test_workers_end_with_the_build_and_do_not_hold_its_folder(tmp_path):
    source = write(tmp_path / "a.jsonl", [prose(i, 60) for i in range(3000)])
    first = _built(source, tmp_path / "c")
    workers = _workers(first)
    time.sleep(0.3)
    first.kill()  # it alone
    first.communicate()
    again = _built(source, tmp_path / "c")
    assert again.communicate()[1].count("error") == 0 and again.returncode == 0
    assert not any(os.path.exists(f"/proc/{p}") for p in workers)


def test_a_killed_worker_is_one_line_and_the_next_call_goes_on(tmp_path):
    source = write(tmp_path / "a.jsonl", [prose(i, 60) for i in range(4000)])
    whole = build(options(source), tmp_path / "whole")
    process = _built(source, tmp_path / "c")
    os.kill(_workers(process)[0], signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == 2 and "a worker process was killed" in said and "Traceback" not in said
    again = _built(source, tmp_path / "c")
    assert again.communicate() and again.returncode == 0
    assert Corpus(tmp_path / "c").manifest["files"] == whole["files"]


def test_file_systems_without_locks_and_flushed_folders(tmp_path, monkeypatch, capsys):
    from craton.base import files

    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def flush(handle, real=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(files.fcntl, "flock", missing)
    monkeypatch.setattr(files.os, "fsync", flush)
    build(options(write(tmp_path / "a.jsonl", [prose(i) for i in range(20)])), tmp_path / "c")
    assert "has no locks" in capsys.readouterr().out and Corpus(tmp_path / "c").length("train")


BAD = {
    "missing path": lambda p: ([str(p / "absent.txt")], "absent.txt: no such file"),
    "empty folder": lambda p: ([str((p / "empty").mkdir() or p / "empty")], "is empty"),
    "only other types": lambda p: ([str(make(p / "bin" / "x.png", b"\0\1"))], "no text file"),
    "binary file": lambda p: ([str(make(p / "t" / "x.txt", bytes(range(256)) * 50))], "binary file"),
    "broken line": lambda p: ([str(make(p / "t" / "x.jsonl", b'{"text": "a"}\n{"text": \n'))], "x.jsonl:2"),
    "no text field": lambda p: ([str(make(p / "t" / "x.jsonl", b'{"note": "a"}\n'))], "x.jsonl:1: no text"),
    "cut archive": lambda p: (
        [str(make(p / "t" / "x.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 999)[:-20]))],
        "x.jsonl.xz",
    ),
    "nothing left": lambda p: ([str(make(p / "t" / "x.txt", b" \n "))], "no document is left"),
    "no parquet": lambda p: ([str(make(p / "t" / "x.parquet", b"PAR1"))], "parquet"),
}


def make(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path.parent


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, case):
    sources, message = BAD[case](tmp_path)
    done = craton("corpus", "build", *sources, "--out", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("craton: error:")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_skip_bad_goes_on(tmp_path):
    good = json.dumps({"text": prose(1)})
    make(tmp_path / "t" / "x.jsonl", f'{good}\n{{"text": \n{json.dumps({"text": prose(2)})}\n'.encode())
    make(tmp_path / "t" / "y.txt", bytes(range(256)) * 50)
    manifest = build(options(str(tmp_path / "t"), skip_bad=True), tmp_path / "c")
    assert manifest["passed_over"]["bad"] == 2 and manifest["sources"][0]["documents"] == 2


def test_folders_in_use(tmp_path):
    source = write(tmp_path / "a.jsonl", [prose(i) for i in range(20)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match="in use"):
        build(options(source), tmp_path / "full")
    build(options(source), tmp_path / "c")
    with pytest.raises(UserError, match="another corpus"):
        build(options(source, skip=["near"]), tmp_path / "c")
    with pytest.raises(UserError, match="did you mean 'near'"):
        build(options(source, skip=["neer"]), tmp_path / "d")
    assert (tmp_path / "full" / "mine").read_text() == "x" and not (tmp_path / "d").exists()


def test_given_tokenizer(tmp_path, corpus):
    source = write(tmp_path / "a.jsonl", [prose(i) for i in range(50)])
    build(BuildOptions([source], [], [], tokenizer=str(corpus / "tokenizer")), tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer" / "tokenizer.json").read_bytes() == (
        corpus / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_what_is_looked_for_is_part_of_a_corpus(tmp_path):
    """An evaluation folder that got another file, once, was taken for the same."""
    source = write(tmp_path / "a.jsonl", [prose(i) for i in range(30)])
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "a.txt").write_text(prose(900))
    given = options(source, decontaminate=[str(tmp_path / "held")])
    build(given, tmp_path / "c")
    (tmp_path / "held" / "b.txt").write_text(prose(3))
    with pytest.raises(UserError, match="another corpus"):
        build(given, tmp_path / "c")


def test_a_licence_of_some_is_not_that_of_all(tmp_path):
    rows = [{"text": prose(i)} | ({"license": "MIT"} if i == 4 else {}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    manifest = build(options(str(tmp_path / "a.jsonl")), tmp_path / "c")
    assert manifest["sources"][0]["license"] == ["MIT", "not stated"]


def test_corpora_of_the_version_before_are_shown(tmp_path, capsys):
    from craton.corpus.show import show
    from craton.corpus.store import manifest_digest

    build(options(write(tmp_path / "a.jsonl", [prose(i) for i in range(20)])), tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["passed_over"] = {"files": 2, "types": {".png": 2}, "bad": 0, "examples": []}
    for source in manifest["sources"]:
        del source["read_bytes"], source["dropped"]
    del manifest["lost_by_tokenizer"]
    manifest["digest"] = manifest_digest(manifest)
    from craton.base import write_json

    write_json(path, manifest)
    show(tmp_path / "c", 2)
    assert "20 documents" in capsys.readouterr().out


def test_a_tokenizer_that_loses_text_is_told(tmp_path, capsys):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    backend = Backend(models.WordLevel(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator([prose(i) for i in range(50)], trainers.WordLevelTrainer(special_tokens=special))
    (tmp_path / "t").mkdir()
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "[CLS]", "eos_token": "[SEP]"}))
    source = write(tmp_path / "a.jsonl", [prose(i) for i in range(50)])
    build(BuildOptions([source], [], [], tokenizer=str(tmp_path / "t")), tmp_path / "c")
    assert "WARNING  the given tokenizer does not give texts back" in capsys.readouterr().out
    build(BuildOptions([source], [], [], vocab_size=400), tmp_path / "own")
    build(BuildOptions([source], [], [], tokenizer=str(tmp_path / "own" / "tokenizer")), tmp_path / "d")
    assert "does not give texts back" not in capsys.readouterr().out


def test_every_injected_fault_is_refused(tmp_path):
    out = tmp_path / "c"
    build(options(write(tmp_path / "a.jsonl", [prose(i) for i in range(60)])), out)
    files = sorted(p for p in out.rglob("*") if p.is_file())
    r, accepted = random.Random(0), 0
    for _ in range(300):
        path = r.choice(files)
        whole = path.read_bytes()
        kind = r.randrange(3)
        at = r.randrange(len(whole))
        damaged = whole[:at] if kind == 0 else whole[:at] + bytes([whole[at] ^ (1 << r.randrange(8))]) + whole[at + 1 :]
        path.unlink() if kind == 2 else path.write_bytes(damaged)
        try:
            Corpus(out)
            accepted += 1
        except UserError:
            pass
        path.write_bytes(whole)
    assert accepted == 0
    Corpus(out)


def test_held_out_text_comes_from_documents_that_are_not_trained_on(tmp_path):
    """Books that are cut into parts: once parts were held out, of books that stayed."""
    books = [" ".join(prose(100 * b + i, 40) for i in range(60)) for b in range(40)]
    for i, book in enumerate(books):
        make(tmp_path / "t" / f"{i}.txt", book.encode())
    build(options(str(tmp_path / "t"), skip=["quality", "near"]), tmp_path / "c")
    corpus = Corpus(tmp_path / "c")
    names = [{corpus.name_of(r).partition("#")[0] for r in corpus.rows(split)} for split in ("train", "heldout")]
    assert names[1] and not names[0] & names[1]
    assert len(corpus.documents) >= 40


def test_questions_and_answers_without_their_ids(tmp_path):
    """Once every string of such a record was trained on."""
    rows = [
        {"id": "q17", "url": "https://example.org/secret", "question": "What?" + prose(1), "answer": prose(2)},
        {"uuid": "x9", "instruction": "Sum." + prose(3), "input": "", "output": prose(4)},
        {"prompt": prose(5), "response": prose(6), "source": "forum"},
    ]
    texts = [records.text_of(row, "here", [])[0] for row in rows]
    assert texts[0] == f"{rows[0]['question']}\n\n{rows[0]['answer']}"
    assert texts[1] == f"{rows[1]['instruction']}\n\n{rows[1]['output']}"
    assert texts[2] == f"{rows[2]['prompt']}\n\n{rows[2]['response']}"
    with pytest.raises(UserError, match="no text in this record"):
        records.text_of({"id": "a", "url": "b", "note": "c"}, "here", [])


def test_long_utf_16_is_text(tmp_path):
    """A piece that is not the first has no mark; it was taken for binary once."""
    text = "".join(f"Line {i} of a long text, wide – ☃ 𝔘.\n" for i in range(300_000))
    data = text.encode("utf-16")
    assert len(data) > 16 * decode.BLOCK
    make(tmp_path / "t" / "wide.txt", data)
    out = tmp_path / "c"
    build(options(str(tmp_path / "t"), skip=["quality", "exact", "near"]), out)
    corpus = Corpus(out)
    assert int(corpus.documents["bytes"].sum()) == pytest.approx(len(text.encode()), rel=0.001)


def test_a_full_disk_keeps_the_work(tmp_path, monkeypatch, capsys):
    """The work that the message promises to keep was removed once."""
    source = write(tmp_path / "a.jsonl", [prose(i, 200) for i in range(400)])
    before, wrote = clean._write, []

    def full(out, *more):
        if len(wrote) == 2:
            raise OSError(28, "No space left on device", str(out))
        wrote.append(out)
        before(out, *more)

    monkeypatch.setattr(clean, "_write", full)
    with pytest.raises((UserError, OSError), match="No space left"):
        build(options(source), tmp_path / "c")
    assert list((tmp_path / "c" / ".work").glob("clean-*.json"))
    monkeypatch.setattr(clean, "_write", before)
    assert build(options(source), tmp_path / "c")["counts"]["kept"] == 400
    assert "went on from an earlier run" in capsys.readouterr().out
