"""`craton chat`: a conversation in the terminal.

A model that was only pretrained has never seen a conversation: its lines are continued as one text. A model whose
record says otherwise, or that has none, is spoken to in its chat template.
"""

import sys
from pathlib import Path
from typing import Any

from craton.base import UserError, read_json, say
from craton.engine.model import load_model
from craton.engine.request import Sampling


def _lines() -> Any:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def chat(path: str, max_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
    """Reads lines from stdin, prints answers, returns the messages."""
    model, folder = load_model(path), Path(path)
    base = (folder / "record.json").exists() and read_json(folder / "record.json").get("objective") == "pretraining"
    if base:
        say("This model was only pretrained: it goes on with your text rather than answering. An empty line ends.")
    elif model.tokenizer.chat_template is None:
        raise UserError(f"{path}: tokenizer_config.json has no chat_template; use 'craton generate'")
    messages: list[dict[str, str]] = []
    text, context = "", model.network.config.max_position_embeddings
    for turn, line in enumerate(_lines()):
        messages.append({"role": "user", "content": line})
        text += line
        ids = model.tokenizer.encode(text) if base else model.tokenizer.encode_chat(messages)
        room = context - min(max_tokens, context // 2)
        if len(ids) > room:
            say(f"(the conversation has {len(ids)} tokens; the first {len(ids) - room} no longer fit the context)")
        prompt = ids[-room:]
        answer = ""
        for event in model.engine.stream(prompt, Sampling(max_tokens, temperature, seed=seed + turn)):
            print(event.text, end="", flush=True)
            answer += event.text
        print()
        messages.append({"role": "assistant", "content": answer})
        text += answer
    return {"messages": messages}
