"""Text encoders of BERT's kind: a vector of a text, or a score of a pair of texts. Post-norm blocks as in arXiv
1810.04805; RoBERTa's count positions from behind the padding's number (arXiv 1907.11692).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class EncoderConfig:
    """Names are those of the published config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"  # or gelu_new, gelu_pytorch_tanh, relu
    first_position: int = 0  # RoBERTa: 1 + the padding's number
    labels: int = 0  # of a head over the first token; 0: none

    @property
    def max_length(self) -> int:
        """Tokens of a text, at most."""
        return self.max_position_embeddings - self.first_position


class _Product(nn.Module):
    """x W^T + b, with what follows it in one kernel where there is one: an activation, or the addition of another."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor, act: str = "", add: Tensor | None = None) -> Tensor:
        if x.device.type == "cpu" and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
            ops = torch.ops.mkldnn._linear_pointwise
            if add is not None:
                return ops.binary(x, add, self.weight, self.bias, "add")
            if act in ("", "relu"):
                return ops(x, self.weight, self.bias, act or "none", [], "")
            return ops(x, self.weight, self.bias, "gelu", [], "none" if act == "gelu" else "tanh")
        y = F.linear(x, self.weight, self.bias)
        return activated(y, act) if add is None else y + add


def activated(x: Tensor, act: str) -> Tensor:
    """An activation by its published name; '' leaves x."""
    if act == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="none" if act == "gelu" else "tanh") if act else x


class _Block(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.heads, self.act = c.num_attention_heads, c.hidden_act
        self.qkv, self.out = _Product(c.hidden_size, 3 * c.hidden_size), _Product(c.hidden_size, c.hidden_size)
        self.up, self.down = (
            _Product(c.hidden_size, c.intermediate_size),
            _Product(c.intermediate_size, c.hidden_size),
        )
        self.attention_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.output_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, time, size = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, size // self.heads).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(batch, time, size)
        x = self.attention_norm(self.out(o, add=x))
        return self.output_norm(self.down(self.up(x, self.act), add=x))


class Encoder(nn.Module):
    """ids (batch, time), lengths (batch,) -> hidden states (batch, time, hidden); `scores` for a head."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        c = self.config = config
        self.words = nn.Embedding(c.vocab_size, c.hidden_size)
        self.positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.types = nn.Embedding(max(1, c.type_vocab_size), c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.blocks = nn.ModuleList(_Block(c) for _ in range(c.num_hidden_layers))
        self.pooler = _Product(c.hidden_size, c.hidden_size) if c.labels else None
        self.classifier = _Product(c.hidden_size, c.labels) if c.labels else None

    def forward(self, ids: Tensor, lengths: Tensor, types: Tensor | None = None) -> Tensor:
        time = ids.shape[1]
        at = torch.arange(time, device=ids.device)
        mask = None
        if int(lengths.min()) < time:
            mask = (at < lengths[:, None])[:, None, None]
        x = self.words(ids) + self.positions(at + self.config.first_position)
        x = self.norm(x + (self.types.weight[0] if types is None else self.types(types)))
        for block in self.blocks:
            x = block(x, mask)
        return x

    def scores(self, hidden: Tensor) -> Tensor:
        """(batch, labels) of a head over the first token (a cross-encoder's: one label)."""
        assert self.pooler is not None and self.classifier is not None
        return self.classifier(torch.tanh(self.pooler(hidden[:, 0])))


def pooled(hidden: Tensor, lengths: Tensor, how: str, normalise: bool) -> Tensor:
    """hidden (batch, time, size) -> (batch, size). how: mean, cls (the first token), max, or last."""
    if how == "cls":
        out = hidden[:, 0]
    elif how == "last":
        out = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    else:
        inside = (torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None])[..., None]
        if how == "max":
            out = hidden.masked_fill(~inside, -torch.inf).amax(1)
        else:
            out = (hidden * inside).sum(1) / lengths[:, None].clamp(min=1)
    return F.normalize(out, dim=-1) if normalise else out


def layout(name: str, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """The published names and parts of a parameter (a view of each)."""
    top = {
        "words": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings", "norm": "embeddings.LayerNorm", "pooler": "pooler.dense",
        "classifier": "classifier",
    }  # fmt: skip
    inside = {
        "out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm", "up": "intermediate.dense",
        "down": "output.dense", "output_norm": "output.LayerNorm",
    }  # fmt: skip
    first, *rest = name.split(".")
    last: Any = rest[-1]
    if first != "blocks":
        return [(f"{top[first]}.{last}", parameter)]
    place = f"encoder.layer.{rest[0]}"
    if rest[1] != "qkv":
        return [(f"{place}.{inside[rest[1]]}.{last}", parameter)]
    thirds = parameter.chunk(3)
    names = ("query", "key", "value")
    return [(f"{place}.attention.self.{n}.{last}", part) for n, part in zip(names, thirds, strict=True)]
