"""The routes of Anthropic's Messages API: answers, and how many tokens a chat has."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from operant.live.api.answering import admit, check_model, check_user, respond
from operant.live.api.anthropic_replies import PREFIX, MessageReply
from operant.live.api.asking import (
    AnswerRequest,
    ChatMessage,
    chat_prompt,
    check_stops,
    content_text,
    parse_sampling,
    refuse,
)
from operant.live.api.generation import Generation
from operant.live.api.service import (
    MESSAGES,
    GenerationRequest,
    RequestBody,
    StrictModel,
    caller_of,
    new_id,
    service_of,
)

__all__ = ["routes"]

routes = APIRouter(prefix=MESSAGES)


# --- what is asked ----------------------------------------------------------------------------------------------------

Text = Annotated[str, BeforeValidator(content_text)]


class MessageTurn(StrictModel):
    """One turn of a chat."""

    role: Literal["user", "assistant", "system"]
    content: Text


class MessageMetadata(StrictModel):
    """Whom the answer is for."""

    user_id: str | None = Field(None, max_length=256)


class MessageChat(RequestBody):
    """A chat to answer, or to count."""

    model: str
    messages: list[MessageTurn] = Field(min_length=1, max_length=100_000)
    system: Text | None = None
    # of these the answer does not depend on the value: accepted, so that clients which always send them work
    cache_control: Any = None
    # read only to be refused by name where they ask for something
    mcp_servers: list[Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: Any = None
    thinking: dict[str, Any] | None = None
    tool_choice: dict[str, Any] | None = None
    tools: list[Any] | None = None


class MessageRequest(MessageChat, AnswerRequest):
    """An answer to a chat."""

    max_tokens: int = Field(ge=1, le=1 << 20)
    temperature: float | None = Field(None, ge=0, le=1)
    stop_sequences: list[str] | None = None
    metadata: MessageMetadata | None = None
    diagnostics: Any = None
    inference_geo: str | None = None
    service_tier: str | None = None
    speed: str | None = None
    container: Any = None
    context_management: Any = None


def _refuse_unsupported(body: MessageChat) -> None:
    """Raises ApiError 400 with the name of what this server cannot do."""
    if body.tools:
        refuse("tools", "the models served here call no tools; leave it out")
    if body.tool_choice is not None and body.tool_choice.get("type") not in ("auto", "none"):
        refuse("tool_choice", "the models served here call no tools; leave it out")
    if body.thinking is not None and body.thinking.get("type") != "disabled":
        refuse("thinking", 'the models served here have no thinking apart from their answer; give {"type": "disabled"}')
    for name, value in (body.output_config or {}).items():
        if name != "effort" and value is not None:
            refuse(f"output_config.{name}", "nothing makes the answer follow a format; leave it out")
    for name in ("container", "context_management", "mcp_servers", "output_format"):
        if getattr(body, name, None):
            refuse(name, "leave it out")
    if body.messages[-1].role == "assistant":
        refuse(
            "messages", "the last one is the assistant's, and answers are not begun for the model; end with the user's"
        )


def _turns_of(body: MessageChat) -> list[ChatMessage]:
    system = [{"role": "system", "content": body.system}] if body.system else []
    return system + [{"role": one.role, "content": one.content} for one in body.messages]


# --- answers ----------------------------------------------------------------------------------------------------------


@routes.post("")
async def create_message(request: Request, body: MessageRequest) -> Response:
    """Answer a chat. The message's id is the one by which the answer is rated."""
    service, caller = service_of(request), caller_of(request, "chat")
    check_model(service, body.model)
    user = body.metadata.user_id if body.metadata is not None else None
    check_user(caller, user, "metadata.user_id")
    _refuse_unsupported(body)
    admit(service, caller, user)
    sampling = parse_sampling(body, service, body.max_tokens, stops=check_stops(body.stop_sequences, "stop_sequences"))
    prompt, cut_messages = chat_prompt(_turns_of(body), service, sampling.max_tokens)
    wanted = GenerationRequest(
        sampling, caller.name, user or caller.name, "message", body.model, stored=body.store is not False,
        streamed=bool(body.stream), cut_messages=cut_messages,
    )  # fmt: skip
    generation = Generation(service, new_id(PREFIX), wanted)
    await generation.begin([prompt])
    return await respond(request, generation, MessageReply(request, generation))


@routes.post("/count_tokens")
async def count_tokens(request: Request, body: MessageChat) -> dict[str, int]:
    """The tokens that a chat has for this model, whether or not it fits."""
    service, _ = service_of(request), caller_of(request, "chat")
    check_model(service, body.model)
    _refuse_unsupported(body)
    prompt, _ = chat_prompt(_turns_of(body), service, 1, cut=False)
    return {"input_tokens": len(prompt.tokens)}
