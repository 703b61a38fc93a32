"""Converts conversations to prompts with the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from utils.errors import RequestError

Message = dict[str, Any]


class ChatOptions(TypedDict):
    """Arguments of `LLM.chat` that are arguments of the tokenizer's `apply_chat_template` too."""

    tools: list[Any] | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool
    continue_final_message: bool


PLAIN_CHAT = ChatOptions(
    tools=None,
    chat_template=None,
    chat_template_kwargs=None,
    add_generation_prompt=True,
    continue_final_message=False,
)


def check_chat(options: ChatOptions) -> None:
    """Raise a RequestError if an option is wrong or contradicts another one."""
    flags = ("add_generation_prompt", "continue_final_message")
    for name, value in options.items():
        if name in flags and not isinstance(value, bool):
            raise RequestError(name, value, "must be a bool", "Use True or False.")
    if options["continue_final_message"] and options["add_generation_prompt"]:
        problem, fix = "contradicts add_generation_prompt=True", "Use add_generation_prompt=False."
        raise RequestError("continue_final_message", True, problem, fix)
    tools, template = options["tools"], options["chat_template"]
    if not isinstance(tools, (list, tuple, type(None))):
        raise RequestError("tools", tools, "must be a list", "Give a list of JSON schemas.")
    if not isinstance(template, (str, type(None))):
        fix = "Give the template, not its file."
        raise RequestError("chat_template", template, "must be a str", fix)
    others = options["chat_template_kwargs"]
    if others is None:
        return
    if not isinstance(others, Mapping) or not all(isinstance(name, str) for name in others):
        fix = 'Use e.g. {"enable_thinking": False}.'
        raise RequestError("chat_template_kwargs", others, "must be a dict", fix)
    for name in others:
        if name in options:
            fix = f"Give {name} to chat itself."
            raise RequestError("chat_template_kwargs", name, "is an argument of chat", fix)
        if name in ("conversation", "tokenize", "return_dict", "return_tensors"):
            fix = "Leave it out: chat makes the prompt's text, and then its token ids."
            raise RequestError("chat_template_kwargs", name, "is not for the template", fix)


def templated(
    tokenizer: Any | None, messages: Any, options: ChatOptions = PLAIN_CHAT
) -> dict[str, Any]:
    """Return a conversation as a prompt: a dictionary with `prompt` and `prompt_token_ids`.

    Raises a RequestError if a message is wrong, or the chat template is missing or fails.
    """
    given, others = dict(options), options["chat_template_kwargs"] or {}
    del given["chat_template_kwargs"]
    template = options["chat_template"] or getattr(tokenizer, "chat_template", None)
    if tokenizer is None or template is None:
        problem = "the checkpoint has no chat template"
        raise RequestError("messages", messages, problem, "Use generate(), or give chat_template.")
    plain = _with_texts(messages)
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, **given, **others)
        token_ids = list(tokenizer.encode(text, add_special_tokens=False))
    # A chat template is a program in the checkpoint. The program may raise any type of error.
    except Exception as error:
        problem = f"the chat template fails ({error})"
        fix = 'Give a list of {"role": ..., "content": ...}'
        used = [name for name in ("tools", "chat_template") if options[name] is not None]
        used += others
        fix += f", and check {', '.join(used)}." if used else "."
        raise RequestError("messages", messages, problem, fix) from error
    return {"prompt": text, "prompt_token_ids": token_ids}


def _with_texts(messages: Any) -> Any:
    """Return the messages with a text in place of each list of content parts.

    The texts of the parts are joined with line ends, as in vLLM. Wrong messages stay as they are,
    since the chat template decides what a message is.
    """
    if not isinstance(messages, (list, tuple)):
        return messages
    return [
        {**one, "content": _text(one["content"])}
        if isinstance(one, Mapping) and isinstance(one.get("content"), (list, tuple))
        else one
        for one in messages
    ]


def _text(parts: list[Any] | tuple[Any, ...]) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            fix = 'Give a str, or a list of {"type": "text", "text": ...}.'
            raise RequestError("messages", part, "is no part with text", fix)
        texts.append(part["text"])
    return "\n".join(texts)
