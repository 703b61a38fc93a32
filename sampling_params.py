"""Sampling parameters of a request: how its tokens are chosen, and when its output ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError, RequestError
from utils.foreign_names import PARAMETERS, names_checked
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

# Function of token ids (prompt and output) and float32 logits [vocab_size]; returns new logits.
LogitsProcessor = Callable[[list[int], Any], Any]

# Maximum of `logprobs` and `prompt_logprobs`. A token's dictionary of 1,024 entries takes 100 KB of
# host memory. On a GPU, one kernel finds the likeliest tokens of each 1,024 logits.
MAX_LOGPROBS = 1024
# Maximum of `n`. The n requests of a prompt are queued at once, each with a copy of the prompt.
MAX_OUTPUTS = 16_384
# Maximum numbers of entries in `logit_bias` and `bad_words_ids`, and of tokens in a bad word. A
# request's entries stay on the device while the request runs, and bad words are compared in every
# step.
MAX_BIASES, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 1024, 512, 32

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
_LAYER = Rule(
    lambda v: v is None or v == "last" or is_int(v),
    'must be "last", an integer or None',
    "Use None for none.",
)
_PROCESSORS = several(
    lambda v: callable(v) or callable(getattr(v, "for_request", None)),
    "callables, or of objects with a method for_request",
    "Use () for none.",
)
_TOKEN_IDS = several(lambda v: is_int(v) and v >= 0, "token ids", "Use e.g. stop_token_ids=[2].")
_COUNT = integer(0, MAX_LOGPROBS, "Use None for none.", optional=True)
_BIAS = Rule(
    lambda v: v is None or _is_bias(v),
    f"must be a dict of at most {MAX_BIASES} token ids, with numbers from -100 to 100",
    "Use e.g. logit_bias={5: -100}, or None for none.",
)
_ALLOWED = Rule(
    lambda v: v is None or (_TOKEN_IDS.allows(v) and len(v) > 0),
    "must be a list of token ids that is not empty, or None",
    "Use None to allow all tokens.",
)
_WORDS = Rule(
    lambda v: v is None or (_TEXTS.allows(v) and all(word.strip() for word in v)),
    "must be a list of str, none of them blank, or None",
    'Use e.g. bad_words=["foo"], or None for none.',
)
_WORDS_IDS = Rule(
    lambda v: isinstance(v, (list, tuple)) and len(v) <= MAX_BAD_WORDS and all(map(_is_word, v)),
    f"must be a list of at most {MAX_BAD_WORDS} lists of 1 to {MAX_BAD_WORD_TOKENS} token ids",
    "Use e.g. bad_words_ids=[[2, 7]].",
)
_SCHEMA = Rule(
    lambda v: v is None or _json_schema(v) is not None,
    "must be a JSON schema, as a dict or as JSON text",
    'Use e.g. json_schema={"type": "object"}, or None for none.',
)
# \0 is kept for salts that the engine may make itself.
_SALT = Rule(
    lambda v: isinstance(v, str) and "\0" not in v, "must be a str without \\0", 'Use "" for none.'
)


def _is_bias(value: Any) -> bool:
    """Return whether a value is a bias for some tokens, as a dict or as pairs."""
    try:
        bias = dict(value)
    except (TypeError, ValueError):
        return False
    return (
        len(bias) <= MAX_BIASES
        and _TOKEN_IDS.allows(list(bias))
        and all(map(number(-100, 100, "").allows, bias.values()))
    )


def _is_word(value: Any) -> bool:
    return bool(_TOKEN_IDS.allows(value) and 1 <= len(value) <= MAX_BAD_WORD_TOKENS)


def _json_schema(value: Any) -> str | None:
    """Return a JSON schema as JSON text, or None if `value` is no JSON schema."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        # JSON has no NaN and no Infinity. For them `int` raises a ValueError.
        return text if isinstance(json.loads(text, parse_constant=int), dict) else None
    except (TypeError, ValueError, RecursionError):
        return None


@names_checked(PARAMETERS, RequestError, "parameter")
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; immutable and validated on construction.

    Numbers of NumPy are stored as numbers of Python. A field of type bool cannot be None. In other
    fields None means the default, unless the field's text below explains None.

    Logits are processed in this order: `logit_bias` (as in vLLM), the penalties, the tokens that
    `allowed_token_ids`, `bad_words`, `bad_words_ids` and `min_tokens` forbid, `logits_processors`,
    temperature, top_k, top_p, min_p. `generate` of transformers has the same order of the penalties
    and of all that follows. If several tokens are equally likely at the border of top_k or top_p,
    all of them are kept. If all tokens are forbidden, the request fails with a LogitsError.

    Attributes:
        temperature: 0 takes the most likely token (greedy). A value above 0 divides the logits.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to >= `top_p`.
        top_k: keep the `top_k` most likely tokens; 0 or -1 keeps all tokens.
        min_p: keep tokens whose probability is at least `min_p` times the highest probability.
        repetition_penalty: for tokens that are in the prompt or output, positive logits are divided
            by repetition_penalty, and negative logits are multiplied by repetition_penalty.
        presence_penalty: subtracted from the logit of every token that is in the output.
        frequency_penalty: subtracted from a token's logit for each time the token is in the output.
        seed: seed of the random numbers that sampling uses. Equal seeds give equal numbers at
            equal positions, in any batch. With None the engine derives a seed from `Config.seed`
            and the request's id. The n outputs of a prompt use different random numbers.
        max_tokens: maximum number of tokens to generate. With None, prompt and output together may
            reach `max_model_len`. Prompt and `max_tokens` together must not exceed `max_model_len`.
            With 0 nothing is generated, for example to get `prompt_logprobs` alone.
        min_tokens: minimum number of tokens to generate. Until the output has this length, no token
            that would end the output is sampled, and stop strings are ignored.
        stop: one or several stop strings. The output ends when its text contains a stop string. The
            text is cut before the stop string. The token ids contain all tokens of the stop string.
            A stop string may contain names of special tokens, although the text has none.
        include_stop_str_in_output: if True, cut the text after the stop string, not before it.
        stop_token_ids: ids of tokens that end the output, like end-of-sequence tokens.
        ignore_eos: do not end the output at an end-of-sequence token.
        logit_bias: for some tokens a number from -100 to 100, which is added to the token's logit.
            At most `MAX_BIASES` tokens. The bias is stored as a tuple of pairs.
        allowed_token_ids: only these tokens may be generated. None allows all tokens.
        bad_words: texts that the output must not contain as words. A text is converted to token ids
            with and without a space before it. The last id of each of the two lists is forbidden
            where the output ends with the other ids of the list. Other tokens that make the same
            text are not forbidden.
        bad_words_ids: like `bad_words`, but given as lists of token ids. At most `MAX_BAD_WORDS`
            lists of at most `MAX_BAD_WORD_TOKENS` ids.
        skip_special_tokens: if False, the names of special tokens are in the text.
        detokenize: if False, the output has no text, and `stop` must be empty.
        logprobs: for each generated token, return its log-probability and the log-probabilities of
            the `logprobs` most likely tokens, computed from the logits before bias, penalties,
            temperature and filters. At most `MAX_LOGPROBS`.
        prompt_logprobs: like `logprobs`, for the prompt's tokens except the first. The request uses
            cached blocks only before `prompt_logprobs_start`: the prefix cache keeps no logits.
        prompt_logprobs_start: position of the first prompt token whose log-probability is returned,
            if `prompt_logprobs` is given. The entries of earlier tokens are None.
        hidden_states: number of a layer, counted from 0 as in transformers. The output then has the
            input of this layer for each token of prompt and output but the last output token.
            "last", -1 and the number of layers mean the output of the final norm. With n > 1 each
            output computes the hidden states of the prompt again. Steps that return the input of a
            layer run without CUDA graphs.
        hidden_states_start: position of the first token whose hidden states are returned. Only
            tokens before this position may come from the prefix cache.
        logprobs_details: return each log-probability as a `Logprob`, a float that also has the
            token's text and rank.
        n: number of outputs, at most `MAX_OUTPUTS`. With prefix caching the outputs can share KV
            blocks of the prompt.
        logits_processors: callables `(token_ids, logits) -> logits`. In each step the engine calls
            them with the ids of all tokens of the request and the logits for its next token. Each
            output has processors of its own: if the object has a method `for_request`, the engine
            calls `for_request(prompt_token_ids, sample)` to get the processor of output `sample`.
            Otherwise the processor is a deep copy of the object. A function is not copied. No
            processor is called after its output has ended. A processor must not call the engine.
        json_schema: a JSON schema, as a dict or as JSON text. The output is JSON of this schema, or
            its beginning if `max_tokens` ends it. Needs the package llguidance. A keyword that
            llguidance does not support is a RequestError. The schema is stored as JSON text.
        priority: some scheduling policies run requests with higher values first and preempt them
            last. (In vLLM requests with lower values run first.)
        user: name of the user, for scheduling policies that are fair between users.
        cache_salt: requests share cached prefixes only if their salts are equal.
        predicted_tokens: expected length of the output in tokens, for scheduling policies. The
            actual output may be longer. With None, `max_tokens` is used instead.
        penalizes: True if a penalty can change logits. Set by the constructor.
        filters: True if top_k, top_p or min_p can exclude tokens. Set by the constructor.
        needs_logits: True if an option other than temperature and seed reads or changes the logits,
            or reads hidden states. Set by the constructor.

    Raises a RequestError that names the field if a value is out of range.
    """

    # The sampler adds temperature * Gumbel noise to the float32 logits. The noise is below 17. The
    # sum's rounding error grows with the temperature, and is about 1e-2 at the maximum of 1e4.
    temperature: float = ruled(1.0, number(0, 1e4, "Use 0 for greedy decoding."))
    top_p: float = ruled(1.0, share("Use 1 to keep all."))
    top_k: int = ruled(0, integer(-1, fix="Use 0 to keep all."))
    min_p: float = ruled(0.0, number(0, 1, "Use 0 to keep all."))
    repetition_penalty: float = ruled(1.0, number(1e-6, 1e6, "Use 1 for none."))
    presence_penalty: float = ruled(0.0, number(-2, 2, "Use 0 for none."))
    frequency_penalty: float = ruled(0.0, number(-2, 2, "Use 0 for none."))
    seed: int | None = ruled(None, _SEED)
    max_tokens: int | None = ruled(
        64, integer(0, fix="Use None to generate up to max_model_len.", optional=True)
    )
    min_tokens: int = ruled(0, integer(0, 2**31, fix="Use 0 for none."))
    stop: str | list[str] | tuple[str, ...] = ruled((), _STOP)
    stop_token_ids: list[int] | tuple[int, ...] = ruled((), _TOKEN_IDS)
    ignore_eos: bool = ruled(False, boolean())
    include_stop_str_in_output: bool = ruled(False, boolean())
    skip_special_tokens: bool = ruled(True, boolean())
    detokenize: bool = ruled(True, boolean())
    logit_bias: dict[int, float] | tuple[tuple[int, float], ...] | None = ruled(None, _BIAS)
    allowed_token_ids: list[int] | tuple[int, ...] | None = ruled(None, _ALLOWED)
    bad_words: list[str] | tuple[str, ...] | None = ruled(None, _WORDS)
    bad_words_ids: list[list[int]] | tuple[tuple[int, ...], ...] = ruled((), _WORDS_IDS)
    logprobs: int | None = ruled(None, _COUNT)
    prompt_logprobs: int | None = ruled(None, _COUNT)
    prompt_logprobs_start: int = ruled(0, integer(0, fix="Use 0 to score the whole prompt."))
    logprobs_details: bool = ruled(False, boolean())
    hidden_states: int | str | None = ruled(None, _LAYER)
    hidden_states_start: int = ruled(0, integer(0, fix="Use 0 for all tokens."))
    n: int = ruled(1, integer(1, MAX_OUTPUTS, "Use 1 for one output."))
    logits_processors: list[Any] | tuple[Any, ...] = ruled((), _PROCESSORS)
    json_schema: dict[str, Any] | str | None = ruled(None, _SCHEMA)
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
        check_rules(self, _RULES, RequestError, _DEFAULTS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            problem, fix = f"exceeds max_tokens={self.max_tokens}", "Lower it or raise max_tokens."
            raise RequestError("min_tokens", self.min_tokens, problem, fix)
        for name, of, whole in (
            ("prompt_logprobs_start", "prompt_logprobs", self.prompt_logprobs),
            ("hidden_states_start", "hidden_states", self.hidden_states),
        ):
            if getattr(self, name) and whole is None:
                problem, fix = f"has no effect without {of}", f"Give {of}, or leave it out."
                raise RequestError(name, getattr(self, name), problem, fix)
        if self.stop and not self.detokenize:
            problem, fix = "needs the text that detokenize=False leaves out", "Use stop_token_ids."
            raise RequestError("stop", self.stop, problem, fix)
        put = object.__setattr__
        put(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        put(self, "stop_token_ids", tuple(self.stop_token_ids))
        put(self, "logits_processors", tuple(self.logits_processors))
        put(self, "logit_bias", tuple(sorted(dict(self.logit_bias or ()).items())))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", tuple(sorted(set(self.allowed_token_ids))))
        put(self, "bad_words", tuple(self.bad_words or ()))
        put(self, "bad_words_ids", tuple(tuple(word) for word in self.bad_words_ids))
        if self.json_schema is not None:
            put(self, "json_schema", _json_schema(self.json_schema))
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        put(self, "penalizes", penalties != (1, 0, 0))
        filters = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        put(self, "filters", self.temperature > 0 and filters)
        asked = self.filters, self.penalizes, self.min_tokens, self.logits_processors
        more = self.logit_bias, self.bad_words, self.bad_words_ids
        given: tuple[Any, ...] = self.json_schema, self.allowed_token_ids, self.hidden_states
        given += self.logprobs, self.prompt_logprobs
        needs = any((*asked, *more)) or any(value is not None for value in given)
        put(self, "needs_logits", needs)

    @staticmethod
    def from_generation_config(folder: str | Path, **overrides: Any) -> SamplingParams:
        """Return parameters with the values of generation_config.json in `folder`, if there is one.

        `overrides` replace values of the file. A CheckpointError is raised if the file is unusable,
        a RequestError if `overrides` are.
        """
        # Imported here, because `utils.checkpoint` imports transformers, which is slow to import.
        from utils.checkpoint import generation_config

        found = generation_config(Path(folder))
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        ours = {name: found.get(name) for name in names}
        ours |= {f"{m}_tokens": found.get(f"{m}_new_tokens") for m in ("max", "min")}
        if found.get("do_sample") is False:
            ours["temperature"] = 0.0
        ours = {name: value for name, value in ours.items() if value is not None}
        try:
            return SamplingParams(**{**ours, **overrides})
        except RequestError as error:
            if error.field in overrides or error.field not in ours:
                raise
            raise CheckpointError(f"{folder}: generation_config.json: {error}") from error

    def of_output(self, index: int) -> SamplingParams:
        """Return the parameters of the request that computes output `index`. Their n is 1."""
        # Log-probabilities of the prompt are equal for all outputs, so only output 0 computes them.
        if not index or self.prompt_logprobs is None:
            return replace(self, n=1)
        return replace(self, n=1, prompt_logprobs=None, prompt_logprobs_start=0)


_RULES = rules_of(SamplingParams)
# The fields that None sets to their default: those for which None has no meaning of its own. For
# True and False, None is a mistake, since it looks like False where the default is True.
_DEFAULTS = {
    one.name: one.default
    for one in fields(SamplingParams)
    if not (one.name not in _RULES or _RULES[one.name].allows(None) or one.type == "bool")
}
