"""A model folder opened for use: network and tokenizer together."""

from pathlib import Path

from craton.engine.generate import stream
from craton.model.decoder import Decoder
from craton.text.tokenizer import Tokenizer
from craton.weights.folder import check_fit, load_network


class Model:
    """`network(ids)` gives logits; `generate(prompt)` gives text."""

    def __init__(self, network: Decoder, tokenizer: Tokenizer):
        self.network = network
        self.tokenizer = tokenizer

    def generate_ids(self, prompt: str, max_tokens: int = 256, temperature: float = 1.0, seed: int = 0) -> list[int]:
        """Ids that follow the prompt."""
        eos = self.network.config.eos_token_id
        return list(stream(self.network, self.tokenizer.encode(prompt), max_tokens, temperature, seed, eos))

    def generate(self, prompt: str, max_tokens: int = 256, temperature: float = 1.0, seed: int = 0) -> str:
        """Text that follows the prompt, until the end of the document or max_tokens. temperature 0 is greedy.

        Raises UserError if the prompt does not fit the context.
        """
        return self.tokenizer.decode(self.generate_ids(prompt, max_tokens, temperature, seed))


def load_model(path: str, device: str = "cpu") -> Model:
    """Open a model folder. Raises UserError naming what is missing or damaged."""
    folder = Path(path)
    network, tokenizer = load_network(folder, device), Tokenizer.open(folder)
    check_fit(network.config, tokenizer, folder)
    return Model(network, tokenizer)
