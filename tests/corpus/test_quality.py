"""The quality rules: one document that fails each, ordinary ones that pass all."""

import re

import pytest

from craton.corpus import quality
from craton.corpus.words import Words
from tests.conftest import STDLIB, prose


def why(text, html=False, language="en"):
    found = quality.reject_prose(text, Words(text), html, language)
    return found and found.rule


def test_ordinary_prose_passes():
    for seed in range(200):
        assert why(prose(seed)) is None


def test_hard_wrapped_prose_passes():
    import textwrap

    for seed in range(50):
        assert (
            why("\n\n".join(textwrap.fill(prose(seed * 100 + i, 6).replace("\n", " "), 70) for i in range(6))) is None
        )


CASES = {
    "gopher_under_50_words": "Far too short to keep.",
    "gopher_mean_word_length": "a b c d e f g h i to the " * 30,
    "gopher_symbols": prose(1) + " # # #" * 60,
    "gopher_bullet_lines": "\n".join("- " + line for line in prose(2, 120).split("\n")),
    "gopher_ellipsis_lines": "\n".join(line + "..." for line in prose(3).split("\n")),
    "gopher_words_without_letters": prose(4) + " 123456 98765" * 60,
    "gopher_stop_words": re.sub(r"\b(the|be|to|of|and|that|have|with)\d*\b", "xu", prose(5, 60), flags=re.I),
    "gopher_repeated_lines": (prose(6, 4) + "\n") * 10,
    "gopher_top_ngram": "\n".join(line + " subscribe now friends" * 3 for line in prose(7, 60).split("\n")),
    "gopher_repeated_ngrams": prose(8, 12) + "\n" + prose(8, 12).replace("\n", " x "),
    "c4_lorem_ipsum": prose(9) + " Lorem ipsum dolor sit amet.",
    "fineweb_line_ends": "\n".join(" ".join(prose(i, 3).split()[:20]).rstrip(".") for i in range(30)),
    "fineweb_short_lines": "\n".join(" ".join(prose(i, 3).split()[:4]) + "." for i in range(60)),
}


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_fires(rule):
    assert why(CASES[rule]) == rule


def test_rules_for_web_pages_only():
    text = prose(10) + "\nvar x = {};"
    assert why(text, html=True) == "c4_curly_bracket" and why(text) is None
    assert (
        quality.strip_html_lines(
            "Accept the cookie policy to go on.\nA line that stays here.\nHome\nEnable javascript to see this."
        )
        == "A line that stays here."
    )


def test_english_rule_can_be_left_out():
    other = CASES["gopher_stop_words"]
    assert why(other) == "gopher_stop_words" and why(other, language="") is None


def test_code_and_prose_are_told_apart():
    for name in ("argparse.py", "ast.py", "queue.py", "shutil.py"):
        text = (STDLIB / name).read_text()
        assert quality.kind_of(text) == "code" and quality.reject_code(text) is None
    for seed in range(50):
        assert quality.kind_of(prose(seed)) == "prose"


def test_code_rules():
    assert quality.reject_code("x = 1\n" + "y" * 1001) is not None
    assert quality.reject_code("a = [" + ", ".join(["0x1f"] * 200) + "]").rule == "code_mean_line_over_100"
    assert quality.reject_code("# This file is auto-generated\nx = 1\n").rule == "code_generated"
    assert quality.reject_code("+-+-+-\n" * 50).rule == "code_alphanumeric_under_25_percent"


def test_repair():
    assert quality.repair("caf\u00c3\u00a9 and cafe\u0301\r\nline\x00") == "caf\u00e9 and caf\u00e9\nline"


def test_personal_data():
    text, n = quality.mask_personal(
        "Write to jane.doe@corp.example.org or 8.8.8.8, phone (415) 555-2671; 127.0.0.1 and 1.2.3 stay."
    )
    assert n == 3 and "jane" not in text and "8.8.8.8" not in text and "2671" not in text
    assert "127.0.0.1 and 1.2.3 stay" in text
