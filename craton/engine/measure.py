"""How well a model predicts a text: bits per byte, on the engine that serves it."""

import math
import pydoc_data.topics
from pathlib import Path

from craton.base import Progress, UserError
from craton.engine.model import Model


def sample_text() -> str:
    """Prose that every Python installation holds: its reference documentation."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def read_text(path: Path | None, most: int) -> str:
    """The first `most` characters of a file, or of the sample text. UserError if it cannot be read."""
    if path is None:
        return sample_text()[:most]
    try:
        return path.read_text(encoding="utf-8")[:most]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def bits_per_byte(model: Model, text: str) -> float:
    """-log2 of the probability of a text over its bytes, in windows of at most 1,024 tokens that each see half of the
    one before. The first token of the text is not counted."""
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
        nats -= engine.loglikelihood([(window[:known], window[known:])])[0][0]
        progress.show(f"measured {min(start + size, len(ids))} of {len(ids)} tokens")
    progress.clear()
    return nats / math.log(2) / max(1, len(text.encode()) - len(model.tokenizer.decode(ids[:1]).encode()))
