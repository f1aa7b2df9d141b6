"""A chat template for a model that has none: it is tuned to it, and carries it from then on."""

from craton.base import UserError
from craton.text.tokenizer import Tokenizer

_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
CHATML = (
    "{%- if bos_token is defined %}{{ bos_token }}{%- endif %}"
    "{%- for message in messages %}" + _TURN + "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
PLAIN = (
    "{%- if bos_token is defined %}{{ bos_token }}{%- endif %}"
    "{%- for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{ eos_token }}{%- endif %}{{ '\\n\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'Assistant:' + ' ' }}{%- endif %}"
)
_PROBE = "What the base model reads must stay as it was: 12345, naïve, 日本語\n\n\tend"


def give_template(tokenizer: Tokenizer) -> int:
    """Give a tokenizer without a chat template one, of tokens that it has; returns the token that ends a turn.

    UserError if it has none for that, or if ordinary text would be read otherwise than before."""
    before, size = tokenizer.encode(_PROBE), tokenizer.vocab_size
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    chatml = all(name in vocabulary for name in ("<|im_start|>", "<|im_end|>"))
    end = vocabulary["<|im_end|>"] if chatml else tokenizer.eos_id
    if end is None:
        raise UserError("tokenizer_config.json: no eos_token, which a chat template needs; name one")
    tokenizer.config["chat_template"] = CHATML if chatml else PLAIN
    for cached in ("chat_templates", "special_ids"):
        tokenizer.__dict__.pop(cached, None)
    if tokenizer.encode(_PROBE) != before or tokenizer.vocab_size != size:
        raise UserError("the chat template changes what the base model is given for ordinary text")
    return end
