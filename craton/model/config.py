"""What a decoder is: the configuration of one, in the field names of the published `config.json` files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Counts are of units; the names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096  # longest context, tokens
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True  # RMSNorm on each head of q and k (Qwen 3); False is Llama 3 and Mistral
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, must be even for rotary embedding")

    @property
    def matrix_parameters(self) -> int:
        """Parameters that a token is multiplied with: all matrices and the head, not the embedding look-up.

        This is the N of 6·N FLOPs a token and of the tokens-per-parameter rules here.
        """
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, as stored."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.matrix_parameters + embedding + self.num_hidden_layers * norms + self.hidden_size

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs a token, forward and backward: 6·N, plus causal attention at `context` tokens."""
        attention = 6 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * context
        return 6 * self.matrix_parameters + attention
