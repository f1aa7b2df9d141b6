"""Tokens after tokens: sampling from the network with a key-value cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from craton.base import UserError
from craton.model.cache import BLOCK, PagedCache, single_step
from craton.model.decoder import Decoder


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One id from logits (vocabulary,): the likeliest at temperature 0, else drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits.double() / temperature, -1)
    return int(torch.multinomial(p, 1, generator=generator))


@torch.inference_mode()
def stream(network: Decoder, prompt: list[int], max_tokens: int, temperature: float = 1.0, seed: int = 0, stop: int | None = None) -> Iterator[int]:
    """Ids that follow the prompt, until max_tokens, the stop id (not given out) or the end of the context.

    Raises UserError if the prompt is empty, does not fit the context or holds ids outside the vocabulary.
    """
    config, context = network.config, network.config.max_position_embeddings
    if not prompt:
        raise UserError("the prompt is empty; give at least one token")
    if len(prompt) >= context:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context is {context}; shorten it")
    if max(prompt) >= config.vocab_size or min(prompt) < 0:
        raise UserError(f"token id {max(prompt)} is outside the model's vocabulary of {config.vocab_size}")
    if max_tokens < 1 or temperature < 0:
        raise UserError(f"max_tokens ({max_tokens}) must be at least 1 and temperature ({temperature}) at least 0")
    weight = network.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    cache, past = PagedCache(config, -(-min(context, len(prompt) + max_tokens) // BLOCK), weight.dtype, weight.device), 0
    ids = torch.tensor([prompt], device=weight.device)
    for _ in range(min(max_tokens, context - len(prompt))):
        x = network.model(ids, step=single_step(cache, past, ids.shape[1]))[:, -1]
        past += ids.shape[1]
        token = sample(network.head(x)[0].float().cpu(), temperature, generator)
        if token == stop:
            return
        yield token
        ids = torch.tensor([[token]], device=weight.device)
