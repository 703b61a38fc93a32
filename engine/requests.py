"""State of requests, checks of requests, and the outputs that users get."""

from __future__ import annotations

import copy
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from config import Config
from engine.step import SeedKind, TokenLogprobs
from sampling_params import LogitsProcessor, SamplingParams
from utils.errors import RequestError, RequestTooLongError

if TYPE_CHECKING:
    from utils.text import Decode, TextReader


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """A request and its state, from arrival to finish. Times are seconds on the runner's clock."""

    request_id: int  # unique in the engine; a later request has a larger id
    token_ids: list[int]  # prompt and committed output; a copy of the caller's list
    sampling: SamplingParams  # the parameters that the user gave
    _: KW_ONLY
    max_total_tokens: int  # maximum number of prompt and output tokens together
    stop_token_ids: frozenset[int] = frozenset()  # ids of tokens that end the request
    seed: int = 0  # seed of the random numbers that sampling uses
    seed_kind: SeedKind = SeedKind.DERIVED
    sample: int = 0  # index of this output among the outputs of its prompt
    num_prompt_tokens: int = field(init=False)
    finish_reason: str | None = None  # None while unfinished, or "stop", "length", "abort", "error"
    error: Exception | None = None  # the `RowReport.error` that ended the request, if any
    # For each output token, its mapping in `RowReport.values`; empty if the runner returns none.
    values: list[Mapping[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # log-probs of output, if requested
    # Log-probabilities of the prompt tokens computed so far, if requested. The first entry is None,
    # because no position predicts the first token.
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    text: TextReader | None = None  # converts output to text, for streaming or stop strings
    added_at: float = 0.0
    admitted_at: float | None = None  # time of the first admission
    token_times: list[float] = field(default_factory=list)  # `StepResult.ended_at` for each token
    num_cached: int = 0  # prompt tokens found in the cache at the first admission
    num_preemptions: int = 0

    # Only the scheduler changes the following fields, from `slot` to `capacity`.
    slot: int | None = field(init=False)  # index in the runner's tables; None while not admitted
    # How many leading positions are cached, committed or in flight, including drafts in flight.
    num_scheduled: int = field(init=False)
    num_drafted: int = field(init=False)  # number of the request's drafts in steps in flight
    num_prefill: int = field(init=False)  # number of prompt and output tokens at the last admission
    num_in_flight: int = field(init=False)  # number of steps in flight with a row of this request
    num_committed: int = field(init=False)  # how many leading positions are cached or committed
    capacity: int = field(init=False)  # how many positions the blocks of the request can hold

    def __post_init__(self) -> None:
        self.token_ids = list(self.token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.reset()

    def reset(self) -> None:
        """Initialise the fields that only the scheduler sets. Called at arrival and preemption."""
        self.slot = None
        self.num_scheduled = self.num_committed = self.num_drafted = self.num_in_flight = 0
        self.num_prefill = self.capacity = 0

    @property
    def cache_salt(self) -> str:
        """A string for the prefix cache: only requests with equal salts share cached prefixes."""
        salt = self.sampling.cache_salt
        if self.sampling.prompt_logprobs is None:
            return salt
        # The cache does not keep the logits that prompt log-probabilities need. The request id in
        # the salt ensures that the request computes each prompt position itself, at least once.
        return f"{salt}\0{self.request_id}"

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def keep_output(self, num_tokens: int) -> None:
        """Drop output tokens after the first `num_tokens`, and their times, logprobs and values."""
        del self.token_ids[self.num_prompt_tokens + num_tokens :]
        del self.token_times[num_tokens:]
        del self.logprobs[num_tokens:]
        del self.values[num_tokens:]

    @property
    def num_expected_tokens(self) -> int:
        """Expected final length of `token_ids`, above the current length unless max_tokens=0."""
        guess = self.sampling.predicted_tokens
        if guess is None:
            return self.max_total_tokens
        expected = max(self.num_prompt_tokens + guess, len(self.token_ids) + 1)
        return min(expected, self.max_total_tokens)

    def __repr__(self) -> str:
        return (
            f"Sequence(request_id={self.request_id}, prompt={self.num_prompt_tokens}, "
            f"tokens={len(self.token_ids)}/{self.max_total_tokens}, slot={self.slot}, "
            f"finish_reason={self.finish_reason!r})"
        )


ParamsForPrompts = SamplingParams | list[SamplingParams] | None


def params_per_prompt(params: ParamsForPrompts, count: int) -> list[SamplingParams]:
    """Return `count` SamplingParams. Raises RequestError if type or length of `params` is wrong."""
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
    """Check the prompt and the parameters of a request. Returns the request's length limit.

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
    """Raise a RequestError for logits processors that cannot be sent to the ranks' processes."""
    try:
        data = pickle.dumps(params.logits_processors)
        # A rank's process cannot unpickle a function of __main__: the process has another __main__.
        if any(argument == "__main__" for _, argument, _ in pickletools.genops(data)):
            raise TypeError("they are of the module __main__")
    except Exception as error:  # pickling a user's object may raise any exception
        problem = f"the ranks cannot be sent them ({error})"
        fix = "Use functions of a module, or tensor_parallel_size=1."
        processors = params.logits_processors
        raise RequestError("logits_processors", processors, problem, fix) from error


class OwnProcessor:
    """A logits processor of one request, made from the processor that the user gave.

    If the given object has a method `for_request`, the method makes the processor. Otherwise the
    processor is a deep copy of the object; a deep copy of a function is the function itself. So
    requests with the same SamplingParams do not share the state of a processor.
    """

    def __init__(
        self, given: Any, prompt: list[int], sample: int, outside: Callable[[], Any]
    ) -> None:
        """`outside` makes a context manager in which the processor is made and called."""
        self._outside = outside
        self._call: LogitsProcessor | None
        make = getattr(given, "for_request", None)
        try:
            with outside():
                self._call = copy.deepcopy(given) if make is None else make(list(prompt), sample)
            if not callable(self._call):
                raise TypeError(f"{self._call!r} is not callable")
        except Exception as error:  # functions of the user may raise any exception
            problem = f"a request cannot get a processor of its own ({error!r})"
            fix = "Give the object a method for_request(prompt_token_ids, sample)."
            raise RequestError("logits_processors", given, problem, fix) from error

    def __call__(self, token_ids: list[int], logits: Any) -> Any:
        call = self._call
        if call is None:
            return logits
        with self._outside():
            return call(token_ids, logits)

    def release(self) -> None:
        """Forget the processor. It will not be called again."""
        self._call = None

    def __repr__(self) -> str:
        return repr(self._call)

    def __reduce__(self) -> tuple[Any, ...]:
        return _sent_processor, (self._call,)


def _sent_processor(call: LogitsProcessor | None) -> LogitsProcessor | None:
    """Return the logits processor that a rank unpickles in place of an `OwnProcessor`."""
    return call


def own_processors(
    params: SamplingParams, prompt: list[int], sample: int, outside: Callable[[], Any]
) -> SamplingParams:
    """Return `params` with an `OwnProcessor` in place of each logits processor."""
    if not params.logits_processors:
        return params
    given = params.logits_processors
    own = tuple(OwnProcessor(one, prompt, sample, outside) for one in given)
    return replace(params, logits_processors=own)


@dataclass(frozen=True, slots=True, eq=False)
class PromptRequests:
    """A prompt's requests. `LLM` appends this object to the list `ended` when all have ended."""

    index: int  # index of the prompt among the caller's prompts
    seqs: list[Sequence]  # one request for each output
    ended: list[PromptRequests]  # list of prompts whose requests have all ended


def make_output(seqs: list[Sequence], decode: Decode) -> dict[str, Any]:
    """The dictionary that `LLM.generate` returns for a prompt, made from the prompt's requests."""
    outputs, first = [_one_output(seq, decode) for seq in seqs], seqs[0]
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
    """The percentile 100 * `share` of the sorted values `rising`, by the nearest-rank method."""
    return rising[math.ceil(share * len(rising)) - 1]


class OutputStream:
    """Gives the output of a request in parts, each with the tokens and the text that are new.

    Text that may become part of a stop string is held back. Without a tokenizer there is no text.
    """

    def __init__(self, seq: Sequence, index: int, *, has_text: bool) -> None:
        self._seq, self._index, self._has_text = seq, index, has_text
        self._num_tokens = self._num_chars = 0  # how much the parts so far have
        self._num_seen = 0  # number of output tokens at the last call of `take`
        self.ended = False  # whether `take` has returned the last part

    def ready(self) -> bool:
        """Whether there are tokens that `take` has not seen, or the request has ended."""
        seq = self._seq
        if self.ended:
            return False
        return seq.finish_reason is not None or self._num_output_tokens > self._num_seen

    @property
    def _num_output_tokens(self) -> int:
        return len(self._seq.token_ids) - self._seq.num_prompt_tokens

    def take(self) -> dict[str, Any] | None:
        """Return the next part; None if there is no new text (without a tokenizer: no new token).

        The last part has a finish_reason and the key `error`.
        """
        seq, text, reason = self._seq, self._seq.text, self._seq.finish_reason
        assert text is not None
        self._num_seen = self._num_output_tokens
        chars = text.settled if reason is None else len(text.text)
        tokens = seq.output_token_ids[self._num_tokens :]
        if reason is None and not (chars > self._num_chars if self._has_text else tokens):
            return None
        told = {
            "index": self._index,
            "sample": seq.sample,
            "text": text.text[self._num_chars : chars],
            "token_ids": tokens,
            "finish_reason": reason,
        }
        self._num_tokens, self._num_chars = self._num_tokens + len(tokens), chars
        self.ended = reason is not None
        return {**told, "error": seq.error} if self.ended else told
