"""Craton: the whole life of a foundation model in one small codebase."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from craton.engine.model import Model

__version__ = "0.3.0"


def load(path: str, device: str = "cpu") -> "Model":
    """Open a model folder (Hugging Face layout) for generation. Raises craton.base.UserError if it is unusable."""
    from craton.engine.model import load_model  # torch takes a second to import: only those who load pay

    return load_model(path, device)
