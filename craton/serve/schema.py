"""The requests that are understood, field by field. What is not here is refused by name.

Fields that clients always send and that cannot change an answer (user, metadata, cache hints) are here and have no
effect beyond what their comment says. Where only one value is supported, the type says which.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

Text = Annotated[str, Field(max_length=10_485_760)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.:/-]+$")]
Model = Annotated[str, Field(max_length=256, description="One of the names that /v1/models lists.")]
_Key = Annotated[str, Field(max_length=64)]
Metadata = Annotated[dict[_Key, Annotated[str, Field(max_length=512)]], Field(max_length=16)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Token = Annotated[int, Field(ge=0, le=2**30)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
CallId = Annotated[str, Field(min_length=1, max_length=100_000)]  # some makers put signatures there
Count = Annotated[int, Field(ge=1, le=2**30)]
Schema = dict[str, JsonValue]
Hint = dict[str, JsonValue]  # about caches and transport; no effect: equal beginnings are always shared
_UP_TO_256 = Field(min_length=1, max_length=256)
_UP_TO_2048 = Field(min_length=1, max_length=2048)
OnlyFalse = Annotated[bool, AfterValidator(lambda v: _only_false(v)), Field(json_schema_extra={"const": False})]


def _only_false(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported")
    return value


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = None  # comes back with our own answers
    logprobs: list[Any] | None = None
    cache_control: Hint | None = None


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """As a data: URL; addresses are not fetched. Refused where the model cannot see."""

    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(Strict):
    name: Name
    arguments: Text


class ToolCall(Strict):
    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Text | list[TextPart]
    name: Text | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Text | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: Text | None = None


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Text | list[TextPart] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: list[ToolCall] | None = None
    name: Text | None = None
    refusal: Text | None = None  # no effect: what was said instead is in content
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Text | list[TextPart] | None = None
    tool_call_id: CallId
    name: Text | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None  # arguments always follow the schema


class Tool(Strict):
    type: Literal["function"]
    function: Function
    cache_control: Hint | None = None


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class AllowedToolList(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolList


class JsonSchema(Strict):
    name: Name
    description: Text | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None  # always so


class FormatText(Strict):
    type: Literal["text"]


class FormatObject(Strict):
    type: Literal["json_object"]


class FormatSchema(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: OnlyFalse | None = None


class Structured(Strict):
    """As vLLM's structured_outputs: one of these."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1, max_length=65536)] | None = None
    choice: Annotated[list[Stop], Field(min_length=1, max_length=1000)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=262144)] | None = None


class Thinking(Strict):
    """As Anthropic's: how long the model may think before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=2**30)] | None = None
    display: Literal["summarized", "omitted"] | None = None  # reasoning is shown as it was written, or not at all


class ResponseReasoning(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # the reasoning itself is given, never a summary


class Sampled(Strict):
    """What OpenAI's generation endpoints have in common, and vLLM's additions to them."""

    model: Model
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias] | None = None
    user: Text | None = None  # no effect
    top_k: Annotated[int, Field(ge=-1, le=2**30)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**30)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    structured_outputs: Structured | None = None


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=100_000)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[FormatText | FormatObject | FormatSchema, Field(discriminator="type")] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    reasoning: ResponseReasoning | None = None  # the same as an object
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None  # handed to the model's template
    continue_final_message: bool | None = None  # the answer goes on with the last message, the assistant's
    add_generation_prompt: bool | None = None  # true unless the last message is continued
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # no effect: a hint that these models do not know
    service_tier: Literal["auto", "default"] | None = None
    store: OnlyFalse | None = None
    metadata: Metadata | None = None  # no effect
    safety_identifier: Text | None = None  # no effect
    prompt_cache_key: Text | None = None  # no effect: equal beginnings are always shared
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[Text], _UP_TO_256] | Tokens | Annotated[list[Tokens], _UP_TO_256]
    max_tokens: Annotated[int, Field(ge=0, le=2**30)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None  # only where it equals n
    suffix: None = None


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: Model
    input: Text | Annotated[list[Text], _UP_TO_2048] | Tokens | Annotated[list[Tokens], _UP_TO_2048]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None  # only the model's own
    user: Text | None = None  # no effect


class TokenizePrompt(Strict):
    """POST /tokenize: a prompt."""

    model: Model | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeMessages(Strict):
    """POST /tokenize: messages, as the model's template shows them."""

    model: Model | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=100_000)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Model | None = None
    tokens: Annotated[list[Token], Field(max_length=10_000_000)]


# ---- votes ------------------------------------------------------------------------------------------------------


class Contender(Strict):
    model: Model
    settings: dict[str, JsonValue] = {}
    text: Text


class VoteRequest(Strict):
    """POST /votes: which of two answers a person preferred, not knowing whose they were."""

    messages: Annotated[list[dict[str, JsonValue]], Field(min_length=1, max_length=10_000)]
    left: Contender
    right: Contender
    vote: Literal["left", "right", "tie", "neither"]


class SearchRequest(Strict):
    """POST /v1/search."""

    query: Annotated[str, Field(min_length=1, max_length=10_000)]
    index: str | None = None
    max_num_results: Annotated[int, Field(ge=1, le=1000)] = 10
    filters: dict[str, str] = {}


class AskRequest(Strict):
    """POST /v1/ask."""

    question: Annotated[str, Field(min_length=1, max_length=10_000)]
    index: str | None = None
    filters: dict[str, str] = {}


class LoadAdapterRequest(Strict):
    """POST /v1/load_lora_adapter, as vLLM has it: a name, and a folder of the machine that serves."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapterRequest(Strict):
    """POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_int_id: int | None = None
