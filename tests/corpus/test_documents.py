"""What people's own documents are like: encodings, containers, damage, other scripts; and what the reading says."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.base import UserError
from craton.corpus import pages, sources
from craton.corpus.build import BuildOptions, build
from craton.corpus.decode import BLOCK, Decoder
from craton.corpus.offsets import Offsets
from craton.corpus.pages import html_text
from craton.corpus.papers import docx_text
from craton.corpus.quality import repair
from craton.corpus.store import Corpus
from tests.conftest import craton, prose

# A person's sentences, of the kinds that encodings are about.
SAYINGS = {
    "windows-1251": "Вчера мы долго гуляли по старому городу и говорили о книгах, которые читали в детстве. ",
    "koi8-r": "Осенью здесь бывает тихо, только дождь шумит в саду и ветер носит по дорожкам листья. ",
    "iso8859-2": "Wczoraj długo chodziliśmy po starym mieście i rozmawialiśmy o książkach z dzieciństwa. ",
    "cp1252": "Am Abend saßen wir müde über den Büchern, während draußen der Schnee fiel – „schön“, sagte er. ",
    "shift_jis": "昨日は古い町を長い時間歩きながら、子供のころに読んだ本の話をしました。とても楽しかったです。",
    "gb18030": "昨天我们在老城里走了很久，谈起了小时候读过的书。天气很好，大家都很高兴。",
    "euc-kr": "어제 우리는 오래된 도시를 걸으며 어린 시절에 읽은 책에 대해 이야기했습니다. ",
    "utf-16": "Hier nous avons marché longtemps dans la vieille ville en parlant des livres de l’enfance. ",
}


def decoded(data, given=None, kind=""):
    decoder = Decoder("here.txt", given, kind)
    return "".join(decoder.pieces(io.BufferedReader(io.BytesIO(data)))), decoder


@pytest.mark.parametrize("encoding", SAYINGS)
def test_encodings_are_told(encoding):
    text = "".join(f"{i}. {SAYINGS[encoding]}\n" for i in range(12))
    assert decoded(text.encode(encoding))[0] == text
    found, decoder = decoded(text.encode(encoding), given=encoding)
    assert found == text and not decoder.replaced


def test_declarations_are_honoured_unless_they_are_not_true():
    say = SAYINGS["windows-1251"]
    page = f'<html><head><meta http-equiv="Content-Type" content="text/html; charset=koi8-r"></head>{say}</html>'
    assert decoded(page.encode("koi8-r"), kind="html")[0] == page
    assert decoded(page.encode("utf-8"), kind="html")[0] == page  # saved again, by a program that left the declaration
    program = f"#!/usr/bin/python\n# -*- coding: cp1251 -*-\nx = '{say}'\n"
    assert decoded(program.encode("cp1251"), kind="code")[0] == program
    xml = f'<?xml version="1.0" encoding="ISO-8859-5"?><a>{say}</a>'
    assert decoded(xml.encode("iso8859-5"), kind="html")[0] == xml
    with pytest.raises(UserError, match="no such encoding"):
        Decoder("x", "windows-9999")


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400_000), st.sampled_from(sorted(SAYINGS)), st.integers(1, 5))
def test_stray_bytes_cost_a_character_each(at, saying, times):
    text = (SAYINGS[saying] * (450_000 // len(SAYINGS[saying])))[:450_000]
    data = bytearray(text.encode())
    for i in range(times):
        data[(at * (i + 1)) % len(data)] = 0xFF
    found, decoder = decoded(bytes(data))
    assert 0 < decoder.replaced <= 4 * times  # each hits one character, of up to four bytes
    assert len(found) >= len(text) - times and found.count("\ufffd") == decoder.replaced
    pieces = [p for p in found.split("\ufffd") if p]
    assert all(p in text for p in pieces)


def test_one_long_line_and_a_cut_end():
    text = "xx" + "привет мир " * (3 * BLOCK // 20)
    assert decoded(text.encode())[0] == text
    found, decoder = decoded(text.encode()[:-2])
    assert found[:-1] == text[:-2] and found[-1] == "\ufffd" and decoder.replaced == 1


def test_lines_of_two_encodings():
    lines = [f"{i} {SAYINGS['windows-1251']}" for i in range(40)]
    data = b"\n".join(line.encode("cp1251" if i % 2 else "utf-8") for i, line in enumerate(lines))
    assert decoded(data)[0].split("\n") == lines


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1))
def test_utf_8_is_read_as_it_is(text):
    if not text.startswith("\ufeff"):
        assert decoded(text.encode())[0] == text


def test_short_lines_go_with_the_others():
    """A character or two of another encoding may happen to be UTF-8."""
    lines = ["毛", SAYINGS["gb18030"], "模", "哦", SAYINGS["gb18030"] + "好"]
    assert decoded("\n".join(lines).encode("gb18030"))[0].split("\n") == lines


def test_a_declaration_in_the_text_of_another_kind_is_none():
    page = "<meta charset=shift_jis>" + "x" * 100 + "\n" + "plain\n" * 300_000 + "naïve café 東京\n"
    assert decoded(page.encode())[0] == page
    said = "echo ~{1,2}~} and so on"
    assert decoded(said.encode())[0] == said


@pytest.mark.parametrize("encoding", ["gb18030", "shift_jis", "euc-kr", "utf-8"])
def test_long_lines_of_two_bytes_a_character(encoding):
    text = "，".join([SAYINGS["gb18030" if encoding != "euc-kr" else "euc-kr"].replace(" ", "")] * 50_000)
    text = "".join(c for c in dict.fromkeys(text) for _ in range(1)) and text
    data = text.encode(encoding, "ignore")
    found, decoder = decoded(data)
    assert found == data.decode(encoding) and not decoder.replaced


def test_archives_and_rtf_are_no_prose(tmp_path):
    import tarfile

    write(tmp_path / "a.txt", "text " * 300_000)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.txt")
    write(tmp_path / "b.rtf", "{\\rtf1\\ansi caf\\'e9}")
    for name, word in (("a.tar.gz", "an archive"), ("b.rtf", "RTF")):
        with pytest.raises(UserError, match=word):
            read(tmp_path / name)
    for name in ("rot13", "hex", "zlib", "idna", "", "utf-99"):
        with pytest.raises(UserError, match="no such encoding"):
            build(BuildOptions([str(tmp_path / "a.txt")], [], [], encoding=name), tmp_path / "c")


def test_what_is_no_text_is_refused():
    for data in (bytes(range(256)) * 40, b"\x7fELF\2\1\1" + bytes(900), os.urandom(4000)):
        with pytest.raises(UserError, match="here.txt: (binary|not UTF-8)"):
            decoded(data)
    assert decoded(b"a line\nwith a \0 in it\n" + b"and more\n" * 30)[0]  # one NUL does not make it binary


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(*names, **more):
    files, passed = sources.find([str(n) for n in names])
    reading = sources.Reading(passed=passed, **more)
    return list(sources.read(files, reading)), reading


def texts(*names, **more):
    return [d.text for d in read(*names, **more)[0]]


ROWS = [{"id": i, "text": f'{prose(i)}\nsecond, "line" {i}'} for i in range(5)]


def table(rows, **more):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), **more)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def test_records_in_every_container(tmp_path):
    wanted = [r["text"] for r in ROWS]
    lines = "".join(json.dumps(r) + "\n" for r in ROWS)
    book = {"cells": [{"cell_type": "markdown", "source": ["# A\n", "b"]}, {"cell_type": "code", "source": "x = 1"}]}
    book |= {"nbformat": 4, "metadata": {}, "nbformat_minor": 5}
    held = {
        "a.json": json.dumps(ROWS),
        "b.json": json.dumps({"version": 1, "data": ROWS}, indent=2),
        "c.json": json.dumps({str(r["id"]): r for r in ROWS}),
        "d.json.gz": gzip.compress(lines.encode()),
        "e.JSONL.GZ": gzip.compress(lines.encode()),
        "f.jsonl": lines.encode("utf-8-sig"),
        "g.jsonl": lines.encode("utf-16"),
        "h.csv": table(ROWS),
        "i.tsv": table(ROWS, dialect="excel-tab").encode("utf-8-sig"),
        "j.csv": table([{"ID": r["id"], "Text": r["text"]} for r in ROWS], delimiter=";"),
        "k.jsonl.bz2": bz2.compress(lines.encode()),
        "l.unknown": json.dumps(ROWS),
        "m.txt.xz": lzma.compress(b"plain"),
        "n.ipynb": json.dumps(book),
    }
    for name, data in held.items():
        path = write(tmp_path / name, data)
        expected = ["plain"] if name == "m.txt.xz" else ["# A\nb\n\nx = 1"] if name == "n.ipynb" else wanted
        assert texts(path) == expected, name


def test_which_field_is_the_text(tmp_path):
    rows = [{"id": "7", "body": {"en": f"a {i}"}, "url": "https://x"} for i in range(3)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert texts(path, fields=["body.en"]) == ["a 0", "a 1", "a 2"]
    with pytest.raises(UserError, match=r"no text in this record \(it has id, body, url\).*--text-field"):
        texts(path)
    with pytest.raises(UserError, match="no field title with text"):
        texts(path, fields=["title"])
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    chats = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "That."}], "id": "q"},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "He."}]},
        {"question": "Q", "answer": "A", "url": "u", "licence": "MIT"},
    ]
    found, _ = read(write(tmp_path / "b.jsonl", "".join(json.dumps(r) + "\n" for r in chats)))
    assert [d.text for d in found] == ["What?\n\nThat.", "Who?\n\nHe.", "Q\n\nA"] and found[2].license == "MIT"


def test_a_bad_record_costs_one_record(tmp_path):
    pq, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    lines = [json.dumps(r) for r in ROWS]
    lines[1] = '{"text": "kept", "n": ' + "9" * 6000 + "}"
    lines[2] = '{"text": ' + "[" * 100_000 + "}"
    lines[3] = '{"text": "broken'
    found, reading = read(write(tmp_path / "a.jsonl", "\n".join(lines)), skip_bad=True)
    assert [d.text for d in found] == [ROWS[0]["text"], "kept", ROWS[4]["text"]] and len(reading.bad) == 2
    column = pyarrow.array([b"good one", b"\x81\xfe\0\1\2\3\4\5\6\7" * 9, "gut – schön".encode()], pyarrow.binary())
    pq.write_table(pyarrow.table({"text": column}), tmp_path / "b.parquet")
    found, reading = read(tmp_path / "b.parquet", skip_bad=True)
    assert [d.text for d in found] == ["good one", "gut – schön"] and len(reading.bad) == 1
    rows = io.StringIO('id,text\n1,one\n2,"two\nlines"\n')
    assert texts(write(tmp_path / "c.csv", rows.getvalue())) == ["one", "two\nlines"]


def test_broken_quotes_do_not_swallow_rows(tmp_path):
    rows = 'id,text\n1,good\n2,a "quote" within\n3,"x" y\n4,last\n'
    found, reading = read(write(tmp_path / "a.csv", rows), skip_bad=True)
    assert [d.text for d in found] == ["good", 'a "quote" within', "last"] and "a.csv:3: broken row" in reading.bad[0]
    with pytest.raises(UserError, match="a.csv:1: broken row .*near line 3"):
        read(write(tmp_path / "a.csv", 'id,text\n1,"never closed\n2,b\n'))
    assert "".join(texts(write(tmp_path / "b.csv", f"id,text\n1,{'long ' * 60_000}\n"))) == "long " * 60_000


def test_no_field_of_a_table_is_lost(tmp_path):
    assert texts(write(tmp_path / "a.tsv", "text\nHello, world\nand, more; of it\n")) == [
        "Hello, world",
        "and, more; of it",
    ]
    assert texts(write(tmp_path / "a.csv", "text\nHello; world\n")) == ["Hello; world"]
    with pytest.raises(UserError, match="3 fields where the header has 2"):
        read(write(tmp_path / "b.csv", "id,text\n1,Hello, world and more\n"))
    bad, reading = read(write(tmp_path / "c.csv", '"Report" of 2020, x\n1,2\n'), skip_bad=True)
    assert not bad and len(reading.bad) == 1
    long = json.dumps({"text": "a" * 9000}) + "\n"
    rest = "".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(900))
    found, reading = read(write(tmp_path / "d.json", long + '{"text": "brok\n' + rest), skip_bad=True)
    assert len(found) == 901 and len(reading.bad) == 1


def test_patterns_find_a_file_once(tmp_path):
    write(tmp_path / "t" / "a.txt", "one")
    write(tmp_path / "t" / "sub" / "b.txt", "two")
    assert sorted(texts(str(tmp_path / "t" / "**"))) == ["one", "two"]


def test_damaged_archives_end_with_a_line(tmp_path):
    data = bytearray(gzip.compress("".join(json.dumps({"text": prose(i)}) + "\n" for i in range(300)).encode()))
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    with pytest.raises(UserError, match="a.jsonl.gz"):
        read(write(tmp_path / "a.jsonl.gz", bytes(data)))
    with pytest.raises(UserError, match="cannot be read"):
        build(BuildOptions([str(write(tmp_path / "b.txt", "x"))], [], [str(tmp_path / "a.jsonl.gz")]), tmp_path / "c")


def test_tables_of_excel(tmp_path):
    rows = [["1", "a, b"], ["2", 'c "d"']]
    for name, data in {
        "macintosh": "id,text\r1,x\r2,y\r",
        "named separator": "sep=;\r\nid;text\r\n1;x\r\n2;y\r\n",
        "commas in the header": '"id, or number, of it";"text"\n1;x\n2;y\n',
        "blank lines first": "\n\nid\ttext\n1\tx\n2\ty\n",
    }.items():
        assert texts(write(tmp_path / "a.csv", data)) == ["x", "y"], name
    with pytest.raises(UserError, match="two columns are named text"):
        read(write(tmp_path / "b.csv", "text,text\na,b\n"))
    swallowing = "id\ttext\n" + "".join(
        f"{i}\t{chr(34) if i == 2 else ''}t{i}{chr(34) if i == 9 else ''}\n" for i in range(20)
    )
    with pytest.raises(UserError, match="a quote swallows 7 lines"):
        read(write(tmp_path / "c.tsv", swallowing))
    assert texts(write(tmp_path / "d.csv", table([dict(zip(["id", "text"], r, strict=True)) for r in rows]))) == [
        "a, b",
        'c "d"',
    ]


def test_json_lines_that_are_not(tmp_path):
    for data in (json.dumps(ROWS), json.dumps(ROWS, indent=1), "\n".join(json.dumps(r, indent=2) for r in ROWS)):
        assert texts(write(tmp_path / "a.jsonl", data)) == [r["text"] for r in ROWS]
    both = {"text": "about these", "data": ROWS}
    assert texts(write(tmp_path / "b.json", json.dumps(both))) == ["about these", *(r["text"] for r in ROWS)]
    nothing = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    assert texts(write(tmp_path / "c.ipynb", json.dumps(nothing))) == [""]
    assert texts(write(tmp_path / "d.jsonl", '{"text": null}\n{"text": "x"}\n')) == ["", "x"]


def test_tables_as_other_programs_write_them(tmp_path):
    shapes = {
        "columns of pandas": json.dumps({"id": {"0": 1, "1": 2}, "text": {"0": "a", "1": "b"}}),
        "columns of lists": json.dumps({"text": ["a", "b"], "label": [0, 1]}),
        "capital names": json.dumps([{"Text": "a"}, {"TEXT": "b"}]),
        "texts alone": json.dumps(["a", "b"]),
        "mixed types": json.dumps([{"id": 1, "text": "a", "x": [[0, "y"]]}, {"id": "NaN", "text": "b", "x": None}]),
        "no numbers": '{"text": "a", "x": NaN}\r\n\r\n{"text": "b", "x": -Infinity}\r\n',
        "one after another": '{"text": "a"}{"text": "b"}',
        "a comma too many": '[{"text": "a"}, {"text": "b"},]',
        "separators of lines": '{"text": "a"}\x1e\n{"text": "b"}',
    }
    for name, data in shapes.items():
        assert texts(write(tmp_path / "a.json", data)) == ["a", "b"], name
    assert texts(write(tmp_path / "a.jsonl", '{"text": "a\u2028b\x85c"}\n')) == ["a\u2028b\x85c"]


def test_pages_that_parsers_give_up(monkeypatch):
    said = "Deep inside there is a text that is worth reading, in full. " * 10
    deep = f"<html><body>{'<div>' * 3000}<p>{said}</p>{'</div>' * 3000}</body></html>"
    wide = f"<html><body><article><p>{said}</p><table><tr><td colspan='9007199254740991'>x</td></tr></table></article>"
    long = f"<html><body><div>{'a' * 11_000_000}</div><article><p>{said}</p></article></body></html>"
    for page in (deep, wide, long):
        assert said.strip() in html_text(page, web=False)[0]


def test_a_folder_as_people_have_it(tmp_path):
    home = tmp_path / "home"
    write(home / "note.txt", prose(1))
    write(home / "settings.json", json.dumps({"theme": "dark"}))
    write(home / "numbers.csv", "a,b\n1,2\n")
    write(home / "picture.jpg", b"\xff\xd8\xff\0\0")
    write(home / "odd.txt", bytes(range(256)) * 99)
    write(tmp_path / "elsewhere" / "linked.md", prose(2))
    (home / "link").symlink_to(tmp_path / "elsewhere")
    (home / "loop").symlink_to(home)
    (home / "gone.txt").symlink_to(tmp_path / "nothing")
    found, reading = read(home)
    assert [d.name.rpartition("/")[2] for d in found] == ["linked.md", "note.txt"]
    assert len(reading.passed) == 4 and len(reading.bad) == 1 and "odd.txt: binary" in reading.bad[0]
    assert texts(str(tmp_path / "*")) == [prose(2), prose(2), prose(1)]  # folders that a pattern matches
    with pytest.raises(UserError, match="odd.txt: binary"):
        read(home / "odd.txt")
    with pytest.raises(UserError, match="numbers.csv:1: no text"):
        read(home / "numbers.csv")


def test_stdin(tmp_path):
    rows = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
    for data in (rows, gzip.compress(rows)):
        out = tmp_path / f"c{len(data)}"
        command = [sys.executable, "-m", "craton", "corpus", "build", "-", "--out", str(out), "--json"]
        done = subprocess.run([*command, "--vocab-size", "400"], input=data, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sources"][0]["documents"] == 5


def test_names_that_are_not_utf_8(tmp_path, capsys):
    folder = os.fsencode(tmp_path / "t")
    os.mkdir(folder)
    for name in (b"caf\xe9.txt", b"ok.txt"):
        with open(os.path.join(folder, name), "w") as f:
            f.write(prose(len(name)))
    write(tmp_path / "t" / "h.jsonl", '{"text": "half a \\ud83d character"}\n{"text": "  "}\n')
    out = os.fsdecode(os.fsencode(tmp_path) + b"/c\xff")
    done = craton("corpus", "build", tmp_path / "t", "--out", out, "--vocab-size", "400")
    assert done.returncode == 0, done.stderr
    corpus = Corpus(type(tmp_path)(out))
    assert len(corpus.documents) >= 3
    build(BuildOptions([str(tmp_path / "t")], [], [], vocab_size=400), type(tmp_path)(out))  # the manifest is intact


def pdf(path, pages):
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    with PdfPages(path) as file:
        for text in pages:
            figure = Figure()
            figure.text(0.1, 0.5, text)
            file.savefig(figure)


def test_papers_with_pages(tmp_path):
    docx = pytest.importorskip("docx")
    path = tmp_path / "t" / "paper.pdf"
    path.parent.mkdir()
    pdf(path, ["The first page says this.", "The second page says that.", ""])
    pdf(tmp_path / "t" / "scan.pdf", ["", ""])
    word = docx.Document()
    word.add_heading("Title", 1)
    word.add_paragraph("A paragraph of a Word document.")
    grid = word.add_table(1, 2)
    grid.rows[0].cells[0].text, grid.rows[0].cells[1].text = "left", "right"
    word.save(tmp_path / "t" / "letter.docx")
    out = tmp_path / "c"
    manifest = build(BuildOptions([str(tmp_path / "t")], [], [], vocab_size=300), out)
    corpus = Corpus(out)
    found = {}
    for split in ("train", "heldout"):
        for row in corpus.rows(split):
            ids = corpus.read(split, int(row["start"]), int(row["tokens"])).tolist()
            found.setdefault(corpus.name_of(row).rpartition("/")[2], []).append((corpus.tokenizer.decode(ids), row))
    assert "".join(text for text, _ in found["paper.pdf"]).split("\n\n")[:2] == [
        "The first page says this.",
        "The second page says that.",
    ]
    assert int(found["paper.pdf"][0][1]["page"]) == 1 and int(found["letter.docx"][0][1]["page"]) == 0
    assert "left | right" in "".join(text for text, _ in found["letter.docx"])
    assert (
        manifest["passed_over"]["bad"] == 1 and "scan.pdf: a PDF of pictures" in manifest["passed_over"]["examples"][0]
    )
    done = craton("corpus", "build", tmp_path / "t" / "scan.pdf", "--out", tmp_path / "d")
    assert done.returncode == 2 and "ocrmypdf" in done.stderr


def test_word_documents_lose_and_repeat_nothing(tmp_path):
    docx = pytest.importorskip("docx")
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    word = docx.Document()
    paragraph = word.add_paragraph("The price is ")
    inserted = f"<w:ins {nsdecls('w')} w:id='1' w:author='a'><w:r><w:t xml:space='preserve'>not </w:t></w:r></w:ins>"
    struck = f"<w:del {nsdecls('w')} w:id='2' w:author='a'><w:r><w:delText>surely </w:delText></w:r></w:del>"
    paragraph._p.append(parse_xml(inserted))
    paragraph._p.append(parse_xml(struck))
    paragraph.add_run("fixed.")
    control = (
        f"<w:sdt {nsdecls('w')}><w:sdtContent><w:p><w:r><w:t>In a control.</w:t></w:r></w:p></w:sdtContent></w:sdt>"
    )
    word.element.body.insert(1, parse_xml(control))
    grid = word.add_table(2, 3)
    grid.cell(0, 0).merge(grid.cell(0, 2)).text = "Title"
    grid.cell(1, 0).add_table(1, 1).cell(0, 0).text = "within"
    word.save(tmp_path / "a.docx")
    box = (
        "<mc:AlternateContent xmlns:mc='http://schemas.openxmlformats.org/markup-compatibility/2006'><mc:Choice><w:txbxContent>"
        "<w:p><w:r><w:t>Box one</w:t></w:r></w:p><w:p><w:r><w:t>box two</w:t></w:r></w:p></w:txbxContent></mc:Choice>"
        "<mc:Fallback><w:txbxContent><w:p><w:r><w:t>Box one</w:t></w:r></w:p></w:txbxContent></mc:Fallback>"
        "</mc:AlternateContent>"
    )
    moved = "<w:moveFrom w:id='3' w:author='a'><w:r><w:t>moved away</w:t></w:r></w:moveFrom>"
    hyphen = "<w:r><w:t>non</w:t><w:noBreakHyphen/><w:t>breaking</w:t></w:r>"
    word.add_paragraph()._p.append(parse_xml(f"<w:r {nsdecls('w')}>{box}</w:r>"))
    last = word.add_paragraph()._p
    for child in parse_xml(f"<w:p {nsdecls('w')}>{moved}{hyphen}</w:p>"):
        last.append(child)
    word.save(tmp_path / "a.docx")
    found = docx_text(tmp_path / "a.docx", "a.docx")
    assert "Box one\nbox two" in found and found.count("Box one") == 1 and "moved away" not in found
    assert "non\u2011breaking" in found
    packed = write(tmp_path / "b.docx.gz", gzip.compress((tmp_path / "a.docx").read_bytes()))
    assert docx_text(sources.plain(packed), "b") == found
    assert found.startswith("The price is not fixed.\n\nIn a control.") and "surely" not in found
    assert found.count("Title") == 1 == found.count("within")


def test_a_page_that_cannot_be_read_costs_a_page(tmp_path, monkeypatch):
    import pypdf

    path = tmp_path / "t" / "paper.pdf"
    path.parent.mkdir()
    pdf(path, ["One is here.", "Two is here.", "Three is here."])
    real = pypdf.PageObject.extract_text

    def damaged(page, *more, **named):
        text = real(page, *more, **named)
        if "Two" in text:
            raise IndexError("list assignment index out of range")
        return text

    monkeypatch.setattr(pypdf.PageObject, "extract_text", damaged)
    manifest = build(BuildOptions([str(path)], [], [], vocab_size=300), tmp_path / "c")
    assert (
        manifest["sources"][0]["documents"] == 1 and "page 2 cannot be read" in manifest["passed_over"]["examples"][0]
    )
    corpus = Corpus(tmp_path / "c")
    ids = [i for s in ("train", "heldout") for i in corpus.read(s, 0, corpus.length(s)).tolist()]
    assert corpus.tokenizer.decode(ids).split() == "One is here. Three is here.".split()


def test_long_pages_keep_their_article(monkeypatch):
    monkeypatch.setattr(pages, "FRAGMENT", 1 << 17)
    paragraphs = [f"Paragraph {i} of the article says what the page is about, in {i} words or more." for i in range(60)]
    article = "<article><h1>On pages</h1>" + "".join(f"<p>{p}</p>" for p in paragraphs) + "</article>"
    script = "<script>var x = [" + "1234567890," * (3 * pages.FRAGMENT // 11) + "]</script>"
    rows = "".join(f"<tr><td>{i}</td></tr>" for i in range(3 * pages.FRAGMENT // 25))
    for before in (script, f"<table>{rows}</table>"):
        page = f"<!doctype html><html><body>{before}{article}</body></html>"
        for web in (False, True):
            found, _ = html_text(page, web)
            assert all(p in found for p in paragraphs), (len(before), web)
    short = "<html><body><div>Three words only.</div></body></html>"
    assert html_text(short, web=False)[0] == "Three words only."


def test_own_documents_are_kept_and_web_pages_judged(tmp_path, capsys):
    repeated = "\n".join(f"{'A line that comes again.' if i % 2 else prose(i, 2)}" for i in range(60))
    source = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": repeated + prose(i)}) + "\n" for i in range(9)))
    own = build(BuildOptions([str(source)], ["near"], [], vocab_size=400), tmp_path / "own")
    assert own["counts"]["kept"] == 9 and not own["dropped"]
    with pytest.raises(UserError, match=r"gopher_repeated_lines 9.*--rules own keeps them"):
        build(BuildOptions([str(source)], ["near"], [], vocab_size=400, rules="web"), tmp_path / "web")
    mixed = write(tmp_path / "b.jsonl", "".join(json.dumps({"text": prose(i, 30)}) + "\n" for i in range(9)))
    both = BuildOptions([str(source), str(mixed)], ["near"], [], vocab_size=400, rules="web")
    manifest = build(both, tmp_path / "both")
    out = capsys.readouterr().out
    assert (
        f"WARNING  {source}: 100 % was dropped" in out.replace("...", str(tmp_path)[: -len("")]) or "100 % was" in out
    )
    assert "repeated lines, limit 30 %" in manifest["dropped"]["gopher_repeated_lines"]["examples"][0]["measured"]
    assert [s["documents"] for s in manifest["sources"]] == [0, 9]


def test_scripts_without_spaces_are_compared_and_judged(tmp_path):
    r = random.Random(0)
    letters = [chr(c) for c in range(0x4E00, 0x5200)]

    def chinese():
        return "".join(r.choice(letters) + ("。" if i % 17 == 16 else "") for i in range(600))

    documents = [chinese() for _ in range(30)]
    copies = [d[:300] + "新" + d[301:] for d in documents[:10]]
    rows = "".join(json.dumps({"text": t}) + "\n" for t in documents + copies)
    held = write(tmp_path / "eval.jsonl", json.dumps({"q": documents[20][100:160]}) + "\n")
    source = write(tmp_path / "a.jsonl", rows)
    options = BuildOptions([str(source)], [], [str(held)], vocab_size=2000, rules="web")
    manifest = build(options, tmp_path / "c")
    dropped = {why: d["documents"] for why, d in manifest["dropped"].items()}
    assert dropped == {"near_duplicate": 10, "contaminated": 1}


def test_evaluation_files_of_other_kinds(tmp_path):
    item = " ".join(prose(900, 4).split()[:20])
    source = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": prose(i) + " " + item}) + "\n" for i in range(3)))
    good = write(tmp_path / "b.jsonl", "".join(json.dumps({"text": prose(50 + i)}) + "\n" for i in range(20)))
    for name, data in (("e.json", json.dumps([{"q": item}])), ("e.csv", f"a,question\n1,{item.replace(',', '')}\n")):
        held = write(tmp_path / name, data)
        options = BuildOptions([str(source), str(good)], [], [str(held)], vocab_size=400)
        assert build(options, tmp_path / f"c-{name}")["dropped"]["contaminated"]["documents"] == 3
    with pytest.raises(UserError, match="no text to look for"):
        empty = write(tmp_path / "none.json", "[1, 2]")
        build(BuildOptions([str(source)], [], [str(empty)]), tmp_path / "d")


def test_bills_that_differ_in_their_numbers_are_no_copies(tmp_path):
    rows = [
        prose(1, 30) + f" Bill {i}: {i * 317 % 9999} euros, {i * 71 % 997} of tax, {i * 13 % 89} items."
        for i in range(9)
    ]
    bills = [re.sub(r"\d+", lambda m, i=i: str(int(m[0]) * (i + 3) % 9973), row) for i, row in enumerate(rows)]
    source = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t * 4}) + "\n" for t in bills))
    first = " ".join(bills[0].split()[:40])
    assert len(re.findall(r"\d", first)) > 3
    manifest = build(BuildOptions([str(source)], [], [], vocab_size=400), tmp_path / "c")
    web = build(BuildOptions([str(source)], ["quality"], [], vocab_size=400, rules="web"), tmp_path / "d")
    assert (
        web["dropped"]["near_duplicate"]["documents"]
        > manifest["dropped"].get("near_duplicate", {"documents": 0})["documents"]
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_one_document_has_its_end_held_out(tmp_path, end):
    text = "\n\n".join(prose(i, 8) for i in range(400))
    out = tmp_path / "c"
    held = write(tmp_path / "book.txt", text.replace("\n", end))
    build(BuildOptions([str(held)], [], [], vocab_size=500), out)
    stored, text = text.replace("\n", end), text
    corpus = Corpus(out)
    read = {}
    for split in ("train", "heldout"):
        rows = corpus.rows(split)
        read[split] = "".join(
            corpus.tokenizer.decode(corpus.read(split, int(r["start"]), int(r["tokens"])).tolist()) for r in rows
        )
        assert stored[int(rows[0]["offset"]) :].replace("\r", "").startswith(read[split][:100])
    assert read["train"] + read["heldout"] == text
    assert 0.01 < len(read["heldout"]) / len(text) < 0.11


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \r\n\x00\x0b\u0301e\u00e9\u00c3\u00a9"), max_size=80))
def test_places_of_a_repaired_text(text):
    fixed = repair(text)
    offsets = Offsets(text, fixed)
    places = [offsets.original_of(i) for i in range(len(fixed))]
    assert places == sorted(places) and all(0 <= p <= len(text) for p in places)
    assert fixed != text or places == list(range(len(text)))


def test_places_of_words():
    text = "".join(f"word{i} caf\u00c3\u00a9{i} x\r\ncafe\u0301\x00 end{i}\x0b" for i in range(300))
    fixed = repair(text)
    offsets = Offsets(text, fixed)
    for word in ("word7 ", "word250", "end0", "end299", "x\n"):
        at = offsets.original_of(fixed.index(word))
        assert text[at:].startswith(word.rstrip())
