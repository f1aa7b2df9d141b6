"""`craton generate`: a prompt continued or, with a system prompt, answered; once or several times."""

from pathlib import Path
from typing import Any

from craton.base import UserError
from craton.engine.converse import Ask, answer, open_talker, prepare
from craton.engine.model import load_model
from craton.engine.request import Sampling


def continue_prompt(path: str, prompt: str, sampling: dict[str, Any], exact: bool) -> list[dict[str, Any]]:
    """Print the prompt and what follows as it comes; returns text and token_ids of each of sampling's n answers."""
    chosen = Sampling(**sampling)
    loaded = load_model(path, None, exact=exact)
    ids = loaded.tokenizer.encode(prompt)
    if chosen.n > 1:
        answers = loaded.engine.generate([ids], chosen)[0]
        for number, a in enumerate(answers, 1):
            print(f"--- {number} of {chosen.n}\n{prompt}{a.text}", flush=True)
        return [{"text": a.text, "token_ids": a.token_ids} for a in answers]
    out: dict[str, Any] = {"text": "", "token_ids": []}
    print(prompt, end="", flush=True)
    for event in loaded.engine.stream(ids, chosen):
        print(event.text, end="", flush=True)
        out["token_ids"] += event.token_ids
        out["text"] += event.text
    print()
    return [out]


def answer_prompt(path: str, prompt: str, system: str, sampling: dict[str, Any], exact: bool) -> list[dict[str, Any]]:
    """Print the answer to a prompt by a model that chats; UserError if it does not. Returns the text of each."""
    talker = open_talker(Path(path).resolve().name, path, exact=exact)
    if talker.pretrained_only or talker.dialogue is None:
        raise UserError("--system is for models that chat; this one goes on with a text", field="system")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    out = []
    n, seed = sampling.pop("n"), sampling.pop("seed")
    for number in range(n):
        if n > 1:
            print(f"--- {number + 1} of {n}", flush=True)
        text = ""
        ask = Ask(sampling | {"seed": None if seed is None else seed + number}, messages=messages)
        for delta in answer(talker, prepare(talker, ask)):
            for part in delta.parts:
                print(part.text, end="", flush=True)
                text += part.text if part.kind == "content" else ""
        print()
        out.append({"text": text})
    return out
