"""The layouts that rows are published in, by their fields, each turned into the same few: question, context, choices,
gold, answers, and what code is tested with.

A row that is in none of them keeps its own fields. Sources: the data sets' own files, their copies on the hub, and
llm-foundry's evaluation files (query, choices, gold; context, continuation; context, answer; context_options).
"""

import re
from collections.abc import Callable
from typing import Any

from craton.base import UserError
from craton.tasks.rows import Row
from craton.tasks.task import LETTERS

Read = Callable[[Row], Row]


def _number(value: Any) -> int:
    """A label as an index: 2, "2", "C"."""
    text = str(value).strip()
    return LETTERS.index(text) if len(text) == 1 and text in LETTERS else int(text)


def _labelled(question: Any, choices: Any, key: Any) -> Row:
    """Choices with labels, (A, B, ...) or (1, 2, ...), and the label of the right one."""
    if isinstance(choices, dict):
        labels, texts = list(choices["label"]), list(choices["text"])
    else:
        labels, texts = [c["label"] for c in choices], [c["text"] for c in choices]
    return {"question": str(question).strip(), "choices": texts, "gold": labels.index(str(key).strip())}


def clean_wikihow(text: str) -> str:
    """HellaSwag's texts without the marks of the pages they come from, as lm-eval does it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(row: Row) -> Row:
    context = row.get("ctx", "")
    if "activity_label" in row and "ctx_a" in row:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    elif "activity_label" in row:
        context = f"{row['activity_label']}: {context}"
    choices = [clean_wikihow(e) for e in row["endings"]]
    return {"question": clean_wikihow(context), "choices": choices, "gold": _number(row["label"])}


def _winogrande(row: Row) -> Row:
    before, _, after = row["sentence"].partition("_")
    options = [before + row["option1"], before + row["option2"]]
    return {"question": "", "choices": options, "continuation": after.strip(), "gold": int(row["answer"]) - 1}


def _boolq(row: Row) -> Row:
    answer = row.get("label", row.get("answer"))
    right = answer in (True, 1, "true", "True", "yes", "1")
    question = row["question"].strip().rstrip("?")
    return {"context": row["passage"], "question": question, "choices": ["no", "yes"], "gold": int(right)}


def _squad(row: Row) -> Row:
    found = row["answers"]
    texts = found["text"] if isinstance(found, dict) else [a["text"] for a in found]
    return {"context": row["context"], "question": row["question"], "answers": list(dict.fromkeys(texts)) or [""]}


def _trivia(row: Row) -> Row:
    answer = row["answer"] if "answer" in row else row["Answer"]
    value = answer.get("value", answer.get("Value"))
    aliases = answer.get("aliases", answer.get("Aliases", []))
    return {"question": row.get("question", row.get("Question")), "answers": [value, *aliases]}


def _gsm8k(row: Row) -> Row:
    final = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"question": row["question"], "worked": row["answer"], "answers": [final]}


def _math(row: Row) -> Row:
    final = row.get("answer") or boxed(row["solution"])
    return {"question": row["problem"], "worked": row["solution"], "answers": [final], "group": row.get("type", "")}


def boxed(text: str) -> str:
    r"""What the last \boxed{...} or \fbox{...} of a solution holds; '' without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return ""
    depth, begin = 0, text.find("{", start)
    if begin < 0:
        return text[start:].partition(" ")[2].split("$")[0].strip()
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin + 1 : at]
    return ""


def _humaneval(row: Row) -> Row:
    check = f"{row['test']}\n\ncheck({row['entry_point']})\n"
    return {"question": row["prompt"], "code": row.get("canonical_solution") or "", "before": row["prompt"]} | {
        "tests": check
    }


def _mbpp(row: Row) -> Row:
    setup = "\n".join([row.get("test_setup_code") or "", *(row.get("test_imports") or [])])
    tests = list(row["test_list"])
    shown = {"question": row.get("text") or row["prompt"], "test_list": tests, "code": row["code"].replace("\r", "")}
    return shown | {"before": "", "tests": f"{setup}\n" + "\n".join(tests)}


def _ifeval(row: Row) -> Row:
    return {"question": row["prompt"], "answers": [""], "instruction_id_list": row["instruction_id_list"]}


_LISTED = re.compile(r"^\(?([A-Z])[.):] ?(.*)$", re.M)


def _query(row: Row) -> Row:
    """llm-foundry's choices: the query is ready to use. Where choices are letters their texts stand in it."""
    query, choices, out = row["query"], list(row["choices"]), {"gold": _number(row["gold"])}
    listed = _LISTED.findall(query)
    letters = [letter for letter, _ in listed]
    texts = [text.strip() for _, text in listed]
    if len(listed) == len(choices) and letters == list(LETTERS[: len(listed)]) and choices in (letters, texts):
        question = query[: _LISTED.search(query).start()].strip()  # type: ignore[union-attr]
        choices = texts
        question = re.sub(r"\n(Choices|Options):$", "", question)
    else:
        question = re.sub(r"\s*\n\s*(Answer|A):\s*$", "", query).strip()
    context = ""
    if m := re.match(r"(?:Passage|Context): (.*)\n(?:Question|Q): (.*)$", question, re.S):
        context, question = m[1], m[2]
    question = re.sub(r"^(Question|Q): ", "", question)
    written = re.sub(r"[ \t]+$", "", query)
    return (
        out
        | {"question": question, "context": context, "choices": choices, "query": written}
        | {"written_choices": list(row["choices"])}
    )


def _schema(row: Row) -> Row:
    texts = list(row["context_options"])
    return {"question": "", "choices": texts, "continuation": row["continuation"], "gold": _number(row["gold"])}


def _open(row: Row) -> Row:
    question = re.sub(r"^(Question|Q): ", "", row["context"])
    question = re.sub(r"\s*\n?(Answer|A):\s*$", "", question)
    thought = row.get("chain_of_thought")
    worked = f"{thought} The answer is {row['answer']}." if thought else str(row["answer"])
    answers = [str(row["answer"]), *map(str, row.get("aliases") or [])]
    group = row.get("category", "")
    return {"question": question, "answers": list(dict.fromkeys(answers)), "worked": worked, "group": group}


def _siqa(row: Row) -> Row:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return {"context": row["context"], "question": row["question"], "choices": choices, "gold": int(row["label"]) - 1}


def _sciq(row: Row) -> Row:
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return {"context": row["support"], "question": row["question"], "choices": choices, "gold": 3}


def _winogender(row: Row) -> Row:
    question = f"{row['sentence']} \u2018{row['pronoun'].capitalize()}\u2019 refers to the"
    choices = [row["occupation"], row["participant"]]
    return {"question": question, "choices": choices, "gold": int(row["label"]), "group": row.get("gender", "")}


def _bigbench(row: Row) -> Row:
    if "target_scores" in row:
        texts = list(row["target_scores"])
        scores = list(row["target_scores"].values())
        return {"question": row["input"], "choices": texts, "gold": scores.index(max(scores))}
    return {"question": row["input"], "answers": _several(row.get("target", row.get("ideal", row.get("output"))))}


def _several(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _instruction(row: Row) -> Row:
    more = f"\n\n{row['input']}" if row.get("input") else ""
    return {"question": row["instruction"] + more, "answers": _several(row["output"])}


def _messages(row: Row) -> Row:
    last = row["messages"][-1]
    if last.get("role") != "assistant":
        raise UserError(f"{row['where']}: messages: the last is the {last.get('role')}'s, must be the assistant's")
    said = "\n\n".join(str(m["content"]) for m in row["messages"][:-1])
    return {"question": said, "answers": _several(last["content"])}


def _pair(question: str, answer: str) -> Read:
    return lambda row: {"question": row[question], "answers": _several(row[answer])}


# Fields that tell a layout, a word of more than one letter | another for "one of"; its name; how it is read.
LAYOUTS: list[tuple[str, str, Read]] = [
    ("endings label", "hellaswag", _hellaswag),
    ("question_stem choices answerKey", "choices",
     lambda r: _labelled(r["question_stem"], r["choices"], r["answerKey"])),
    ("goal sol1 sol2 label", "choices",
     lambda r: {"question": r["goal"].strip(), "choices": [r["sol1"], r["sol2"]], "gold": int(r["label"])}),
    ("sentence option1 option2 answer", "schema", _winogrande),
    ("context_options continuation gold", "schema", _schema),
    ("passage question answer|label", "reading_choices", _boolq),
    ("context question answers", "reading", _squad),
    ("context question answerA answerB answerC label", "choices", _siqa),
    ("support question correct_answer distractor1", "choices", _sciq),
    ("sentence pronoun occupation participant label", "winogender", _winogender),
    ("problem solution", "math", _math),
    ("task_id prompt entry_point test", "humaneval", _humaneval),
    ("code test_list", "mbpp", _mbpp),
    ("prompt instruction_id_list kwargs", "ifeval", _ifeval),
    ("query choices gold", "query", _query),
    ("question A B C D answer", "choices",
     lambda r: {"question": r["question"].strip(), "choices": [r[x] for x in "ABCD"], "gold": _number(r["answer"])}),
    ("question choice0 choice1 answer", "choices",
     lambda r: {"question": r["question"].strip(), "gold": _number(r["answer"]),
                "choices": [r[k] for k in sorted(r) if re.fullmatch(r"choice\d", k)]}),
    ("context continuation", "completion",
     lambda r: {"question": r["context"], "continuation": r["continuation"].lstrip()}),
    ("context answer", "open", _open),
    ("input target_scores", "bigbench", _bigbench),
    ("input target|ideal", "pair", _bigbench),
    ("instruction output", "pair", _instruction),
    ("messages", "pair", _messages),
    ("prompt response", "pair", _pair("prompt", "response")),
    ("prompt completion", "pair", _pair("prompt", "completion")),
]  # fmt: skip


def _has(row: Row, fields: str) -> bool:
    return all(any(name in row for name in word.split("|")) for word in fields.split())


def _of_question(row: Row) -> tuple[str, Read] | None:
    """Layouts that share the field `question`, told by what its neighbours hold."""
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer", row.get("Answer"))
    if isinstance(question, dict) and "stem" in question:
        return "choices", lambda r: _labelled(r["question"]["stem"], r["question"]["choices"], r["answerKey"])
    if isinstance(choices, dict) and "answerKey" in row:
        return "choices", lambda r: _labelled(r["question"], r["choices"], r["answerKey"])
    if isinstance(choices, list) and choices and isinstance(question, str) and answer is not None:
        return "choices", lambda r: {
            "question": r["question"].strip(),
            "choices": [str(c) for c in r["choices"]],
            "gold": r["choices"].index(r["answer"]) if r["answer"] in r["choices"] else _number(r["answer"]),
        }
    if isinstance(answer, dict) and ("value" in answer or "Value" in answer):
        return "trivia", _trivia
    if isinstance(question, str) and isinstance(answer, str) and "####" in answer:
        return "gsm8k", _gsm8k
    if isinstance(question, str) and isinstance(answer, str | int | float | list):
        return "pair", _pair("question", "answer")
    return None


def layout_of(row: Row) -> tuple[str, Read] | None:
    """The name of a row's layout and how it is read; None where it is in none."""
    found = next(((name, read) for fields, name, read in LAYOUTS if _has(row, fields)), None)
    return found or _of_question(row)


def normalise(row: Row, read: Read) -> Row:
    """A row with the common fields over its own. UserError names file, row and what is wrong with it."""
    try:
        found = read(row)
    except KeyError as error:
        raise UserError(f"{row['where']}: no field {error}", field=str(error).strip("'")) from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{row['where']}: a field holds what it cannot ({error})") from None
    gold, choices = found.get("gold"), found.get("choices")
    if gold is not None and choices is not None and not 0 <= gold < len(choices):
        raise UserError(f"{row['where']}: the right choice is number {gold} of {len(choices)}", field="gold")
    group = found.pop("group", "")
    return row | found | ({"group": row.get("group") or str(group)} if row.get("group") or group else {})
