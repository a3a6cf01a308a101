"""POST /tokenize and /detokenize: what a model reads, and back."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends

from lapis.api.auth import ServicesOf, User
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.tokens import DetokenizeRequest, Text, TokenizeRequest, Tokens
from lapis.errors import InputError
from lapis.gateway.prompt import Conversation, chat_prompt
from lapis.inference.engine import Engine, prompt_ids

router = APIRouter()
TokenizeBody = Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))]
DetokenizeBody = Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))]


@router.post("/tokenize", openapi_extra=json_schema(TokenizeRequest))
async def tokenize(services: ServicesOf, caller: User, body: TokenizeBody) -> Tokens:
    """The token ids of a text or a chat, exactly as an answer to it would be computed from."""
    engine = await services.router.find(body.model, caller).engine()
    ids = await asyncio.to_thread(_ids, engine, body)
    shown = [engine.tokenizer.token_bytes(id).decode(errors="replace") for id in ids]
    return Tokens(
        count=len(ids),
        max_model_len=engine.context,
        tokens=ids,
        token_strs=shown if body.return_token_strs else None,
    )


@router.post("/detokenize", openapi_extra=json_schema(DetokenizeRequest))
async def detokenize(services: ServicesOf, caller: User, body: DetokenizeBody) -> Text:
    """The text of token ids."""
    engine = await services.router.find(body.model, caller).engine()
    size = engine.tokenizer.vocab_size
    wrong = next((id for id in body.tokens if not 0 <= id < size), None)
    if wrong is not None:
        raise InputError(
            f"tokens has the token id {wrong}; ids of this model are 0 to {size - 1}.", param="tokens"
        )
    return Text(prompt=await asyncio.to_thread(engine.tokenizer.decode, body.tokens))


def _ids(engine: Engine, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        conversation = Conversation([message.for_template() for message in body.messages])
        return chat_prompt(engine, conversation).ids
    text = body.prompt or ""
    return prompt_ids(engine, text) if body.add_special_tokens else engine.tokenizer.encode(text)
