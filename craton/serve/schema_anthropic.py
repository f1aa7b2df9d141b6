"""Requests of Anthropic's API, field by field."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from craton.serve.schema import CallId, Count, Hint, Model, Name, Schema, Stop, Strict, Text, Thinking, TopP


class AnthropicText(Strict):
    type: Literal["text"]
    text: Text
    cache_control: Hint | None = None
    citations: None = None


class AnthropicSource(Strict):
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class AnthropicImage(Strict):
    type: Literal["image"]
    source: AnthropicSource
    cache_control: Hint | None = None


class AnthropicThinking(Strict):
    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None  # no effect: thinking is as it was written


class AnthropicRedacted(Strict):
    """Of another maker's model; left out."""

    type: Literal["redacted_thinking"]
    data: Text


class DirectCaller(Strict):
    type: Literal["direct"]


class AnthropicToolUse(Strict):
    type: Literal["tool_use"]
    id: CallId
    name: Name
    input: dict[str, JsonValue]
    cache_control: Hint | None = None
    caller: DirectCaller | None = None
    toolset_name: None = None


class AnthropicToolResult(Strict):
    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Text | list[Annotated[AnthropicText | AnthropicImage, Field(discriminator="type")]] | None = None
    is_error: bool | None = None
    cache_control: Hint | None = None


class AnthropicUser(Strict):
    role: Literal["user"]
    content: Text | list[Annotated[AnthropicText | AnthropicImage | AnthropicToolResult, Field(discriminator="type")]]


_Said = AnthropicText | AnthropicThinking | AnthropicRedacted | AnthropicToolUse


class AnthropicAssistant(Strict):
    role: Literal["assistant"]
    content: Text | list[Annotated[_Said, Field(discriminator="type")]]


AnthropicMessage = Annotated[AnthropicUser | AnthropicAssistant, Field(discriminator="role")]


class AnthropicTool(Strict):
    type: Literal["custom"] | None = None
    name: Name
    description: Text | None = None
    input_schema: Schema
    strict: bool | None = None
    defer_loading: bool | None = None  # no effect: every tool is shown
    eager_input_streaming: bool | None = None  # no effect: arguments always come as they are made
    cache_control: Hint | None = None


class AnthropicToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicMetadata(Strict):
    user_id: Text | None = None  # no effect


class AnthropicFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]


class AnthropicOutput(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: AnthropicFormat | None = None


class CountTokensRequest(Strict):
    """POST /v1/messages/count_tokens."""

    model: Model
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=100_000)]
    system: Text | list[AnthropicText] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=128)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: AnthropicOutput | None = None
    context_management: Hint | None = None  # no effect: the conversation is taken as it is
    cache_control: Hint | None = None


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Count
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=2**30)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=64)] | None = None
    metadata: AnthropicMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
