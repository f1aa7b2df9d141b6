"""How an answer is judged: each scorer looks at what was written and says how good it is, from 0 to 1, and what it took
for the answer; choices are judged by how likely they are.
"""

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from craton.base import UserError
from craton.tasks.generated import VERIFIERS
from craton.tasks.layouts import boxed
from craton.tasks.task import CHOICE, Example, Task

if TYPE_CHECKING:  # it brings torch, a second and more
    from craton.engine.score import Likelihood


@dataclass(frozen=True)
class Verdict:
    """score: the task's metric for this answer. parsed: what was taken for the answer; None if none was found.
    metrics: others beside it. note: why, where it needs saying."""

    score: float
    parsed: str | None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""


def squad_normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's own script, arXiv 1606.05250)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _plain(text: str) -> str:
    """As lm-eval's exact_match with ignore_case and ignore_punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).strip()


def _exact(task: Task, example: Example, answer: str) -> Verdict:
    given = answer.strip()
    if task.kind == "generated":
        return Verdict(float(given in example.targets), given or None)
    right = float(any(_plain(given) == _plain(t) for t in example.targets))
    strict = float(given in {t.strip() for t in example.targets})
    return Verdict(right, given or None, {"strict": strict, "f1": _best_f1(given, example.targets)})


def _normalized(task: Task, example: Example, answer: str) -> Verdict:
    given = squad_normalised(answer)
    right = float(any(given == squad_normalised(t) for t in example.targets))
    return Verdict(right, given or None, {"f1": _best_f1(answer, example.targets)})


def _f1_of(answer: str, target: str) -> float:
    a, b = squad_normalised(answer).split(), squad_normalised(target).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def _best_f1(answer: str, targets: tuple[str, ...]) -> float:
    return max((_f1_of(answer, t) for t in targets), default=0.0)


def _f1(task: Task, example: Example, answer: str) -> Verdict:
    exact = float(any(squad_normalised(answer) == squad_normalised(t) for t in example.targets))
    return Verdict(_best_f1(answer, example.targets), answer.strip() or None, {"exact_match": exact})


_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def _as_number(text: str) -> str:
    text = re.sub(r"[,$%\s]", "", text).rstrip(".")
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _numeric(task: Task, example: Example, answer: str) -> Verdict:
    """The number after ####, or else the last one that was written; both as lm-eval's filters for GSM8K."""
    targets = {_as_number(t) for t in example.targets}
    strict = _STRICT.search(answer)
    found = [a or b for a, b in _FLEXIBLE.findall(answer)]
    last = next((f for f in reversed(found) if re.search(r"\d", f)), None)
    flexible = float(last is not None and _as_number(last) in targets)
    exact = float(strict is not None and _as_number(strict[1]) in targets)
    return Verdict(flexible, last, {"exact_match,strict-match": exact, "exact_match,flexible-extract": flexible})


def math_normalised(text: str) -> str:
    r"""An answer in LaTeX without what does not change it, after the MATH data set's own script (arXiv 2103.03874)."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\").replace("tfrac", "frac")
    text = text.replace("dfrac", "frac").replace("\\left", "").replace("\\right", "").replace("^{\\circ}", "")
    text = text.replace("^\\circ", "").replace("\\$", "").replace("\\%", "").replace("%", "").replace("\\ ", "")
    text = re.sub(r"\\text\{ .*?\}$", "", text)
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    return "\\frac{1}{2}" if text == "0.5" else text


def _math(task: Task, example: Example, answer: str) -> Verdict:
    given = boxed(answer)
    if not given and (dollars := [i for i, c in enumerate(answer) if c == "$"]):
        given = answer[dollars[0] + 1 : dollars[-1]] if len(dollars) > 1 else answer
    if not given and (said := re.search(r"answer is:? (.+?)(?:\.\s|\.?$)", answer, re.M)):
        given = said[1]
    given = given or answer.strip()
    right = any(math_normalised(given) == math_normalised(boxed(t) or t) for t in example.targets)
    return Verdict(float(right), given or None)


def _regex(task: Task, example: Example, answer: str) -> Verdict:
    found = re.search(task.options["pattern"], answer)
    if found is None:
        return Verdict(0.0, None)
    given = (found[1] if found.re.groups else found[0]) or ""
    if not any(example.targets):
        return Verdict(1.0, given)
    return Verdict(float(given.strip() in {t.strip() for t in example.targets}), given)


def first_json(text: str) -> Any:
    """The first JSON object or array in a text; None if there is none."""
    decoder = json.JSONDecoder()
    for at, character in enumerate(text):
        if character in "{[":
            try:
                return decoder.raw_decode(text, at)[0]
            except (ValueError, RecursionError):
                continue
    return None


def _json(task: Task, example: Example, answer: str) -> Verdict:
    """The share of the target's fields that are right; all of them is exact_match."""
    given, wanted = first_json(answer), first_json(example.targets[0])
    if not isinstance(wanted, dict):
        raise UserError(f"{example.row.get('where')}: the target is no JSON object", field="target")
    if not isinstance(given, dict):
        return Verdict(0.0, None, {"exact_match": 0.0})
    same = [_same(given.get(key), value) for key, value in wanted.items()]
    share = sum(same) / max(1, len(same))
    return Verdict(share, json.dumps(given, ensure_ascii=False), {"exact_match": float(share == 1)})


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return unicodedata.normalize("NFC", a.strip()) == unicodedata.normalize("NFC", b.strip())
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def extract_code(answer: str) -> str:
    """The code of an answer: its first fenced block, or all of it where there is none."""
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", answer, re.S)
    return fenced[1] if fenced else answer


def _code(task: Task, example: Example, answer: str) -> Verdict:
    from craton.tasks.sandbox import passes

    before, code = example.row.get("before", ""), extract_code(answer)
    whole = "```" in answer and re.search(rf"\bdef {re.escape(str(example.row.get('entry_point', '')))}\b", code)
    program = f"{before}\n{code}" if whole else before + code  # the prompt's imports count in both
    outcome = passes(program, example.row["tests"], task.options.get("sandbox"))
    return Verdict(float(outcome.passed), code.strip() or None, note=outcome.reason)


def _verified(task: Task, example: Example, answer: str) -> Verdict:
    if "verify" in example.row:  # reasoning-gym brings its own
        score = float(example.row["verify"](answer.strip(), example.row["entry"]))
    else:
        score = float(VERIFIERS[task.options["verifier"]](example.row, answer.strip()))
    return Verdict(score, answer.strip() or None)


def _by_library(metric: str) -> Callable[[Task, Example, str], Verdict]:
    def score(task: Task, example: Example, answer: str) -> Verdict:
        given, targets = answer.strip(), list(example.targets)
        try:
            if metric == "rouge":
                from rouge_score import rouge_scorer

                found = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
                scores = [found.score(t, given) for t in targets]
                means = {name: max(s[name].fmeasure for s in scores) for name in scores[0]}
                return Verdict(means["rougeL"], given or None, means)
            import sacrebleu
        except ImportError:
            raise UserError(f"task {task.name}: {metric} needs pip install 'craton[eval]'") from None
        chrf = sacrebleu.sentence_chrf(given, targets).score / 100
        bleu = sacrebleu.sentence_bleu(given, targets).score / 100
        return Verdict(chrf if metric == "chrf" else bleu, given or None, {"chrf": chrf, "bleu": bleu})

    return score


def _ifeval(task: Task, example: Example, answer: str) -> Verdict:
    from craton.tasks.instructions import followed

    kept = followed(example.row, answer)
    share = sum(kept) / max(1, len(kept))
    return Verdict(float(all(kept)), answer.strip() or None, {"inst_level_strict_acc": share})


SCORERS: dict[str, Callable[[Task, Example, str], Verdict]] = {
    "exact": _exact, "normalized": _normalized, "f1": _f1, "numeric": _numeric, "math": _math, "regex": _regex,
    "json": _json, "code": _code, "verified": _verified, "chrf": _by_library("chrf"), "bleu": _by_library("bleu"),
    "rouge": _by_library("rouge"), "ifeval": _ifeval,
}  # fmt: skip
METRIC = {"exact": "exact_match", "normalized": "exact_match", "f1": "f1", "numeric": "exact_match", "json": "fields"}
METRIC |= {"math": "exact_match", "regex": "match", "code": "pass@1", "choice": "acc", "judge": "grade"}
METRIC |= {"verified": "exact_match", "chrf": "chrf", "bleu": "bleu", "rouge": "rougeL", "completion": "acc"}


def judge_choices(
    task: Task, e: Example, found: Sequence["Likelihood"], alone: Sequence["Likelihood"]
) -> tuple[dict[str, float], dict[str, Any]]:
    """An item's score by each metric, as the field names them, and its part of a sample."""
    sums = [s.total for s in found]
    if task.scorer != CHOICE:
        right = float(found[0].greedy)
        answer = e.choices[0] if found[0].greedy else None
        return {"acc": right}, {"target": e.choices[0], "answer": answer, "loglikelihoods": sums}
    assert e.gold is not None
    normalised = {
        "acc": sums,
        "acc_norm": [s / max(1, len(t)) for s, t in zip(sums, e.texts, strict=True)],
        "acc_bytes": [s / max(1, len(t.encode())) for s, t in zip(sums, e.texts, strict=True)],
        "acc_per_token": [s.total / max(1, s.tokens) for s in found],
    }
    if alone:
        normalised["acc_mutual_info"] = [s - a.total for s, a in zip(sums, alone, strict=True)]
    picks = {metric: max(range(len(v)), key=v.__getitem__) for metric, v in normalised.items()}
    values = {metric: float(pick == e.gold) for metric, pick in picks.items()}
    return values, {"target": e.gold, "answer": picks[task.metric], "loglikelihoods": sums}


def judge_prompt(task: Task, example: Example, answer: str) -> str:
    """What a model that judges is asked; it ends its reply with a grade from 1 to 5."""
    rubric = task.options.get("rubric", "Is the answer right, complete and clear?")
    target = f"\n\n[A right answer]\n{example.targets[0]}" if example.targets and example.targets[0] else ""
    asked = f"[Question]\n{example.prompts[0]}{target}\n\n[Answer to judge]\n{answer}\n\n[Rubric]\n{rubric}"
    return f"{asked}\n\nJudge the answer by the rubric. End with a line 'Grade: N', N from 1 (worst) to 5 (best)."


def judged(reply: str) -> Verdict:
    """The grade in a judge's reply, from 0 to 1."""
    found = re.findall(r"[Gg]rade:?\W{0,4}([1-5])\b", reply) or re.findall(r"\b([1-5])\b", reply)[-1:]
    if not found:
        return Verdict(0.0, None, note="the judge gave no grade")
    return Verdict((int(found[-1]) - 1) / 4, found[-1])
