"""Whether a piece of text answers a question or supports a statement, told from the words, numbers and names in it. No
model is asked, so that a model cannot be wrong about it."""

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from craton.retrieval.passages import sentences
from craton.retrieval.store import Stored

# Words of questions that say nothing of what is asked about.
_ASKING = frozenset(
    """what which who whom whose when where why how is are was were be been do does did has have had can could would
    should will the a an of in on at to for from by with about into and or not it its this that these those there
    many much long old far often tell me give say name list find show explain describe please according documents
    document year date go goes went gone get got happen happened text any some you your we our us kind type""".split()
)
_TOKEN = re.compile(r"\d[\d.,]*\d|\d|[^\W\d_]+(?:['’][^\W\d_]+)?", re.UNICODE)
_NUMBER = re.compile(r"\d")
_PRONOUN = re.compile(r"(?:He|She|It|They|Its|His|Her|Their)\b")
_DENIED = re.compile(
    r"\b(?:not|never|no|nobody|none|nothing|neither|nor|without|cannot|denie[sd]|deny|myth|false|unless|if)\b|n['’]t\b",
    re.I,
)
_HOW_MANY = re.compile(
    r"\b(?:when|how (?:many|much|old|long|far|tall|high|large|often)|(?:what|which) (?:year|date|day))\b", re.I
)
_WHO = re.compile(r"\b(?:who|whom|whose)\b", re.I)
_WHY = re.compile(r"\bwhy\b", re.I)
_REASON = re.compile(r"\b(?:because|since|due|owing|reasons?|caused?|therefore|so that|in order)\b", re.I)
_DATES = frozenset(
    "january february march april may june july august september october november december monday tuesday wednesday "
    "thursday friday saturday sunday".split()
)
_WORDS_FOR = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True))
_LABEL = re.compile(r"[^\n.!?]{1,80}:\s*$")
_BEFORE = 2  # sentences whose words count for the one after them, for what it speaks of may stand there
_LABELLED = 0.12  # for words of a question that a line is labelled by
_STRANGE = 0.02  # for each word of a title that shares a name with the question but is not in it: another Guinea
_BESIDE = 0.015  # for each word of a label that was not asked about, at most six
FOUND = 0.72  # of the weight of a question's words, that an answer's sentence and what stands above it hold at least
ASKED = 0.67  # and of the weight of those that are no names
SUPPORTED = 0.8  # of the weight of a statement's words, that its citation holds at least


@dataclass(frozen=True)
class Span:
    """A piece of a passage. start, end: characters of the document."""

    passage: Stored
    start: int
    end: int
    score: float = 0.0

    @property
    def quote(self) -> str:
        return self.passage.text[self.start - self.passage.start : self.end - self.passage.start]


@dataclass
class Terms:
    """Words of a text with what each weighs. names: those that must not be missing, as they are stemmed."""

    weights: dict[str, float]
    names: set[str] = field(default_factory=set)
    question: str = ""
    first: str = ""  # a capital letter begins it as it begins a sentence, so that it may be a name

    @property
    def total(self) -> float:
        return sum(self.weights.values())


Stem = Callable[[str], str]
Weight = Callable[[str], float]


def numbers_in(text: str) -> set[str]:
    """Numbers as they are compared: without separators of thousands, in digits, with their sign."""
    out = set()
    for match in _TOKEN.finditer(text):
        token = match[0]
        if _NUMBER.match(token):
            plain = re.sub(r",(?=\d{3}\b)", "", token).rstrip(".,")
            out.add("-" + plain if re.search(r"(?:^|\s)[-−]$", text[: match.start()]) else plain)
        elif token.lower() in _WORDS_FOR:
            out.add(str(_WORDS_FOR[token.lower()]))
    return out


def words_in(text: str, stem: Stem) -> set[str]:
    """Stemmed words and numbers of a text."""
    text = unicodedata.normalize("NFC", text)
    return {stem(t.lower()) for t in _TOKEN.findall(text) if not _NUMBER.match(t)} | numbers_in(text)


def terms_of(question: str, stem: Stem, weight: Weight) -> Terms:
    """What a question asks about. Names: numbers, and words that begin with a capital letter but for the first."""
    question = unicodedata.normalize("NFC", question)
    out = Terms({}, question=question)
    for place, match in enumerate(_TOKEN.finditer(question)):
        token = match[0]
        if token.lower() in _ASKING or (len(token) == 1 and not token.isdigit() and token.isascii()):
            continue
        key = stem(token.lower()) if not _NUMBER.match(token) else next(iter(numbers_in(token)), token)
        weighs = weight(token)
        if not weighs:
            continue
        out.weights[key] = weighs
        if _NUMBER.match(token) or (token[0].isupper() and place > 0):
            out.names.add(key)
            if place == 1 and out.first and token[0].isupper():
                out.names.add(out.first)  # a first name
        elif token[0].isupper():
            out.first = key
    return out


def named(question: Terms, passages: Iterable[Stored], stem: Stem) -> set[str]:
    """Titles that stand whole in a question, names among their words: what it asks about. Of two, one within the other,
    the longer."""
    found: dict[str, frozenset[str]] = {}
    for passage in passages:
        words = frozenset(words_in(passage.title, stem) - _ASKING)
        if words and words <= question.weights.keys() and words & {*question.names, question.first}:
            found[passage.title] = words
    return {title for title, words in found.items() if not any(words < other for other in found.values())}


def best_span(question: Terms, passages: Iterable[Stored], stem: Stem) -> Span | None:
    """The sentence, of those passages, that answers a question best, with what stands above it; None where none holds
    enough of it. The passages come in the order in which a search found them, which decides between equal ones."""
    best: Span | None = None
    for rank, passage in enumerate(passages):
        for span in _spans(question, passage, stem):
            score = span.score - 0.0002 * min(rank, 50)
            if best is None or score > best.score + 1e-9:
                best = Span(span.passage, span.start, span.end, score)
    return best


def _spans(question: Terms, passage: Stored, stem: Stem) -> Iterable[Span]:
    """Each sentence or line that answers a question, the better the higher its score. Clauses are looked at one by one,
    since what stands in two of them need not belong together."""
    title = words_in(passage.title, stem)
    above = title | words_in(passage.heading, stem)
    before: list[set[str]] = []
    label: tuple[int, set[str]] | None = None
    last = 0
    below = 0  # how many lines or clauses under it
    whole = [(a, b) for a, b in sentences(passage.text)]
    for a, b in sentences(passage.text, clauses=True):
        text = passage.text[a:b]
        own = words_in(text, stem)
        if text.startswith("#"):
            label, before = None, []
            continue
        if "\n\n" in passage.text[last:a]:
            label = None  # it is of the lines below it, up to a blank one
        last = b
        if _LABEL.match(text):
            label, before, below = (a, own), [], 0
            continue
        below += 1
        near = set[str]().union(*before[-_BEFORE:]) if _PRONOUN.match(text) else set()
        before.append(own)
        labelled = label[1] if label is not None else set()
        held = (
            dict.fromkeys(near, 0.85)
            | dict.fromkeys(labelled, max(0.9, 0.98 - 0.01 * below))
            | dict.fromkeys(above, 0.95)
        )
        held |= dict.fromkeys(own if not title or title - question.weights.keys() else own | title, 1.0)
        says = _label_of(text, stem) | labelled
        if not own - question.weights.keys() or not _answers(question, held, title):
            continue  # a line that only repeats the question tells nothing
        if not _fits(question, text, labelled=bool(says & question.weights.keys() - title)):
            continue
        score = _share(question.weights, held) + _LABELLED * _share(question.weights, dict.fromkeys(says, 1.0))
        score -= _BESIDE * min(6, len(says - question.weights.keys() - title - _ASKING))
        if title & question.names:
            score -= _STRANGE * len(title - question.weights.keys())
        start, end = next((x, y) for x, y in whole if x <= a < y)
        if label is not None and labelled & question.weights.keys() and end - label[0] < 400:
            start = label[0]
        yield Span(passage, passage.start + start, passage.start + end, score)


def _share(weights: dict[str, float], held: dict[str, float]) -> float:
    return sum(w * held.get(t, 0.0) for t, w in weights.items()) / (sum(weights.values()) or 1.0)


def _fits(question: Terms, text: str, labelled: bool) -> bool:
    """Whether a text is of the kind that is asked for: a number for when and how many, a name for who, a reason for
    why; and denies nothing that the question does not, unless it is labelled by what is asked for (armed forces:
    none)."""
    asked = question.question
    if not labelled and _DENIED.search(text) and not _DENIED.search(asked):
        return False
    if _HOW_MANY.search(asked) and not numbers_in(text) - numbers_in(asked):
        return False
    if _WHO.search(asked):
        known = {t.lower() for t in _TOKEN.findall(asked)}
        others = [t for t in _TOKEN.findall(text) if t[0].isupper() and t.lower() not in known | _ASKING]
        if not others:
            return False
    return not _WHY.search(asked) or bool(_REASON.search(text))


def _answers(question: Terms, held: dict[str, float], title: set[str]) -> bool:
    """Whether words answer a question: they hold most of it, all its names and numbers, and most of what is asked about
    the names too."""
    asked = {t: w for t, w in question.weights.items() if t not in question.names and t not in title}
    if question.names - held.keys() or _share(question.weights, held) < FOUND:
        return False
    return not asked or _share(asked, held) >= ASKED


def _label_of(text: str, stem: Stem) -> set[str]:
    """Words before a colon near a line's beginning, which say what the line is about."""
    label, colon, _ = text[:80].rpartition(":")
    return words_in(label, stem) if colon and not label.startswith("http") else set()


def supports(statement: str, quote: str, context: str, stem: Stem, weight: Weight) -> bool:
    """Whether a quote, under what stands above it (context), bears out a statement: every number and name of it is
    there, and most of its other words by weight."""
    terms = terms_of(statement, stem, weight)
    held = words_in(f"{context} {quote}", stem)
    words = [w for t, w in terms.weights.items() if not _NUMBER.match(t)]
    if terms.first and terms.first not in held and terms.weights[terms.first] > 0.5 * max(words):
        return False  # perhaps a name
    if not terms.weights or not terms.names <= held or not numbers_in(statement) <= held:
        return False
    if bool(_DENIED.search(statement)) != bool(_DENIED.search(quote)) or not words:
        return False
    if not _counted(statement, stem) <= _counted(quote, stem) or not _in_order(statement, quote, terms.names, stem):
        return False
    covered = sum(w for t, w in terms.weights.items() if t in held)
    return covered >= SUPPORTED * terms.total


def _counted(text: str, stem: Stem) -> set[tuple[str, str]]:
    """Each number with the word after it, which says of what: 5 million, 20 pounds."""
    out = set()
    tokens = [m[0] for m in _TOKEN.finditer(text)]
    for token, after in itertools.pairwise(tokens):
        if (_NUMBER.match(token) or token.lower() in _WORDS_FOR) and after.lower() not in _ASKING:
            out |= {(number, stem(after.lower())) for number in numbers_in(token)}
    return out


def _in_order(statement: str, quote: str, names: set[str], stem: Stem) -> bool:
    """Whether the names that both texts hold come in the same order, and so the numbers, so that who did it to whom is
    the same."""
    said, there = _order(statement, names, stem), _order(quote, names, stem)
    return all([k for k in a if k in b] == [k for k in b if k in a] for a, b in zip(said, there, strict=True))


def _order(text: str, names: set[str], stem: Stem) -> tuple[list[str], list[str]]:
    """Names and numbers of a text as they come. Months and days may stand anywhere."""
    words, numbers = dict[str, None](), dict[str, None]()
    for token in _TOKEN.findall(text):
        if _NUMBER.match(token):
            numbers |= dict.fromkeys(numbers_in(token))
        elif token.lower() not in _DATES and stem(token.lower()) in names:
            words[stem(token.lower())] = None
    return list(words), list(numbers)


def rarity(documents: int, holding: int) -> float:
    """What a word weighs that so many of the documents hold: Lucene's idf, at most that of one in a hundred."""
    idf = math.log(1 + (documents - holding + 0.5) / (holding + 0.5))
    return 0.3 + min(idf, math.log(1 + 100))
