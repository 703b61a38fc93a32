"""How the tokens of one request are chosen and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.errors import RequestError
from utils.rules import Rule, boolean, check_rules, integer, is_int, is_number, number, several

# Scores are logits + temperature * noise in float32, and noise reaches 16: beyond this the
# rounding of the product (1e-2) begins to blur the logits.
MAX_TEMPERATURE = 1e4

# Between the seeds of outputs and of requests: odd, so that they never repeat (it is 2^64 / golden
# ratio).
SEED_STRIDE = 0x9E3779B97F4A7C15

# (token ids of prompt and output, logits [vocab_size] float32) -> logits of that shape.
LogitsProcessor = Callable[[list[int], Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; immutable and validated on construction.

    Logits pass through the steps of transformers' `generate`, in its order: repetition penalty
    (then presence and frequency penalty), `min_tokens`, `logits_processors`, temperature, top_k,
    top_p, min_p. Equally likely tokens at the border of top_k or top_p are all kept.

    Attributes:
        temperature: 0 takes the most likely token (greedy); above 0, up to 10,000, it divides
            the logits.
        top_p: keep the most likely tokens up to this share of the probability, in (0, 1].
        top_k: keep this many of the most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: 1e-6 to 1e6; logits of tokens in prompt or output are divided by it if
            positive, multiplied if negative. 1 changes nothing.
        presence_penalty: in [-2, 2]; subtracted from the logit of every token in the output.
        frequency_penalty: in [-2, 2]; the same, times its count in the output.
        seed: key of the request's noise, 0 <= seed < 2**63. Equal seeds give equal noise at
            equal positions, whatever the request is batched with. None takes one from the
            engine's own `seed` and the order of arrival. Of `n` outputs the first has this one.
        max_tokens: most tokens to generate. None generates up to the engine's
            `max_model_len`; it is the only value that is fitted to the context window.
        min_tokens: before so many, tokens that would end the request are not chosen and stop
            strings do not end it.
        stop: a text, or several, that ends the output; it is not part of the text. The tokens
            are those up to the one that completed it.
        stop_token_ids: tokens that end the output as an end-of-sequence token does.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: return the log-probability of each generated token and of so many most likely
            ones; 0 for that of the token alone. They are the model's own, before penalties,
            temperature and filters.
        prompt_logprobs: the same for the prompt's tokens, all but the first. Such a request
            takes nothing from the prefix cache, and a step holds the logits of all its tokens at
            once: lower `max_num_batched_tokens` where memory is short.
        n: outputs for the prompt, which is computed once as far as the prefix cache goes.
        logits_processors: for experiments: callables `(token_ids, logits) -> logits` on the
            tokens so far and one row of float32 logits, which run in the engine's step.
        priority: higher runs first and is preempted last, under policies that ask for it.
        user: whose request it is, for policies that share the engine between users.
        cache_salt: requests share cached prefixes only with those of an equal salt.
        predicted_tokens: a guess of the output's length, for policies that order or admit by
            it; it never ends the request. None stands for `max_tokens`.

    Raises:
        RequestError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 64
    min_tokens: int = 0
    stop: str | list[str] | tuple[str, ...] = ()
    stop_token_ids: list[int] | tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    logits_processors: list[LogitsProcessor] | tuple[LogitsProcessor, ...] = ()
    priority: int = 0
    user: str = ""
    cache_salt: str = ""
    predicted_tokens: int | None = None

    def __post_init__(self) -> None:
        check_rules(self, _RULES, RequestError)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            problem, fix = f"exceeds max_tokens={self.max_tokens}", "Lower it or raise max_tokens."
            raise RequestError("min_tokens", self.min_tokens, problem, fix)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        # Tuples, so that nobody's list can change the request later.
        for name in ("stop_token_ids", "logits_processors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @staticmethod
    def from_generation_config(folder: str | Path, **overrides: Any) -> SamplingParams:
        """The defaults that a checkpoint's generation_config.json asks for.

        Args:
            folder: the checkpoint. One without that file asks for nothing.
            overrides: values that take precedence.

        Raises:
            RequestError: a value is out of range.
            CheckpointError: the file is unusable.
        """
        # Here, as it imports transformers.
        from utils.checkpoint import generation_config

        found = generation_config(Path(folder))
        values = {_FROM_CONFIG[name]: v for name, v in found.items() if name in _FROM_CONFIG}
        if found.get("do_sample") is False:
            values["temperature"] = 0.0
        values = {name: value for name, value in values.items() if value is not None}
        return SamplingParams(**{**values, **overrides})

    def of_output(self, index: int) -> SamplingParams:
        """The parameters of output `index` of `n`, as a request of its own."""
        if self.n == 1:
            return self
        seed = self.seed if self.seed is None else (self.seed + index * SEED_STRIDE) % 2**63
        # The prompt's are the same for all.
        scores = None if index else self.prompt_logprobs
        return replace(self, n=1, seed=seed, prompt_logprobs=scores)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there already change the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p keep some tokens from being drawn."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def needs_logits(self) -> bool:
        """Whether filters, penalties, log-probabilities or the like rule out plain Gumbel-max."""
        asked = (self.filters, self.penalizes, self.min_tokens, self.logits_processors)
        return any(asked) or (self.logprobs, self.prompt_logprobs) != (None, None)


# Fields of generation_config.json, and ours.
_FROM_CONFIG = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


_STOPS = several(_is_text, "str, none of them empty", 'Use e.g. stop="\\n".')
_RULES = {
    "temperature": number(0, MAX_TEMPERATURE, "Use 0 for greedy decoding."),
    "top_p": Rule(
        lambda v: is_number(v, 0, 1) and v > 0, "must be a number in (0, 1]", "Use 1 to keep all."
    ),
    "top_k": integer(-1, fix="Use 0 to keep all."),
    "min_p": number(0, 1, "Use 0 to keep all."),
    "repetition_penalty": number(1e-6, 1e6, "Use 1 for none."),
    "presence_penalty": number(-2, 2, "Use 0 for none."),
    "frequency_penalty": number(-2, 2, "Use 0 for none."),
    "seed": Rule(
        lambda v: v is None or (is_int(v) and 0 <= v < 2**63),
        "must be an integer in [0, 2**63) or None",
        "Use e.g. seed=0.",
    ),
    "max_tokens": integer(1, fix="Use None to generate up to max_model_len.", optional=True),
    "min_tokens": integer(0, fix="Use 0 for none."),
    "stop": Rule(
        lambda v: _is_text(v) or _STOPS.allows(v),
        "must be a str or a list of str, none of them empty",
        _STOPS.fix,
    ),
    "stop_token_ids": several(
        lambda v: is_int(v) and v >= 0, "token ids", "Use e.g. stop_token_ids=[2]."
    ),
    "ignore_eos": boolean(),
    "logprobs": integer(0, fix="Use None for none.", optional=True),
    "prompt_logprobs": integer(0, fix="Use None for none.", optional=True),
    "n": integer(1, fix="Use 1 for one output."),
    "logits_processors": several(callable, "callables", "Use () for none."),
    "priority": Rule(is_int, "must be an integer", "Use 0, or more to run earlier."),
    "user": Rule(lambda v: isinstance(v, str), "must be a str", 'Use "" for none.'),
    # The rest of a salt behind \0 is the engine's.
    "cache_salt": Rule(
        lambda v: isinstance(v, str) and "\0" not in v,
        "must be a str without \\0",
        'Use "" for none.',
    ),
    "predicted_tokens": integer(1, fix="Use None if there is no guess.", optional=True),
}
