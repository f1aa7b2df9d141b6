"""Other people's clients, each asking a server in its own way: python peers.py CLIENT URL MODEL prints what it got.

The packages may live in an environment of their own: CRATON_PEERS_PYTHON names its Python.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]


def llm(url: str, model: str) -> dict[str, Any]:
    """The llm command, with the server among its extra models."""
    with tempfile.TemporaryDirectory() as home:
        entry = f"- model_id: mine\n  model_name: {model}\n  api_base: {url}/v1\n  supports_tools: true\n"
        Path(home, "extra-openai-models.yaml").write_text(entry + "  supports_schema: true\n")
        program = [str(Path(sys.executable).with_name("llm"))]
        environment = {**os.environ, "LLM_USER_PATH": home, "OPENAI_API_KEY": "x"}

        def run(*arguments: str) -> str:
            options = ("-o", "max_tokens", "60", "-o", "temperature", "0")
            command = [*program, "-m", "mine", *options, *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 or "Chain limit" in done.stderr, done.stderr
            return done.stdout or done.stderr  # where calls are shown

        function = "def weather(city: str) -> str:\n    'The weather of a city.'\n    return 'sunny'\n"
        return {
            "streamed": run("Say hello."),
            "whole": run("--no-stream", "-s", "Be brief.", "Say hello."),
            "schema": run("--schema", "name, age int", "Invent a person."),
            "tools": run("--functions", function, "--chain-limit", "2", "--td", "Weather?"),
        }


def litellm(url: str, model: str) -> dict[str, Any]:
    """As OpenAI's provider and as Anthropic's, whole, streamed, with tools."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm as lib

    lib.telemetry = False
    out: dict[str, Any] = {}
    for name, base in (("openai", f"{url}/v1"), ("anthropic", url)):
        options: dict[str, Any] = dict(
            model=f"{name}/{model}", api_base=base, api_key="x" * 8, max_tokens=40, temperature=0
        )
        whole = lib.completion(messages=HELLO, **options)
        out[f"{name} whole"] = whole.choices[0].message.content
        chunks = lib.completion(messages=HELLO, stream=True, **options)
        out[f"{name} streamed"] = "".join(c.choices[0].delta.content or "" for c in chunks)
        called = lib.completion(
            messages=HELLO[1:], tools=[WEATHER], tool_choice="required", **options | {"max_tokens": 200}
        )
        calls = called.choices[0].message.tool_calls
        out[f"{name} call"] = [calls[0].function.name, json.loads(calls[0].function.arguments)]
    return out


def langchain(url: str, model: str) -> dict[str, Any]:
    """Chat models with tools, an answered call, structured output and streams, in both dialects."""
    from langchain_anthropic import ChatAnthropic
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel, SecretStr

    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return "sunny"

    class Person(BaseModel):
        """A person."""

        name: str
        age: int

    key = SecretStr("x" * 8)
    chats = {
        "openai": ChatOpenAI(base_url=f"{url}/v1", api_key=key, model=model, temperature=0, max_completion_tokens=200),
        "anthropic": ChatAnthropic(
            base_url=url, api_key=key, model_name=model, temperature=0, max_tokens_to_sample=200
        ),
    }
    out: dict[str, Any] = {}
    for name, chat in chats.items():
        out[f"{name} whole"] = chat.invoke("Say hello.").text
        out[f"{name} streamed"] = "".join(c.text for c in chat.stream("Say hello."))
        called = chat.bind_tools([weather], tool_choice="any").invoke("Weather?")
        first = called.tool_calls[0]
        out[f"{name} call"] = [first["name"], sorted(first["args"])]
        results = [ToolMessage("sunny", tool_call_id=c["id"]) for c in called.tool_calls]
        talk = [HumanMessage("Weather?"), called, *results]
        out[f"{name} after"] = chat.bind_tools([weather]).invoke(talk).type
        person = chat.with_structured_output(Person, method="function_calling").invoke("Invent a person.")
        out[f"{name} person"] = sorted(person.model_dump())
    person = chats["openai"].with_structured_output(Person, method="json_schema").invoke("Invent a person.")
    out["openai schema"] = sorted(person.model_dump())
    return out


if __name__ == "__main__":
    client, *where = sys.argv[1:]
    print(json.dumps({"llm": llm, "litellm": litellm, "langchain": langchain}[client](*where)))
