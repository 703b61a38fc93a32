"""What users give, as token ids and parameters for each prompt, or an error that says why not."""

from __future__ import annotations

from typing import Any

from sampling_params import SamplingParams
from utils.errors import RequestError

Prompt = str | list[int]
Prompts = Prompt | list[str] | list[list[int]] | list[Prompt]


def tokenized(tokenizer: Any | None, prompts: Prompts) -> list[list[int]]:
    """The token ids of every prompt; a single one counts as a list.

    Raises:
        RequestError: one is neither text nor token ids, or text without a tokenizer.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise RequestError(
            "prompts", prompts, "is no list of prompts", "Give a list of texts or token ids."
        )
    if prompts and isinstance(prompts[0], int):
        prompts = [prompts]
    return [_tokens(tokenizer, prompt) for prompt in prompts]


def _tokens(tokenizer: Any | None, prompt: Any) -> list[int]:
    if isinstance(prompt, (list, tuple)):
        return list(prompt)
    if not isinstance(prompt, str):
        raise RequestError(
            "prompt", prompt, "is neither text nor token ids", "Give a str or a list of int."
        )
    if tokenizer is None:
        raise RequestError(
            "prompt",
            prompt,
            "the checkpoint has no tokenizer",
            "Give token ids, or add the tokenizer's files to the folder.",
        )
    try:
        return list(tokenizer.encode(prompt))
    except (TypeError, ValueError) as error:
        raise RequestError(
            "prompt", prompt, f"the tokenizer refuses it ({error})", "Give valid Unicode."
        ) from error


def templated(tokenizer: Any | None, messages: Any) -> list[int]:
    """The token ids of a conversation, up to where the answer begins.

    Raises:
        RequestError: there is no chat template, or it refuses the messages.
    """
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise RequestError(
            "messages", messages, "the checkpoint has no chat template", "Use generate()."
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))
    # Templates are code of the checkpoint and raise what they like.
    except Exception as error:
        raise RequestError(
            "messages",
            messages,
            f"the chat template refuses them ({error})",
            'Give a list of {"role": ..., "content": ...}.',
        ) from error


def params_per_prompt(
    params: SamplingParams | list[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """As many parameters as prompts.

    Raises:
        RequestError: there are more or fewer, or something else.
    """
    if params is None:
        params = SamplingParams()
    per_prompt = params if isinstance(params, list) else [params] * count
    if len(per_prompt) != count:
        raise RequestError(
            "sampling_params",
            f"{len(per_prompt)} of them",
            f"there are {count} prompts",
            "Give one SamplingParams for all prompts or one for each.",
        )
    for one in per_prompt:
        if not isinstance(one, SamplingParams):
            raise RequestError(
                "sampling_params", one, "is no SamplingParams", "Construct a SamplingParams."
            )
    return per_prompt
