"""Requests of Open Responses, field by field."""

from typing import Annotated, Literal

from pydantic import Field

from craton.serve.schema import (
    CallId,
    Count,
    FormatObject,
    FormatText,
    Metadata,
    Model,
    Name,
    OnlyFalse,
    Penalty,
    ResponseReasoning,
    Schema,
    Strict,
    Temperature,
    Text,
    TextPart,
    TopP,
)


class InputImage(Strict):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] | None = None


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text


class ItemMessage(Strict):
    type: Literal["message"] = "message"
    id: Text | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | list[Annotated[TextPart | InputImage | RefusalPart, Field(discriminator="type")]]
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class ItemCall(Strict):
    type: Literal["function_call"]
    id: Text | None = None
    call_id: CallId
    name: Name
    arguments: Text
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ItemOutput(Strict):
    type: Literal["function_call_output"]
    id: Text | None = None
    call_id: CallId
    output: Text | list[TextPart]
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ReasoningPart(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ItemReasoning(Strict):
    type: Literal["reasoning"]
    id: Text | None = None
    summary: list[ReasoningPart]
    content: list[ReasoningPart] | None = None
    encrypted_content: Text | None = None  # of another maker's model; left out
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ResponseTool(Strict):
    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class ResponseToolChoice(Strict):
    type: Literal["function"]
    name: Name


class ResponseAllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["none", "auto", "required"]
    tools: Annotated[list[ResponseToolChoice], Field(min_length=1)]


class TextFormatSchema(Strict):
    type: Literal["json_schema"]
    name: Name
    description: Text | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseText(Strict):
    format: Annotated[FormatText | FormatObject | TextFormatSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # no effect: a hint that these models do not know


class ResponseStreamOptions(Strict):
    include_obfuscation: OnlyFalse | None = None


class ResponsesRequest(Strict):
    """POST /v1/responses, as the Open Responses specification has it."""

    model: Model
    input: (
        Text
        | Annotated[list[ItemMessage | ItemCall | ItemOutput | ItemReasoning], Field(min_length=1, max_length=100_000)]
    )
    instructions: Text | None = None
    previous_response_id: Annotated[str, Field(max_length=64)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    # Reasoning is never encrypted.
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | ResponseAllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_output_tokens: Count | None = None
    max_tool_calls: None = None
    truncation: Literal["disabled"] | None = None
    background: OnlyFalse | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Metadata | None = None
    user: Text | None = None  # no effect
    client_metadata: dict[str, str] | None = None  # no effect
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
