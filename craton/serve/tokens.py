"""Tokens of texts and texts of tokens, as vLLM's server has them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter

from craton.base import UserError
from craton.engine.converse import Talker
from craton.serve import shapes
from craton.serve.openai_chat import messages_of
from craton.serve.reply import Reply, State, whole
from craton.serve.schema import DetokenizeRequest, TokenizeMessages, TokenizePrompt
from craton.serve.served import ApiError


def routes(state: State) -> APIRouter:
    """POST /tokenize and /detokenize."""
    router = APIRouter()

    @router.post(**state.route("/tokenize", "Tokens of a prompt or of messages", shapes.TOKENS))
    async def tokenize(body: TokenizePrompt | TokenizeMessages) -> Reply:
        return Reply(_tokens(state.find(body.model).talker, body), False, state)

    @router.post(**state.route("/detokenize", "Text of tokens", shapes.obj(prompt=shapes.STRING)))
    async def detokenize(body: DetokenizeRequest) -> Reply:
        return Reply(_text(state.find(body.model).talker, body), False, state)

    return router


async def _tokens(talker: Talker, body: TokenizePrompt | TokenizeMessages) -> AsyncIterator[bytes]:
    tokenizer = talker.tokenizer

    def work() -> list[int]:
        if isinstance(body, TokenizePrompt):
            return tokenizer.encode(body.prompt) if body.add_special_tokens else tokenizer.encode_rendered(body.prompt)
        if talker.dialogue is None:
            raise UserError(f"the model {talker.name!r} has no chat template; give a prompt", field="model")
        tools = [t.model_dump(exclude_none=True) for t in body.tools or ()]
        messages = messages_of([m.model_dump() for m in body.messages])
        return tokenizer.encode_rendered(talker.dialogue.render(messages, tools)[0])

    ids = await asyncio.to_thread(work)
    out: dict[str, Any] = {"count": len(ids), "max_model_len": talker.engine.context, "tokens": ids}
    if body.return_token_strs:
        out["token_strs"] = [tokenizer.bytes_of(i).decode("utf-8", "replace") for i in ids]
    yield whole(out)


async def _text(talker: Talker, body: DetokenizeRequest) -> AsyncIterator[bytes]:
    size, decode = talker.tokenizer.vocab_size, talker.tokenizer.backend.decode
    if bad := next((t for t in body.tokens if t >= size), None):
        raise ApiError(400, f"tokens: {bad} is outside the vocabulary of {size}", "tokens")
    text = await asyncio.to_thread(lambda: decode(body.tokens, skip_special_tokens=False))
    yield whole({"prompt": text})
