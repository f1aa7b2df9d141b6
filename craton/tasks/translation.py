"""Translation from parallel texts: the Universal Declaration of Human Rights, whose articles are numbered in every
language."""

import re

from craton.base import UserError
from craton.tasks.rows import Row

# File names in collections of the declaration (ISO 639-3), for the languages most asked for.
LANGUAGES = {
    "eng": "English",
    "fra": "French",
    "deu": "German",
    "spa": "Spanish",
    "ita": "Italian",
    "por": "Portuguese",
}
LANGUAGES |= {"nld": "Dutch", "pol": "Polish", "ces": "Czech", "swe": "Swedish", "dan": "Danish", "ron": "Romanian"}
_HEADING = re.compile(r"^\s*\D{2,24}?\s*(\d{1,2})\s*[.:\u00ba]?\s*(?:er|o|\u00ba)?\s*$", re.M)


def articles(raw: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows of {lang_file, text} -> pairs of an article in English and in another language, both ways; the first three
    articles are the train part. UserError where no two languages have their articles numbered."""
    texts = {}
    for row in (r for rows in raw.values() for r in rows):
        code = re.sub(r"\.txt$", "", str(row.get("lang_file", row.get("language", ""))))
        name = LANGUAGES.get(re.split(r"[_-]", code)[0])
        if name and name not in texts and len(found := _numbered(str(row.get("text", "")))) > 20:
            texts[name] = found
    if "English" not in texts or len(texts) < 2:
        raise UserError(
            "translation: needs rows {lang_file, text} of the declaration, eng and another language among them"
        )
    out: dict[str, list[Row]] = {"train": [], "test": []}
    for name, found in sorted(texts.items()):
        if name == "English":
            continue
        for number in sorted(set(found) & set(texts["English"])):
            for a, b in (("English", name), (name, "English")):
                row = {"from": a, "to": b, "question": texts[a][number], "answers": [texts[b][number]]}
                row |= {"id": f"{a}-{b}/{number}", "where": f"{a}-{b}:{number}", "group": f"{a}-{b}"}
                out["train" if number <= 3 else "test"].append(row)
    return out


def _numbered(text: str) -> dict[int, str]:
    """Articles by their numbers, each as one line."""
    found: dict[int, str] = {}
    headings = list(_HEADING.finditer(text))
    for i, heading in enumerate(headings):
        end = headings[i + 1].start() if i + 1 < len(headings) else len(text)
        body = " ".join(text[heading.end() : end].split())
        if body and int(heading[1]) == len(found) + 1:
            found[int(heading[1])] = body
    return found
