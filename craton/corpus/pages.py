"""The text of a page of the web (HTML)."""

import re
from html import unescape

from craton.corpus import quality

# Characters; a longer page is taken apart in pieces of about so many, since a tree needs 80 times that.
FRAGMENT = 1 << 20
MAIN = 0.6  # of what a reader sees, that the main text of an own page is at least
_UNSEEN = re.compile(r"<(script|style|svg|noscript|template)\b[^>]*>.*?</\1\s*>|<!--.*?-->", re.I | re.S)
_TAG = re.compile(r"<[a-zA-Z/!?][^<>]*>")
_BREAK = re.compile(r"\s*<(?:/?(?:p|div|tr|li|ul|ol|table|h[1-6]|section|article|pre|title|body)|br)\b[^<>]*>", re.I)
_DATA = re.compile(r"""(["'(])data:[^"')]{200,}""")
_END_OF_BLOCK = re.compile(r"</(?:article|section|table|tr|ul|ol|div|p|pre|h[1-6]|body)\s*>", re.I)


def html_text(page: str, web: bool) -> tuple[str, str]:
    """The main text of a page, '' if it has none, and all that a reader would see. web: without the lines that C4 takes
    out; else, where under MAIN of what is seen is found, all of that."""
    if len(page) > FRAGMENT:
        page = _DATA.sub(r"\1data:", _UNSEEN.sub(" ", page))
    both = [_main_text(f, web) for f in _fragments(page)]
    found, seen = ("\n".join(text for text in texts if text) for texts in zip(*both, strict=True))
    return quality.strip_html_lines(found) if web else found, seen


def _main_text(page: str, web: bool) -> tuple[str, str]:
    import trafilatura

    found = trafilatura.extract(
        page, include_comments=False, deduplicate=False, favor_precision=web, favor_recall=not web
    )
    seen = visible_text(page)
    main = str(found or "")
    return (main if web or len(main) >= MAIN * len(seen) else seen), seen


def visible_text(page: str) -> str:
    """All that a reader would see, whatever the page is like: pages nested too deeply for a parser too."""
    body = _BREAK.sub("\n", _UNSEEN.sub(" ", page))
    lines = (" ".join(line.split()) for line in unescape(_TAG.sub("", body)).split("\n"))
    return "\n".join(line for line in lines if line)


def _fragments(page: str) -> list[str]:
    """The page, cut after blocks where it is long."""
    out, at = [], 0
    while len(page) - at > 2 * FRAGMENT:
        end = _END_OF_BLOCK.search(page, at + FRAGMENT)
        cut = min(end.end() if end else len(page), at + 2 * FRAGMENT)
        out.append(page[at:cut])
        at = cut
    return [*out, page[at:]]
