"""Faults that a run would not show: they are refused, or said loudly, before and after it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from craton.adapt.data import Sample
from craton.adapt.rows import Tokens
from craton.base import UserError, say
from craton.corpus.evaluation import evaluation_grams
from craton.corpus.words import Words
from craton.tasks.task import Task

_WORSE = 1.2  # times the bits per byte of general text from which on a model is called damaged


def check_masks(samples: Sequence[Sample], texts: Sequence[Tokens], end_ids: Sequence[int], chats: bool) -> None:
    """UserError where masks cover nothing, or the prompts too, or where no end of an answer is learned."""
    if not chats:
        return
    whole = next((s for s, t in zip(samples, texts, strict=False) if t.learned[1:].all()), None)
    if whole is not None:
        problem = "all of the conversation would be learned, its questions too"
        raise UserError(f"{whole.where}: {problem}; the chat template does not set the answers apart", code="mask")
    ends = np.array(list(end_ids), np.int32)
    if not any(np.isin(t.ids[t.learned], ends).any() for t in texts):
        problem = "no answer's end is learned, so that the model would never stop"
        raise UserError(f"{problem}; the chat template does not end the assistant's turns with a token", code="end")


def check_contamination(samples: Sequence[Sample], task: Task, fixed: bool) -> set[int]:
    """Samples that hold a test item of a task, 13 words of it in a row or a short one whole; they are left out where
    the data are the task's own (fixed False). UserError for people's own data, which names them."""
    items = [task.plain_text(row) for row in task.part("test")]
    grams = evaluation_grams(items, whole=task.kind == "generated")
    whole = {_plain(item) for item in items}
    found = {i for i, s in enumerate(samples) if grams.grams and grams.found_in(Words(_text_of(s)))}
    found |= {i for i, s in enumerate(samples) if _plain(_text_of(s)) in whole}
    if found and fixed:
        first = samples[min(found)].where
        problem = f"{len(found)} rows hold items of the test part of {task.name}, {first} among them"
        raise UserError(f"{problem}; the score would be worth nothing: leave them out", code="contaminated")
    if found:
        say(f"guard    {len(found)} training rows of {task.name} hold items of its test part and are left out")
    return found


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _text_of(sample: Sample) -> str:
    """All that is said in a sample."""
    parts = []
    for said in (sample.prompt, sample.answer, sample.worse):
        if isinstance(said, str):
            parts.append(said)
        elif said is not None:
            parts += [m["content"] for m in said if isinstance(m.get("content"), str)]
    return "\n".join(parts)


def check_general(before: float, after: float) -> list[str]:
    """Warnings about what the run did to the model's knowledge of other text, in bits per byte."""
    if after <= _WORSE * before:
        return []
    what = f"general text costs {after:.3f} bits per byte now, {before:.3f} before"
    return [f"the model got much worse at everything else: {what}; lower tune.lr, or train for fewer steps"]


def check_learned(facts: dict[str, Any]) -> list[str]:
    """Warnings about a run that changed nothing."""
    if facts.get("changed") is False:
        return ["the weights are what they were: nothing was learned; raise tune.lr or train for longer"]
    return []
