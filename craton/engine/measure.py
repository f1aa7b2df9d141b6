"""How well a model predicts a text: bits per byte, on the engine that serves it."""

import math
import pydoc_data.topics
from pathlib import Path

from craton.base import Progress, UserError, read_text
from craton.engine.model import Model


def sample_text() -> str:
    """Prose that every Python installation holds: its reference documentation."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def text_to_measure(path: Path | None, most: int) -> str:
    """The first `most` characters of a file, or of the sample text. UserError if it is not text."""
    return (sample_text() if path is None else read_text(path))[:most]


def bits_per_byte(model: Model, text: str, exact: bool = True) -> float:
    """-log2 of the probability of a text over its bytes, in windows of at most 1,024 tokens that each see half of the
    one before. The first token of the text is not counted. exact: as Engine.loglikelihood."""
    engine, ids = model.engine, model.tokenizer.encode(text)
    size = min(1024, engine.context)
    if len(ids) < 2:
        raise UserError("the text to measure on has fewer than two tokens")
    nats, progress = 0.0, Progress()
    for start in range(0, max(1, len(ids) - size // 2), size // 2):
        window = ids[start : start + size]
        known = 1 if start == 0 else size // 2
        if known >= len(window):
            break
        nats -= engine.loglikelihood([(window[:known], window[known:])], exact)[0][0]
        progress.show(f"measured {min(start + size, len(ids))} of {len(ids)} tokens")
    progress.clear()
    return nats / math.log(2) / max(1, len(text.encode()) - len(model.tokenizer.decode(ids[:1]).encode()))
