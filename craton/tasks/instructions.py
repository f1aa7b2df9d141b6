"""Instructions that code can check, as IFEval's (arXiv 2311.07911): the strict form, for the kinds that need no model
and no language detector."""

import json
import re
from collections.abc import Callable
from typing import Any

from craton.base import UserError
from craton.tasks.rows import Row


def _compare(count: int, relation: str | None, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _paragraphs(text: str, mark: str) -> list[str]:
    return [p for p in re.split(mark, text) if p.strip()]


def _is_json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.I)
    try:
        json.loads(inner)
    except ValueError:
        return False
    return True


Check = Callable[[str, dict[str, Any]], bool]
CHECKS: dict[str, Check] = {
    "keywords:existence": lambda a, k: all(re.search(w, a, re.I) for w in k["keywords"]),
    "keywords:forbidden_words": lambda a, k: not any(re.search(rf"\b{w}\b", a, re.I) for w in k["forbidden_words"]),
    "keywords:frequency": lambda a, k: _compare(len(re.findall(k["keyword"], a, re.I)), k["relation"], k["frequency"]),
    "keywords:letter_frequency": lambda a, k: _compare(
        a.lower().count(k["letter"].lower()), k["let_relation"], k["let_frequency"]
    ),
    "length_constraints:number_words": lambda a, k: _compare(len(_words(a)), k["relation"], k["num_words"]),
    "length_constraints:number_sentences": lambda a, k: _compare(
        len([s for s in re.split(r"(?<=[.!?])\s+", a.strip()) if s]), k["relation"], k["num_sentences"]
    ),
    "length_constraints:number_paragraphs": lambda a, k: len(_paragraphs(a, r"\s?\*\*\*\s?")) == k["num_paragraphs"],
    "length_constraints:nth_paragraph_first_word": lambda a, k: _nth_first_word(a, k),
    "detectable_content:number_placeholders": lambda a, k: len(re.findall(r"\[.*?\]", a)) >= k["num_placeholders"],
    "detectable_content:postscript": lambda a, k: k["postscript_marker"].lower() in a.lower(),
    "detectable_format:number_bullet_lists": lambda a, k: (
        len(re.findall(r"^\s*\*[^\*].*$|^\s*-.*$", a, re.M)) == k["num_bullets"]
    ),
    "detectable_format:constrained_response": lambda a, k: any(
        o in a for o in ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    ),
    "detectable_format:number_highlighted_sections": lambda a, k: (
        len([h for h in re.findall(r"\*[^\n\*]+\*", a) if h.strip("*").strip()]) >= k["num_highlights"]
    ),
    "detectable_format:multiple_sections": lambda a, k: (
        len(re.split(rf"\s?{re.escape(k['section_spliter'])}\s?\d+\s?", a)) - 1 >= k["num_sections"]
    ),
    "detectable_format:json_format": lambda a, k: _is_json(a),
    "detectable_format:title": lambda a, k: any(t.strip("<>").strip() for t in re.findall(r"<<[^\n]+>>", a)),
    "combination:two_responses": lambda a, k: _two_responses(a),
    "combination:repeat_prompt": lambda a, k: a.strip().lower().startswith(k["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": lambda a, k: a.strip().strip('"').lower().endswith(k["end_phrase"].strip().lower()),
    "startend:quotation": lambda a, k: len(a.strip()) > 1 and a.strip()[0] == a.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda a, k: _compare(
        sum(w.isupper() for w in _words(a)), k["capital_relation"], k["capital_frequency"]
    ),
    "change_case:english_capital": lambda a, k: a.isupper(),
    "change_case:english_lowercase": lambda a, k: a.islower(),
    "punctuation:no_comma": lambda a, k: "," not in a,
}


def _nth_first_word(answer: str, k: dict[str, Any]) -> bool:
    found = _paragraphs(answer, r"\n\n")
    if len(found) != k["num_paragraphs"] or k["nth_paragraph"] > len(found):
        return False
    words = found[k["nth_paragraph"] - 1].split()
    return bool(words) and words[0].lstrip("'\"").rstrip(".,?!'\"").lower() == k["first_word"].lower()


def _two_responses(answer: str) -> bool:
    found = [p.strip() for p in answer.split("******") if p.strip()]
    return len(found) == 2 and found[0] != found[1]


def followed(row: Row, answer: str) -> list[bool]:
    """For each instruction of a row whether the answer follows it. UserError for a kind that is not checked here."""
    out = []
    for kind, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        if kind == "language:response_language":
            out.append(_language(answer) == given["language"])
            continue
        if kind not in CHECKS:
            raise UserError(f"{row['where']}: the instruction {kind} is not one that is checked here")
        arguments = {k: v for k, v in (given or {}).items() if v is not None}
        out.append(bool(answer.strip()) and CHECKS[kind](answer, arguments))
    return out


def _language(text: str) -> str:
    import py3langid

    return str(py3langid.classify(text)[0])
