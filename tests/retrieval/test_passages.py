"""Passages lie side by side and are the whole text, cut where its structure says."""

from hypothesis import given, settings
from hypothesis import strategies as st

from craton.retrieval.index import tokens_of
from craton.retrieval.passages import cut, sentences

PIECES = st.sampled_from(
    ["# Title\n", "## Part\n\n", "Some words here. More of them!\n", "\n", "a|b\n", "def f(x):\n    return x\n\n",
     "word " * 90, "Name\n====\n", "```\n# code\n```\n", "x" * 900, "  \n", "éü 漢字。次。\n",
     "@cached\nclass A:\n    pass\n"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=25), st.sampled_from(["prose", "code", "table"]), st.integers(5, 80))
def test_passages_are_the_whole_text(pieces, kind, size):
    text = "".join(pieces)
    found = cut(text, kind, size, tokens_of)
    assert "".join(text[p.start : p.end] for p in found) == text
    assert all(tokens_of(text[p.start : p.end]) <= 2 * size + 2 for p in found)


def test_headings_stand_above_what_they_head():
    text = "# Birds\n\nThey fly.\n\n## Owls\n\nThey fly at night.\n\n# Fish\n\nThey swim.\n\nDeep\n----\n\nSome glow.\n"
    found = {text[p.start : p.end].split("\n\n")[1].strip(): p.heading for p in cut(text, "prose", 6, tokens_of)}
    assert found["They fly at night."] == "Birds > Owls" and found["They swim."] == "Fish"
    assert found["Some glow."] == "Fish > Deep"


def test_functions_and_rows_stay_whole():
    code = "import os\n\n\n" + "".join(f"def f{i}(x):\n    y = x + {i}\n    return y\n\n\n" for i in range(9))
    for p in cut(code, "code", 20, tokens_of)[1:]:
        assert code[p.start : p.end].startswith("def f")
    table = "part,price\n" + "".join(f"bolt {i},{i}\n" for i in range(60))
    later = cut(table, "table", 30, tokens_of)[1:]
    assert later and all(p.heading == "part,price" and table[p.start : p.end].startswith("bolt") for p in later)


def test_sentences():
    text = "Dr. Smith came at 9.30 a.m. on Monday. He left! \nA line\nJ. S. Bach; and so on. Next"
    found = [text[a:b] for a, b in sentences(text)]
    assert found[0].startswith("Dr. Smith came") and "He left!" in found and "A line" in found and found[-1] == "Next"
    assert [text[a:b] for a, b in sentences(text, clauses=True)][-2] == "and so on."
