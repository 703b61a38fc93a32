"""Whether an engine can serve a request."""

from __future__ import annotations

import pickle
import pickletools

from sampling_params import SamplingParams
from utils.errors import RequestError, RequestTooLongError


def longest_of(prompt: list[int], params: SamplingParams, limit: int, vocab_size: int) -> int:
    """Most tokens the request may come to, prompt and output.

    Args:
        limit: max_model_len.

    Raises:
        RequestError: the prompt is empty or has a token id outside the vocabulary.
        RequestTooLongError: it exceeds the limit.
    """
    if not prompt:
        raise RequestError("prompt", prompt, "is empty", "Give at least one token.")
    # Not isinstance: True and False are no token ids.
    bad = [t for t in prompt if type(t) is not int or not 0 <= t < vocab_size]
    if bad:
        raise RequestError(
            "prompt",
            bad[0],
            "is not a token id",
            f"Token ids are integers from 0 to {vocab_size - 1}.",
        )
    longest = limit - 1 if params.max_tokens is None else limit - params.max_tokens
    if len(prompt) > longest:
        raise RequestTooLongError(
            "prompt",
            f"{len(prompt)} tokens",
            f"with max_tokens={params.max_tokens} it exceeds max_model_len={limit}",
            "Shorten the prompt, lower max_tokens, or raise max_model_len.",
        )
    return limit if params.max_tokens is None else len(prompt) + params.max_tokens


def check_sampling(params: SamplingParams, vocab_size: int, num_ranks: int) -> None:
    """Refuse parameters that model or ranks cannot give.

    Raises:
        RequestError: names the parameter.
    """
    if params.n != 1:
        raise RequestError("n", params.n, "this call makes one output", "Call it n times.")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise RequestError(
                name,
                getattr(params, name),
                f"the vocabulary has {vocab_size} tokens",
                f"Use {vocab_size} or less.",
            )
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise RequestError(
                "stop_token_ids",
                token,
                "is not a token id",
                f"Token ids are integers from 0 to {vocab_size - 1}.",
            )
    if params.logits_processors and num_ranks > 1:
        try:
            data = pickle.dumps(params.logits_processors)
            # The ranks' processes have another one.
            if any(argument == "__main__" for _, argument, _ in pickletools.genops(data)):
                raise TypeError("they are of the module __main__")
        except Exception as error:  # whatever the callables' own pickling raises
            raise RequestError(
                "logits_processors",
                params.logits_processors,
                f"the ranks cannot be sent them ({error})",
                "Use functions of a module, or tensor_parallel_size=1.",
            ) from error
