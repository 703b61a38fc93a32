"""How the tokens of one request are chosen and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.errors import RequestError
from utils.rules import (
    Rule,
    boolean,
    check_rules,
    integer,
    is_int,
    number,
    ruled,
    rules_of,
    several,
    share,
)

# Between the seeds of outputs and of requests: 2^64 / golden ratio. Odd, so that none repeats.
SEED_STRIDE = 0x9E3779B97F4A7C15

# (token ids of prompt and output, logits [vocab_size] float32) -> logits of that shape.
LogitsProcessor = Callable[[list[int], Any], Any]


_SEED = Rule(
    lambda v: v is None or (is_int(v) and 0 <= v < 2**63),
    "must be an integer in [0, 2**63) or None",
    "Use e.g. seed=0.",
)
_TEXTS = several(lambda v: isinstance(v, str) and v != "", "", "")
_STOP = Rule(
    lambda v: _TEXTS.allows(v) or _TEXTS.allows([v]),
    "must be a str or a list of str, none of them empty",
    'Use e.g. stop="\\n".',
)
_TOKEN_IDS = several(lambda v: is_int(v) and v >= 0, "token ids", "Use e.g. stop_token_ids=[2].")
# The rest of a salt behind \0 is the engine's.
_SALT = Rule(
    lambda v: isinstance(v, str) and "\0" not in v, "must be a str without \\0", 'Use "" for none.'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; immutable and validated on construction.

    Logits pass through the steps of transformers' `generate`, in its order: repetition penalty
    (then presence and frequency penalty), `min_tokens`, `logits_processors`, temperature, top_k,
    top_p, min_p. Equally likely tokens at the border of top_k or top_p are all kept.

    Attributes:
        temperature: 0 takes the most likely token (greedy); above 0 it divides the logits.
        top_p: keep the most likely tokens up to this share of the probability.
        top_k: keep this many of the most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: logits of tokens in prompt or output are divided by it if positive,
            multiplied if negative.
        presence_penalty: subtracted from the logit of every token in the output.
        frequency_penalty: the same, times its count in the output.
        seed: key of the request's noise. Equal seeds give equal noise at equal positions, whatever
            the request is batched with. None takes one from the engine's own `seed` and the order
            of arrival. Of `n` outputs the first has this one.
        max_tokens: most tokens to generate. None generates up to the engine's `max_model_len`; it
            is the only value that is fitted to the context window.
        min_tokens: before so many, tokens that would end the request are not chosen and stop
            strings do not end it.
        stop: a text, or several, that ends the output; it is not part of the text. The tokens
            are those up to the one that completed it.
        stop_token_ids: tokens that end the output as an end-of-sequence token does.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: return the log-probability of each generated token and of so many most likely
            ones. They are the model's own, before penalties, temperature and filters.
        prompt_logprobs: the same for the prompt's tokens, all but the first. Such a request
            takes nothing from the prefix cache, and a step holds the logits of all its tokens at
            once: lower `max_num_batched_tokens` where memory is short.
        n: outputs for the prompt, which is computed once as far as the prefix cache goes.
        logits_processors: callables `(token_ids, logits) -> logits` on the tokens so far and one
            row of float32 logits, which run in the engine's step.
        priority: higher runs first and is preempted last, under policies that ask for it.
        user: whose request it is, for policies that share the engine between users.
        cache_salt: requests share cached prefixes only with those of an equal salt.
        predicted_tokens: a guess of the output's length for scheduling policies; it never ends
            the request. None stands for `max_tokens`.
        penalizes: derived: tokens that were there already change the logits.
        filters: derived: top_k, top_p or min_p keep some tokens from being drawn.
        needs_logits: derived: plain Gumbel-max sampling is not enough.

    Raises:
        RequestError: a value is out of range; the message names the field.
    """

    # Scores are logits + temperature * noise in float32, and noise reaches 16: beyond 1e4 the
    # rounding of the product (1e-2) begins to blur the logits.
    temperature: float = ruled(1.0, number(0, 1e4, "Use 0 for greedy decoding."))
    top_p: float = ruled(1.0, share("Use 1 to keep all."))
    top_k: int = ruled(0, integer(-1, fix="Use 0 to keep all."))
    min_p: float = ruled(0.0, number(0, 1, "Use 0 to keep all."))
    repetition_penalty: float = ruled(1.0, number(1e-6, 1e6, "Use 1 for none."))
    presence_penalty: float = ruled(0.0, number(-2, 2, "Use 0 for none."))
    frequency_penalty: float = ruled(0.0, number(-2, 2, "Use 0 for none."))
    seed: int | None = ruled(None, _SEED)
    max_tokens: int | None = ruled(
        64, integer(1, fix="Use None to generate up to max_model_len.", optional=True)
    )
    min_tokens: int = ruled(0, integer(0, fix="Use 0 for none."))
    stop: str | list[str] | tuple[str, ...] = ruled((), _STOP)
    stop_token_ids: list[int] | tuple[int, ...] = ruled((), _TOKEN_IDS)
    ignore_eos: bool = ruled(False, boolean())
    logprobs: int | None = ruled(None, integer(0, fix="Use None for none.", optional=True))
    prompt_logprobs: int | None = ruled(None, integer(0, fix="Use None for none.", optional=True))
    n: int = ruled(1, integer(1, fix="Use 1 for one output."))
    logits_processors: list[LogitsProcessor] | tuple[LogitsProcessor, ...] = ruled(
        (), several(callable, "callables", "Use () for none.")
    )
    priority: int = ruled(0, Rule(is_int, "must be an integer", "Use 0, or more to run earlier."))
    user: str = ruled("", Rule(lambda v: isinstance(v, str), "must be a str", 'Use "" for none.'))
    cache_salt: str = ruled("", _SALT)
    predicted_tokens: int | None = ruled(
        None, integer(1, fix="Use None if there is no guess.", optional=True)
    )
    penalizes: bool = field(init=False, repr=False, compare=False)
    filters: bool = field(init=False, repr=False, compare=False)
    needs_logits: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_rules(self, _RULES, RequestError)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            problem, fix = f"exceeds max_tokens={self.max_tokens}", "Lower it or raise max_tokens."
            raise RequestError("min_tokens", self.min_tokens, problem, fix)
        # Tuples, so that nobody's list can change the request later.
        put = object.__setattr__
        put(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        put(self, "stop_token_ids", tuple(self.stop_token_ids))
        put(self, "logits_processors", tuple(self.logits_processors))
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        put(self, "penalizes", penalties != (1, 0, 0))
        filters = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        put(self, "filters", self.temperature > 0 and filters)
        asked = self.filters or self.penalizes or self.min_tokens or self.logits_processors
        scores = (self.logprobs, self.prompt_logprobs) != (None, None)
        put(self, "needs_logits", bool(asked or scores))

    @staticmethod
    def from_generation_config(folder: str | Path, **overrides: Any) -> SamplingParams:
        """The defaults that a checkpoint's generation_config.json, if any, asks for.

        Overrides take precedence. A CheckpointError says that the file is unusable.
        """
        # Here, as it imports transformers.
        from utils.checkpoint import generation_config

        found = generation_config(Path(folder))
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        ours = {name: found.get(name) for name in names}
        ours |= {f"{m}_tokens": found.get(f"{m}_new_tokens") for m in ("max", "min")}
        if found.get("do_sample") is False:
            ours["temperature"] = 0.0
        ours = {name: value for name, value in ours.items() if value is not None}
        return SamplingParams(**{**ours, **overrides})

    def of_output(self, index: int) -> SamplingParams:
        """The parameters of output `index` of `n`, as a request of its own."""
        seed = self.seed if self.seed is None else (self.seed + index * SEED_STRIDE) % 2**63
        # The prompt's are the same for all.
        scores = None if index else self.prompt_logprobs
        return replace(self, n=1, seed=seed, prompt_logprobs=scores)


_RULES = rules_of(SamplingParams)
