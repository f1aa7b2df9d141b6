"""Word arrays against plain Python."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.corpus.words import _UNSPACED, Words, _within, ngrams


@settings(deadline=None, max_examples=200)
@given(
    st.text(
        alphabet=st.characters(
            codec="utf-8",
            exclude_characters="\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
            + "".join(map(chr, range(0x2000, 0x200B))),
        )
    ).filter(lambda text: not any(_within(np.array([ord(c)]), _UNSPACED)[0] for c in text))
)
def test_words_are_those_of_split(text):
    words = Words(text)
    expected = text.split()
    assert [bytes(words.bytes[a:b]).decode() for a, b in zip(words.start, words.end, strict=True)] == expected
    assert words.characters.tolist() == [len(w) for w in expected]
    assert [len(set(pair)) for pair in zip(words.exact.tolist(), expected, strict=True)] == [2] * len(expected)
    by_hash = {}
    for h, w in zip(words.exact.tolist(), expected, strict=True):
        assert by_hash.setdefault(h, w) == w


def test_characters_are_words_where_they_are_not_spaced():
    words = Words("Say 你好，世界。ok ไทย end")
    found = [bytes(words.bytes[a:b]).decode() for a, b in zip(words.start, words.end, strict=True)]
    assert found == ["Say", *"你好世界", "ok", *"ไทย", "end"]
    assert words.unspaced == 0.7 and words.east
    assert words.characters.tolist() == [len(w) for w in found]
    assert len(set(words.exact.tolist())) == len(found)
    assert Words("ไทย").unspaced == 1 and not Words("ไทย").east


def test_folding():
    a, b = Words("Hello, World! It's 1999..."), Words("hello world its 2024 --")
    assert a.folded.tolist() == b.folded.tolist() and len(a.folded) == 4
    assert len(set(a.exact.tolist()) & set(b.exact.tolist())) == 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6))
def test_ngrams(values, n):
    words = np.array(values, np.uint64)
    grams = ngrams(words, n)
    expected = [tuple(values[i : i + n]) for i in range(len(values) - n + 1)]
    assert len(grams) == len(expected)
    for i, g in enumerate(expected):
        for j, h in enumerate(expected):
            assert (grams[i] == grams[j]) == (g == h)
