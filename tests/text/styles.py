"""Chat templates in the published styles, and what tests of them share."""

import random
from dataclasses import replace

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from craton.text.calls import HERMES, Part
from craton.text.dialogue import learn
from craton.text.tokenizer import Tokenizer

CHATML = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
QWEN = """{%- if tools %}<|im_start|>system
# Tools
<tools>{% for t in tools %}
{{ t | tojson }}{% endfor %}
</tools><|im_end|>
{% endif %}{%- for m in messages %}{%- if m.role == 'assistant' %}<|im_start|>assistant
THINK{{ m.content }}{%- for c in m.tool_calls or [] %}{{ '\n' if not loop.first or m.content else '' }}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{%- endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
SWITCH{% endif %}"""
SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN3 = QWEN.replace("SWITCH", SWITCH).replace(
    "THINK", "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
)
LLAMA = """{{ bos_token }}{%- if tools %}<|start_header_id|>system<|end_header_id|>
{% for t in tools %}{{ t | tojson }}{% endfor %}<|eot_id|>{% endif %}{%- for m in messages %}{%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{%- endif %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eom_id|>{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content }}<|eot_id|>{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """{{ bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{%- if tools and loop.last or tools and not loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif %}[INST]{{ m.content }}[/INST]{%- elif m.tool_calls %}[TOOL_CALLS][{%- for c in m.tool_calls %}{%- if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{%- endif %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{{ ', ' if not loop.last else '' }}{%- endfor %}]</s>{%- else %}{{ m.content }}</s>{%- endif %}{%- endfor %}"""
DEEPSEEK = """{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{%- for m in messages %}{%- if m.role == 'user' %}<User>{{ m.content }}{%- elif m.tool_calls %}<Assistant><calls>{%- for c in m.tool_calls %}{{ '\n' if not loop.first else '' }}<call>{{ c.type + '<sep>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```</call>' }}{%- endfor %}</calls></s>{%- else %}<Assistant>{{ m.content.split('</think>')[-1] }}</s>{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<Assistant><think>
{% endif %}"""
_TOLD = "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
_TURNS = (
    "{%- for m in messages %}{%- if m.tool_calls %}<Assistant>CALLS</s>{%- elif m.role == 'assistant' %}<Assistant>"
    "{{ m.content }}</s>{%- else %}<User>{{ m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<Assistant>{% endif %}"
)
# Each argument in a tag of its own, texts without quotes.
CODER = _TOLD + _TURNS.replace(
    "CALLS",
    "{%- for c in m.tool_calls %}{{ '\\n' if not loop.first else '' }}{{ '<tool_call>\\n<function=' + c.function.name + "
    "'>\\n' }}{%- for k, v in c.function.arguments | items %}{{ '<parameter=' + k + '>\\n' }}{{ v if v is string else "
    "v | tojson }}{{ '\\n</parameter>\\n' }}{%- endfor %}{{ '</function>\\n</tool_call>' }}{%- endfor %}",
)
PAIRS = _TOLD + _TURNS.replace(
    "CALLS",
    "{%- for c in m.tool_calls %}{{ '\\n<tool_call>' + c.function.name }}{%- for k, v in c.function.arguments | items %}"
    "{{ '\\n<arg_key>' + k + '</arg_key>\\n<arg_value>' }}{{ v if v is string else v | tojson }}{{ '</arg_value>' }}"
    "{%- endfor %}{{ '\\n</tool_call>' }}{%- endfor %}",
)
# A call as Python writes it.
PYTHONIC = _TOLD + _TURNS.replace(
    "CALLS",
    "[{%- for c in m.tool_calls %}{{ ', ' if not loop.first else '' }}{{ c.function.name + '(' }}{%- for k, v in "
    "c.function.arguments | items %}{{ ', ' if not loop.first else '' }}{{ k + '=' }}{{ v | tojson }}{%- endfor %}"
    "{{ ')' }}{%- endfor %}]",
)
# As DeepSeek R1's: calls are written, where the content is none, but nobody tells of tools.
UNTOLD = DEEPSEEK.replace("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}", "").replace(
    "{%- elif m.tool_calls %}", "{%- elif m.content is none %}"
)
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "[TOOL_CALLS]",
    "[INST]",
    "[/INST]",
    "<User>",
    "<Assistant>",
    "<calls>",
    "</calls>",
    "<call>",
    "</call>",
    "<sep>",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": n,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for n in ("weather", "wea", "get-time")
]
SCHEMAS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
ENDS = ("<|im_end|>", "</s>", "<|eot_id|>", "<|eom_id|>")


def tokenizer(
    template: str,
    special: list[str] = SPECIAL,
    added: tuple[str, ...] = ("<tool_call>", "</tool_call>", "<think>", "</think>"),
) -> Tokenizer:
    backend = Backend(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(a, special=False, normalized=False) for a in added])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})


def merge(parts: list[Part]) -> list[Part]:
    """Neighbours of the same kind and call joined."""
    out: list[Part] = []
    for p in parts:
        if out and out[-1].kind == p.kind and out[-1].call == p.call and p.kind != "call":
            out[-1] = replace(out[-1], text=out[-1].text + p.text)
        else:
            out.append(p)
    return out


def dialogue(template: str, **more):
    t = tokenizer(template, **more)
    return learn(t, tuple(t.backend.token_to_id(e) for e in ENDS if e in t.backend.get_vocab()))


STYLES = {
    "chatml": (CHATML, HERMES.opening, False),
    "qwen": (QWEN.replace("THINK", "").replace("SWITCH", ""), '<tool_call>\n{"name": "', True),
    "qwen3": (QWEN3, '<tool_call>\n{"name": "', True),
    "llama": (LLAMA, '{"name": "', True),
    "mistral": (MISTRAL, '[TOOL_CALLS][{"name": "', True),
    "deepseek": (DEEPSEEK, "<calls><call>function<sep>", True),
    "untold": (UNTOLD, "<calls><call>function<sep>", True),
    "coder": (CODER, "<tool_call>\n<function=", True),
    "pairs": (PAIRS, "<tool_call>", True),
    "pythonic": (PYTHONIC, "[", True),
}


HARMONY = """<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>{%- for m in messages %}{%- if m.role == 'assistant' %}{%- if m.tool_calls %}{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{%- endif %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{%- elif loop.last and not add_generation_prompt %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{%- endif %}{%- elif m.role == 'tool' %}<|start|>functions.f to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
CHANNELS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]


def parsed(parser, text, r=None, **end):
    """What a parser makes of a text that comes in pieces."""
    r, parts, at = r or random.Random(0), [], 0
    while at < len(text):
        step = r.choice((1, 3, 20))
        parts += parser.feed(text[at : at + step])
        at += step
    return [(p.kind, p.text) for p in merge([*parts, *parser.feed("", True, **end)])]
