"""`craton tune --preview`: what a run would learn from, token by token, before anything is trained."""

import os
import sys
from typing import Any

import numpy as np

from craton.adapt.opened import Given, Opened
from craton.adapt.rows import Tokens
from craton.adapt.tune import open_all
from craton.base import count, say
from craton.text.tokenizer import Tokenizer

_SHOWN, _MOST = 3, 1200  # samples, and tokens of each


def preview(given: Given) -> dict[str, Any]:
    """Print the first samples with what is learned set apart, in colour on a terminal and between ⟦ ⟧ elsewhere, and
    how long all of them are. UserError for data that cannot be learned from."""
    opened = open_all(given)
    texts = [_texts(opened, i) for i in range(len(opened.samples))]
    say(f"rows     {len(opened.samples)} to learn from, {len(opened.held)} held out; form: {opened.samples[0].form}")
    say(f"template {opened.facts['template']}")
    flat = [t for own in texts for t in own.values()]
    sizes, learned = np.array([len(t) for t in flat]), np.array([int(t.learned.sum()) for t in flat])
    if len(flat):
        low, middle, high = np.quantile(sizes, (0.05, 0.5, 0.95)).astype(int).tolist()
        say(f"tokens   {count(int(sizes.sum()))} in all, {count(int(learned.sum()))} of them learned")
        say(f"lengths  5 % below {low}, half below {middle}, 5 % above {high}, the longest {int(sizes.max())}")
    for sample, own in list(zip(opened.samples, texts, strict=True))[:_SHOWN]:
        for name, text in own.items():
            say(f"\n--- {sample.where}{f', {name}' if len(own) > 1 else ''}: {len(text)} tokens")
            say(_coloured(opened.model.tokenizer, text))
    facts = {"samples": len(opened.samples), "held_out": len(opened.held), "tokens": int(sizes.sum())}
    return facts | {"learned_tokens": int(learned.sum()), "longest": int(sizes.max()) if len(flat) else 0}


def _texts(opened: Opened, i: int) -> dict[str, Tokens]:
    """The answers of a sample; a prompt alone learns nothing of itself."""
    sample, renderer = opened.samples[i], opened.renderer
    if sample.answer is None:
        ids = np.array(renderer.prompt(sample), np.int32)
        return {"prompt": Tokens(ids, np.zeros(len(ids), bool))}
    out = {"better" if sample.worse is not None else "answer": renderer.answer(sample, sample.answer, sample.form)}
    if sample.worse is not None:
        out["worse"] = renderer.answer(sample, sample.worse, sample.form)
    return out


def _coloured(tokenizer: Tokenizer, text: Tokens) -> str:
    on, off = ("\x1b[32;1m", "\x1b[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("⟦", "⟧")
    out, at = list[str](), 0
    while at < min(len(text), _MOST):
        end = at
        while end < len(text) and text.learned[end] == text.learned[at]:
            end += 1
        piece = tokenizer.backend.decode(text.ids[at:end].tolist(), skip_special_tokens=False)
        out.append(f"{on}{piece}{off}" if text.learned[at] else piece)
        at = end
    return "".join(out) + (" ..." if len(text) > _MOST else "")
