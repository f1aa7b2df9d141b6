"""A teacher's answers, by our engine or through an API: asked for once, and kept."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from craton.adapt.data import Sample
from craton.adapt.opened import Opened
from craton.base import Progress, UserError, publish, say
from craton.engine.converse import NEUTRAL, Ask, answer, open_talker, prepare
from craton.engine.remote import is_remote, open_client

_AT_ONCE = 8


def teacher_answers(opened: Opened) -> list[Sample]:
    """The samples with the teacher's answers in place of their own. UserError where the teacher gives none."""
    given, samples = opened.given, opened.samples
    path = given.out / "training" / "teacher.jsonl"
    most = opened.recipe.tune.max_tokens or (opened.task.max_tokens if opened.task else 256)
    if path.exists() and path.with_name("recipe.json").exists():  # else another run's, that never began
        texts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        ask = _remote(given.teacher, most) if is_remote(given.teacher) else _local(given.teacher, most)
        texts, progress = list[str](), Progress()
        for text in ask(samples):
            texts.append(text)
            progress.show_part("the teacher answers: prompts", len(texts), len(samples))
        progress.clear()
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish(path) as temporary:
            temporary.write_text("".join(json.dumps(t) + "\n" for t in texts), encoding="utf-8")
    empty = sum(not t.strip() for t in texts)
    if empty == len(texts):
        raise UserError(f"{given.teacher}: gave no answer to any prompt", field="teacher")
    if empty:
        say(f"guard    {empty} of {len(texts)} prompts got no answer from the teacher and are left out")
    kept = [(s, t) for s, t in zip(samples, texts, strict=True) if t.strip()]
    return [replace(s, answer=[{"role": "assistant", "content": t}] if s.chats else t) for s, t in kept]


def _messages(sample: Sample) -> list[dict[str, Any]]:
    return [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt


def _local(teacher: str, most: int) -> Any:
    path = teacher.partition("+")[0]
    if not Path(path).exists():
        raise UserError(f"{teacher}: no such model", field="teacher")
    talker = open_talker(teacher, teacher)

    def ask(samples: list[Sample]) -> Any:
        for sample in samples:
            plain = isinstance(sample.prompt, str)
            prompt = talker.tokenizer.encode(str(sample.prompt)) if plain else None
            settings: dict[str, Any] = NEUTRAL | {"temperature": 0.0, "max_tokens": most}
            asked = Ask(settings, prompt=prompt, messages=[] if plain else _messages(sample))
            parts = [p for delta in answer(talker, prepare(talker, asked)) for p in delta.parts]
            yield "".join(p.text for p in parts if p.kind == "content")

    return ask


def _remote(teacher: str, most: int) -> Any:
    client = open_client(teacher)

    def ask(samples: list[Sample]) -> Any:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            settings = dict(max_tokens=most, temperature=0.0)
            yield from pool.map(lambda s: client.chat(_messages(s), **settings).text, samples)

    return ask
