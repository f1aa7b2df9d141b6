"""Search by words: BM25 as Lucene scores it, by the bm25s package."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from craton.corpus import quality

# Languages with a stemmer, by their ISO 639-1 codes.
STEMMERS = {
    "ar": "arabic", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "fi": "finnish",
    "fr": "french", "hu": "hungarian", "it": "italian", "lt": "lithuanian", "nl": "dutch", "no": "norwegian",
    "pt": "portuguese", "ro": "romanian", "ru": "russian", "sv": "swedish", "tr": "turkish",
}  # fmt: skip
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]+")
_WITHOUT_SPACES = ("zh", "ja", "th")  # languages that are written so
_WORD = re.compile(r"(?u)\b\w\w+\b")
_CHUNK = 8192  # texts whose words are taken at once


def language_of(texts: Iterable[str]) -> str:
    """The language of most of some texts, as an ISO 639-1 code."""
    votes: dict[str, int] = {}
    for text in texts:
        if (code := quality.language_of(text[:2000])) is not None:
            votes[code] = votes.get(code, 0) + 1
    return max(votes, key=lambda code: votes[code], default="en")


def _pairs(found: re.Match[str]) -> str:
    run = found[0]
    return " " + " ".join(run[i : i + 2] for i in range(max(1, len(run) - 1))) + " "


class Words:
    """The words of texts in a language as they are counted: lower case, without stop words, stemmed; of scripts without
    spaces, pairs of characters."""

    def __init__(self, language: str):
        import Stemmer
        from bm25s.tokenization import Tokenizer

        self.pairs = language in _WITHOUT_SPACES

        stemmer = Stemmer.Stemmer(STEMMERS[language]) if language in STEMMERS else None
        try:
            self.tokenizer: Any = Tokenizer(stemmer=stemmer, stopwords=language, splitter=_WORD.pattern)
        except ValueError:  # no list of stop words for it
            self.tokenizer = Tokenizer(stemmer=stemmer, stopwords=[], splitter=_WORD.pattern)

    def ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Numbers of each text's words; new words get new ones."""
        chunk: list[str] = []
        for text in texts:
            chunk.append(text)
            if len(chunk) == _CHUNK:
                yield from self._taken(chunk, "ids")
                chunk = []
        yield from self._taken(chunk, "ids")

    def of(self, text: str) -> list[str]:
        """A text's words."""
        return list(self._taken([text], "string")[0])

    def _taken(self, texts: list[str], what: str) -> Any:
        texts = [unicodedata.normalize("NFC", t) for t in texts]
        texts = [_UNSPACED.sub(_pairs, t) for t in texts] if self.pairs else texts
        how = {"update_vocab": True, "return_as": what, "show_progress": False, "allow_empty": False}
        return self.tokenizer.tokenize(texts, **how) if texts else []


class Lexical:
    """An index of words on disk, mapped into memory."""

    def __init__(self, folder: Path, language: str):
        import bm25s

        self.words = Words(language)
        self.found = bm25s.BM25.load(folder, mmap=True, load_corpus=False)

    @staticmethod
    def write(texts: Iterable[str], folder: Path, language: str) -> None:
        """The index of some texts, which are seen once."""
        import bm25s

        words = Words(language)
        ids = list(words.ids(texts))
        made = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        made.index((ids, words.tokenizer.get_vocab_dict()), show_progress=False)
        made.save(folder, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """(texts,) fp32: 0 of those without any of the query's words."""
        known = self.found.vocab_dict
        ids = [known[w] for w in self.words.of(query) if w in known]
        if not ids:
            return np.zeros(self.found.scores["num_docs"], np.float32)
        return self.found.get_scores_from_ids(ids)
