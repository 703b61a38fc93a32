"""Checks of what a caller gives for a request."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from config import Config
from sampling_params import SamplingParams
from utils.errors import RequestError, RequestTooLongError

ParamsForPrompts = SamplingParams | list[SamplingParams] | None


def params_per_prompt(
    params: SamplingParams | list[SamplingParams], count: int
) -> list[SamplingParams]:
    """Return `count` SamplingParams. Raises RequestError if type or length of `params` is wrong."""
    per_prompt = params if isinstance(params, list) else [params] * count
    if len(per_prompt) != count:
        given, problem = f"{len(per_prompt)} of them", f"there are {count} prompts"
        fix = "Give one SamplingParams for all prompts or one for each."
        raise RequestError("sampling_params", given, problem, fix)
    for one in per_prompt:
        if not isinstance(one, SamplingParams):
            fix = "Construct a SamplingParams."
            raise RequestError("sampling_params", one, "is no SamplingParams", fix)
    return per_prompt


def check_request(
    prompt: list[int], params: SamplingParams, config: Config, vocab_size: int, hidden_layers: int
) -> int:
    """Check the prompt and the parameters of a request. Returns the request's length limit.

    `hidden_layers` is `ModelRunner.hidden_layers`.

    Raises RequestError for an invalid request, RequestTooLongError if max_model_len is too small.
    """
    ids = f"Token ids are integers from 0 to {vocab_size - 1}."
    if not prompt:
        raise RequestError("prompt", prompt, "is empty", "Give at least one token.")
    # `isinstance(token, int)` would accept True and False as token ids.
    for token in prompt:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise RequestError("prompt", token, "is not a token id", ids)
    limit, most = config.max_model_len, params.max_tokens
    assert limit is not None
    # Without a number there is room for one token at least. With 0 the prompt may fill the window.
    if len(prompt) + (1 if most is None else most) > limit:
        problem = f"with max_tokens={most} it exceeds max_model_len={limit}"
        fix = "Shorten the prompt, lower max_tokens, or raise max_model_len."
        raise RequestTooLongError("prompt", f"{len(prompt)} tokens", problem, fix)
    if params.n != 1:
        raise RequestError("n", params.n, "this call makes one output", "Call it n times.")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None and count > vocab_size:
            problem, fix = f"the vocabulary has {vocab_size} tokens", f"Use {vocab_size} or less."
            raise RequestError(name, count, problem, fix)
    if params.bad_words:
        problem, fix = "LLMEngine has no tokenizer to encode them", "Use LLM, or bad_words_ids."
        raise RequestError("bad_words", params.bad_words, problem, fix)
    layer = params.hidden_states
    if layer is not None and not hidden_layers:
        problem = "the runner returns none"
        raise RequestError("hidden_states", layer, problem, "Use the runner 'local' or None.")
    if isinstance(layer, int) and not -hidden_layers - 1 <= layer <= hidden_layers:
        problem = f"the model has {hidden_layers} layers"
        fix = f"Use {-hidden_layers - 1} to {hidden_layers}, or 'last'."
        raise RequestError("hidden_states", layer, problem, fix)
    named: dict[str, Iterable[int]] = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": dict(params.logit_bias or ()),
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words_ids": chain.from_iterable(params.bad_words_ids),
    }
    for name, tokens in named.items():
        for token in tokens:
            if token >= vocab_size:
                raise RequestError(name, token, "is not a token id", ids)
    return limit if most is None else len(prompt) + most
