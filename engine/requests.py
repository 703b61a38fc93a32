"""Requests as users give them and get them back: checks, outputs, streams."""

from __future__ import annotations

import math
import pickle
import pickletools
from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from config import Config
from engine.sequence import Sequence
from sampling_params import SamplingParams
from utils.errors import RequestError, RequestTooLongError
from utils.text import Decode

ParamsForPrompts = SamplingParams | list[SamplingParams] | None


def params_per_prompt(params: ParamsForPrompts, count: int) -> list[SamplingParams]:
    """As many parameters as prompts.

    Raises:
        RequestError: there are more or fewer, or something else.
    """
    if params is None:
        params = SamplingParams()
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
    prompt: list[int], params: SamplingParams, config: Config, vocab_size: int
) -> int:
    """Most tokens, prompt and output together, that a request for one output may come to.

    Args:
        config: resolved.

    Raises:
        RequestError: model or ranks cannot serve the prompt or a parameter; the message names it.
        RequestTooLongError: the request exceeds max_model_len.
    """
    ids = f"Token ids are integers from 0 to {vocab_size - 1}."
    if not prompt:
        raise RequestError("prompt", prompt, "is empty", "Give at least one token.")
    # Not isinstance: True and False are no token ids.
    for token in prompt:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise RequestError("prompt", token, "is not a token id", ids)
    limit, most = config.max_model_len, params.max_tokens
    assert limit is not None
    if len(prompt) + (most or 1) > limit:
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
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise RequestError("stop_token_ids", token, "is not a token id", ids)
    if params.logits_processors and config.tensor_parallel_size > 1:
        _check_picklable(params)
    return limit if most is None else len(prompt) + most


def _check_picklable(params: SamplingParams) -> None:
    """Refuse logits processors that cannot be sent to the processes of other ranks."""
    try:
        data = pickle.dumps(params.logits_processors)
        # The ranks' processes have another one.
        if any(argument == "__main__" for _, argument, _ in pickletools.genops(data)):
            raise TypeError("they are of the module __main__")
    except Exception as error:  # whatever the callables' own pickling raises
        problem = f"the ranks cannot be sent them ({error})"
        fix = "Use functions of a module, or tensor_parallel_size=1."
        processors = params.logits_processors
        raise RequestError("logits_processors", processors, problem, fix) from error


@dataclass(frozen=True, slots=True, eq=False)
class PromptRequests:
    """The requests `seqs` of prompt `index` of a call, one for each of its `n` outputs.

    When all of them have ended, this object is put into the list `ended`.
    """

    index: int
    seqs: list[Sequence]
    ended: list[PromptRequests]


def make_output(seqs: list[Sequence], decode: Decode) -> dict[str, Any]:
    """The dictionary of a prompt's outputs; see `LLM.generate`."""
    outputs = [_one_output(seq, decode) for seq in seqs]
    first = seqs[0]
    asked = first.sampling.prompt_logprobs is not None
    out = {
        **outputs[0],
        "prompt_token_ids": first.token_ids[: first.num_prompt_tokens],
        "prompt_logprobs": first.prompt_logprobs if asked else None,
    }
    return out if len(outputs) == 1 else {**out, "outputs": outputs}


def _one_output(seq: Sequence, decode: Decode) -> dict[str, Any]:
    tokens, text = seq.output_token_ids, seq.text
    times, added = seq.token_times, seq.added_at
    gaps = sorted(b - a for a, b in pairwise(times))
    return {
        "text": text.text if text is not None and text.stopped else decode(tokens),
        "token_ids": tokens,
        "finish_reason": seq.finish_reason,
        "error": seq.error,
        "logprobs": seq.logprobs if seq.sampling.logprobs is not None else None,
        "metrics": {
            "queue_time": None if seq.admitted_at is None else seq.admitted_at - added,
            "time_to_first_token": times[0] - added if times else None,
            "mean_inter_token_time": sum(gaps) / len(gaps) if gaps else None,
            "p99_inter_token_time": percentile(gaps, 0.99) if gaps else None,
            "longest_inter_token_time": gaps[-1] if gaps else None,
            "cached_prompt_tokens": seq.num_cached,
            "preemptions": seq.num_preemptions,
        },
    }


def percentile(rising: list[float], share: float) -> float:
    """The least of the values that a share of them does not exceed: the nearest rank.

    Always one of the values, so that a p99 of few is their largest.

    Args:
        rising: at least one value, in rising order.
        share: above 0 and at most 1.
    """
    return rising[math.ceil(share * len(rising)) - 1]


def increments(
    seq: Sequence, index: int, *, has_text: bool
) -> Generator[dict[str, Any] | None, None, None]:
    """What an output has gained since the last time; None if nothing can be shown yet.

    Ends after the increment with a finish_reason.

    Args:
        seq: has a reader of its text.
        index: of its prompt.
        has_text: False without a tokenizer; tokens are then told as they come.
    """
    text, reason = seq.text, None
    num_tokens = num_chars = 0
    assert text is not None
    while reason is None:
        reason = seq.finish_reason
        chars = text.settled if reason is None else len(text.text)
        tokens = seq.output_token_ids[num_tokens:]
        if reason is None and not (chars > num_chars if has_text else tokens):
            yield None
            continue
        told = {"index": index, "sample": seq.sample, "text": text.text[num_chars:chars]}
        told |= {"token_ids": tokens, "finish_reason": reason}
        num_tokens, num_chars = num_tokens + len(tokens), chars
        yield told if reason is None else {**told, "error": seq.error}
