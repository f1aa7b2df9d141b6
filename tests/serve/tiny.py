"""A chat model small enough to train in a test: it thinks, answers, calls tools and ends its turns.

python tests/serve/tiny.py OUT     to have one by hand
"""

import json
import random
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from craton.base import write_json
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.initialise import initialise
from craton.text.tokenizer import Tokenizer, train_tokenizer
from craton.weights.folder import write_network

TEMPLATE = """{%- if tools %}<|im_start|>system
You may call these functions:{% for t in tools %}
{{ t.function | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- for m in messages %}{%- if m.role == 'assistant' %}<|im_start|>assistant
{% if loop.last and m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{%- for c in m.tool_calls or [] %}{{ '\\n' if not loop.first or m.content else '' }}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{%- endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{%- endif %}"""
WORDS = """what is the weather in San Francisco tell me a joke about cats my name Alice how do you count from 1 to 5 say hello exactly 3 words one word please describe this image briefly repeat only number why sky blue write code 15 * 37 show your reasoning and then stop now""".split()  # noqa: SIM905
SHORT, LONG, THOUGHT = (
    "Hello there, friend.",
    "One, two, three, four, five: I can count, and here is **bold** and `code`. That is all I know.",
    "The user wants a word from me.",
)
CITIES = ["Rome", "Paris", "Oslo", "Lima", "Cairo"]


def conversation(r: random.Random) -> tuple[str, str]:
    """A prompt, rendered, and the answer."""
    said = " ".join(r.choice(WORDS) for _ in range(r.randint(1, 30))).capitalize() + r.choice([".", "?", "!", ""])
    system = (
        f"<|im_start|>system\n{' '.join(r.choice(WORDS) for _ in range(r.randint(1, 12)))}.<|im_end|>\n"
        if r.random() < 0.3
        else ""
    )
    tools = ""
    kind = r.choice(("plain", "count", "tool", "tool", "tool", "result"))
    if kind in ("tool", "result"):
        parameters = {
            "type": "object",
            "properties": {"location": {"type": "string", "description": "City name"}},
            "required": ["location"],
        }
        function = {
            "name": "get_weather",
            "description": "Get current weather for a location.",
            "parameters": parameters,
        }
        tools = f"<|im_start|>system\nYou may call these functions:\n{json.dumps(function)}<|im_end|>\n"
    history = ""
    if r.random() < 0.3:
        history = f"<|im_start|>user\n{r.choice(WORDS)} {r.choice(WORDS)}<|im_end|>\n<|im_start|>assistant\n{r.choice((SHORT, 'Hello Alice!'))}<|im_end|>\n"
    prompt = f"{tools}{system}{history}<|im_start|>user\n"
    thought = f"<think>\n{THOUGHT}\n</think>\n\n" if r.random() < 0.6 else "<think>\n\n</think>\n\n"
    off = thought.startswith("<think>\n\n")
    if kind == "count":
        said, answer = "Count from 1 to 5.", LONG
    elif kind == "tool":
        city = r.choice(CITIES)
        said, answer = (
            f"What is the weather in {city}?",
            f'<tool_call>\n{{"name": "get_weather", "arguments": {{"location": "{city}"}}}}\n</tool_call>',
        )
        if r.random() < 0.3:
            other = r.choice(CITIES)
            said = f"What is the weather in {city} and {other}?"
            answer += f'\n<tool_call>\n{{"name": "get_weather", "arguments": {{"location": "{other}"}}}}\n</tool_call>'
    elif kind == "result":
        city = r.choice(CITIES)
        call = f'<tool_call>\n{{"name": "get_weather", "arguments": {{"location": "{city}"}}}}\n</tool_call>'
        prompt += f"What is the weather in {city}?<|im_end|>\n<|im_start|>assistant\n{call}<|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        return prompt + (thought if off else ""), ("" if off else thought) + f"It is sunny in {city}.<|im_end|>"
    else:
        answer = SHORT
    prompt += f"{said}<|im_end|>\n<|im_start|>assistant\n"
    return prompt + (thought if off else ""), ("" if off else thought) + answer + "<|im_end|>"


def build(out: Path, steps: int = 360, batch: int = 16) -> Path:
    """Train it (about 20 s) and write its folder."""
    torch.manual_seed(0)
    r = random.Random(0)
    trained = train_tokenizer((" ".join(conversation(r)) for _ in range(400)), 700)
    tokenizer = Tokenizer(trained.backend, {**trained.config, "eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    end = tokenizer.backend.token_to_id("<|im_end|>")
    config = ModelConfig(
        tokenizer.vocab_size,
        128,
        256,
        2,
        4,
        2,
        32,
        max_position_embeddings=4096,
        eos_token_id=end,
        tie_word_embeddings=True,
    )
    network = Decoder(config)
    initialise(network, 0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        rows = []
        for _ in range(batch):
            prompt, answer = conversation(r)
            p, a = tokenizer.encode_rendered(prompt), tokenizer.encode_rendered(answer)
            rows.append((p + a, [-100] * len(p) + a))
        width = max(len(i) for i, _ in rows)
        ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in rows])
        wanted = torch.tensor([w + [-100] * (width - len(w)) for _, w in rows])
        loss = cross_entropy(network(ids[:, :-1]).flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if __name__ == "__main__" and step % 20 == 0:
            print(step, round(loss.item(), 4), flush=True)
    assert loss.item() < 0.1, f"the tiny chat model did not learn: loss {loss.item():.3f}"
    out.mkdir(parents=True, exist_ok=True)
    write_network(out, network)
    tokenizer.save(out)
    write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": end})
    return out


if __name__ == "__main__":
    build(Path(sys.argv[1]))
