"""Indexes are brought up to date, survive whatever ends a process, and say what is wrong."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from craton.base import UserError
from craton.corpus.sources import Reading
from craton.retrieval.index import Index, build
from craton.retrieval.search import search
from craton.retrieval.store import FILE, Store
from tests.conftest import craton

TOPICS = ["granite", "heron", "lantern", "saffron", "glacier", "tractor", "violin", "comet"]


def texts_of(index):
    return {name: index.store.document_text(name) for name in index.store.names().values()}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names(index, query):
    return [Path(h.passage.document).name for h in search(index, query)]


def test_kept_up_to_date(tmp_path):
    docs, out = tmp_path / "docs", tmp_path / "index"
    write(
        docs,
        {
            "a.md": "# Rocks\n\nGranite is hard.\n",
            "b.txt": "The heron wades.\n",
            "sub/c.py": "def lantern():\n    return 1\n",
        },
    )
    assert build([str(docs)], out)["added"] == 3
    index = Index(out)
    assert names(index, "granite") == ["a.md"] and names(index, "lantern") == ["c.py"]
    generation = index.store.generation
    index.close()
    assert build([str(docs)], out)["unchanged"] == 3
    (docs / "a.md").write_text("# Rocks\n\nA glacier moves them.\n")
    (docs / "b.txt").unlink()
    write(docs, {"d.txt": "A comet came.\n"})
    done = build([str(docs)], out)
    assert (done["added"], done["updated"], done["dropped"], done["unchanged"]) == (1, 1, 1, 1)
    index = Index(out)
    assert not names(index, "granite") and not names(index, "heron")
    assert names(index, "glacier") == ["a.md"] and names(index, "comet") == ["d.txt"]
    assert index.store.generation > generation
    for path, text in texts_of(index).items():
        assert text == Path(path).read_text()
    for hit in search(index, "rocks glacier"):
        whole = index.store.document_text(hit.passage.document)
        assert whole[hit.passage.start : hit.passage.end] == hit.passage.text


def random_change(folder: Path, draw: random.Random) -> None:
    path = folder / f"{draw.randrange(40)}.txt"
    if path.exists() and draw.random() < 0.3:
        path.unlink()
    else:
        path.write_text(" ".join(draw.choice(TOPICS) for _ in range(draw.randrange(1, 60))) + ".\n")


def store_has(folder: Path, path: str) -> bool:
    """Whether a file's document is there, whole, as it was when it was taken."""
    store = Store(folder)
    try:
        return len(store.document_text(path) or "") > 0
    finally:
        store.close()


def test_killed_again_and_again(tmp_path):
    """What was said to be there is there; and an index with a history finds what a new one finds."""
    docs, out, draw = tmp_path / "docs", tmp_path / "index", random.Random(0)
    docs.mkdir()
    for _ in range(30):
        random_change(docs, draw)
    code = (
        "import sys, pathlib; from craton.retrieval.index import build; build([sys.argv[1]], pathlib.Path(sys.argv[2]))"
    )
    for _ in range(6):
        for _ in range(25):
            random_change(docs, draw)
        process = subprocess.Popen([sys.executable, "-c", code, str(docs), str(out)])
        time.sleep(draw.uniform(1.2, 2.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with contextlib.suppress(UserError):  # killed before there was anything
            store = Store(out)
            known = set(store.files())
            store.close()
            now = {str(p) for p in docs.iterdir()}
            assert all(store_has(out, p) for p in known & now)
    build([str(docs)], out)
    build([str(docs)], tmp_path / "new")
    old, new = Index(out), Index(tmp_path / "new")
    assert texts_of(old) == texts_of(new) == {str(p): p.read_text() for p in docs.iterdir()}
    for topic in TOPICS:
        a, b = ({h.passage.document: round(h.score, 4) for h in search(i, topic, 50)} for i in (old, new))
        assert a == b
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert size < 2 * sum(p.stat().st_size for p in (tmp_path / "new").rglob("*") if p.is_file())


def test_one_writes_at_a_time(tmp_path):
    write(tmp_path / "d", {"a.txt": "granite"})
    build([str(tmp_path / "d")], tmp_path / "i")
    store = Store(tmp_path / "i", write=True)
    done = craton("index", tmp_path / "d", "--out", tmp_path / "i")
    assert done.returncode == 2 and "another process" in done.stderr and done.stderr.count("\n") == 1
    store.close()
    assert names(Index(tmp_path / "i"), "granite") == ["a.txt"]


def test_bad_input(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    docs = tmp_path / "docs"
    write(docs, {"good.txt": "A heron.\n", "broken.docx": "no zip", "wrong.pdf": "no pdf", "latin.txt": "x"})
    (docs / "latin.txt").write_bytes("Un héron à l'étang, déjà vu, très loin.\n".encode("latin-1") * 3)
    writer = pypdf.PdfWriter()
    writer.add_blank_page(200, 200)
    writer.write(docs / "scanned.pdf")
    writer.encrypt("secret")
    writer.write(docs / "locked.pdf")
    done = build([str(docs)], tmp_path / "i")
    assert done["documents"] == 2 and len(done["failed"]) == 4
    said = " ".join(done["failed"])
    assert "password" in said and "pictures without text" in said and "broken.docx" in said and "wrong.pdf" in said
    before = texts_of(Index(tmp_path / "i"))
    for name in ("locked.pdf", "scanned.pdf", "broken.docx"):
        with pytest.raises(UserError, match=name):
            build([str(docs / name)], tmp_path / "i")
    write(tmp_path / "more", {"new.txt": "A comet."})
    with pytest.raises(UserError, match="locked.pdf"):  # the other one is indexed all the same
        build([str(docs / "locked.pdf"), str(tmp_path / "more" / "new.txt")], tmp_path / "j")
    assert names(Index(tmp_path / "j"), "comet") == ["new.txt"]
    with pytest.raises(UserError, match="no such file"):
        build([str(tmp_path / "gone")], tmp_path / "i")
    assert texts_of(Index(tmp_path / "i")) == before
    assert (
        build([str(docs / "locked.pdf"), str(docs)], tmp_path / "i", reading=Reading(skip_bad=True))["documents"] == 2
    )
    write(tmp_path / "none", {"empty.txt": ""})
    with pytest.raises(UserError, match="none of the 1 files holds text"):
        build([str(tmp_path / "none")], tmp_path / "e")
    for command in (["search", tmp_path / "none", "x"], ["ask", "x", "--index", tmp_path / "none"]):
        done = craton(*command)
        assert done.returncode == 2 and "no index there" in done.stderr
    (tmp_path / "i" / FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="damaged"):
        Index(tmp_path / "i")


def test_a_zip_bomb_is_refused(tmp_path):
    import zipfile

    path = tmp_path / "bomb.docx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("word/document.xml", "w") as f:
        for _ in range(1100):
            f.write(bytes(1 << 20))
    with pytest.raises(UserError, match="unpacks to"):
        build([str(path)], tmp_path / "i")


def test_office_documents_have_pages(tmp_path):
    pptx, openpyxl, docx = (pytest.importorskip(n) for n in ("pptx", "openpyxl", "docx"))
    deck = pptx.Presentation()
    for word in ("granite", "heron"):
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = word.title(), f"The {word} is here."
    deck.save(tmp_path / "deck.pptx")
    book = openpyxl.Workbook()
    for row in (["part", "price"], *([f"bolt{i}", i] for i in range(400))):
        book.active.append(row)
    book.save(tmp_path / "book.xlsx")
    letter = docx.Document()
    letter.add_paragraph("A lantern burns.")
    letter.save(tmp_path / "letter.docx")
    build([str(tmp_path)], tmp_path / "i")
    index = Index(tmp_path / "i")
    (hit,) = search(index, "heron", 1)
    assert hit.passage.page == 2 and "heron" in hit.passage.text and "granite" not in hit.passage.text
    (hit,) = search(index, "bolt390", 1)
    assert "bolt390 | 390" in hit.passage.text and "part | price" in hit.passage.heading
    assert names(index, "lantern") == ["letter.docx"]


def test_records_are_named_by_their_ids(tmp_path):
    rows = [
        {"_id": f"r{i}", "title": t.title(), "text": f"All about the {t}.", "year": 1990 + i}
        for i, t in enumerate(TOPICS)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    build([str(tmp_path / "c.jsonl")], tmp_path / "i")
    index = Index(tmp_path / "i")
    assert [h.passage.document for h in search(index, "violin")] == ["r6"]
    assert [h.passage.document for h in search(index, "about", where={"year": "1993"})] == ["r3"]


def test_others_can_read_it(tmp_path):
    """What is made can be read and searched by whoever may read the folder, while it is brought up to date too."""
    docs = tmp_path / "d"
    write(docs, {"a.txt": "A heron.", "b.txt": "Granite."})
    build([str(docs)], tmp_path / "i")
    for path in (tmp_path / "i").rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode & 0o500 == 0o500 if path.is_dir() else mode & 0o400, path
    index = Index(tmp_path / "i")
    write(docs, {"b.txt": "A comet.", "c.txt": "A heron too."})
    build([str(docs)], tmp_path / "i")
    assert names(index, "heron") == ["a.txt"] and names(index, "granite") == []  # what is gone is not found as another
    assert sorted(names(Index(tmp_path / "i"), "heron")) == ["a.txt", "c.txt"]


def test_a_folder_that_is_not_there_drops_nothing(tmp_path):
    write(tmp_path / "disk" / "d", {"a.txt": "A heron."})
    write(tmp_path / "other", {"b.txt": "Granite."})
    build([str(tmp_path / "disk" / "d")], tmp_path / "i")
    (tmp_path / "disk" / "d").rename(tmp_path / "gone")
    (tmp_path / "disk").rmdir()
    assert build([str(tmp_path / "other")], tmp_path / "i")["dropped"] == 0
    assert names(Index(tmp_path / "i"), "heron") == ["a.txt"]


def test_rows_that_are_wrong(tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"_id": "a", "text": "heron", "v": NaN}\n{"x": 1}\n[1]\n{"_id": "b", "text": "granite"}\n'
    )
    with pytest.raises(UserError, match="c.jsonl:2"):
        build([str(tmp_path / "c.jsonl")], tmp_path / "i")
    done = build([str(tmp_path / "c.jsonl")], tmp_path / "i", reading=Reading(skip_bad=True))
    assert done["documents"] == 2 and len(done["failed"]) == 2
    json.dumps([h.passage.metadata for h in search(Index(tmp_path / "i"), "heron")], allow_nan=False)
    (tmp_path / "array.jsonl").write_text('[{"text": "comet"},\n {"text": "violin"}]\n')
    assert build([str(tmp_path / "array.jsonl")], tmp_path / "k")["documents"] == 2


def test_a_cell_at_the_end_of_a_sheet(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active["A1"], book.active["XFD1048576"] = "heron", "far"
    book.save(tmp_path / "far.xlsx")
    assert build([str(tmp_path / "far.xlsx")], tmp_path / "i")["documents"] == 1
