"""How the tokens of one request are chosen and when it ends."""

from __future__ import annotations

from dataclasses import dataclass

from utils.errors import RequestError

# Scores are logits + temperature * noise in float32, and noise reaches 16: beyond this the
# rounding of the product (1e-2) begins to blur the logits.
MAX_TEMPERATURE = 1e4


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; immutable and validated on construction.

    Attributes:
        temperature: 0 takes the most likely token (greedy); above 0, up to 10,000, it divides
            the logits.
        max_tokens: most tokens to generate. None generates up to the engine's
            `max_model_len`; it is the only value that is fitted to the context window.
        ignore_eos: go on after an end-of-sequence token.
        seed: key of the request's noise, 0 <= seed < 2**63. Equal seeds give equal noise at
            equal positions, whatever the request is batched with. None takes one from the
            engine's own `seed` and the order of arrival.
        priority: higher runs first and is preempted last, under policies that ask for it.
        user: whose request it is, for policies that share the engine between users.
        cache_salt: requests share cached prefixes only with those of an equal salt.
        predicted_tokens: a guess of the output's length, for policies that order or admit by
            it; it never ends the request. None stands for `max_tokens`.

    Raises:
        RequestError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False
    seed: int | None = None
    priority: int = 0
    user: str = ""
    cache_salt: str = ""
    predicted_tokens: int | None = None

    def __post_init__(self) -> None:
        t = self.temperature
        number = isinstance(t, (int, float)) and not isinstance(t, bool)
        if not number or not 0 <= t <= MAX_TEMPERATURE:
            raise RequestError(
                "temperature",
                t,
                f"must be a number from 0 to {MAX_TEMPERATURE:.0f}",
                "Use 0 for greedy decoding.",
            )
        if self.max_tokens is not None and (not _is_int(self.max_tokens) or self.max_tokens < 1):
            raise RequestError(
                "max_tokens",
                self.max_tokens,
                "must be an integer >= 1 or None",
                "Use None to generate up to max_model_len.",
            )
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(
                "ignore_eos", self.ignore_eos, "must be a bool", "Use True or False."
            )
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**63):
            raise RequestError(
                "seed", self.seed, "must be an integer in [0, 2**63) or None", "Use e.g. seed=0."
            )
        self._check_scheduling()

    def _check_scheduling(self) -> None:
        if not _is_int(self.priority):
            raise RequestError(
                "priority", self.priority, "must be an integer", "Use 0, or more to run earlier."
            )
        for name in ("user", "cache_salt"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise RequestError(name, value, "must be a str", 'Use "" for none.')
        guess = self.predicted_tokens
        if guess is not None and (not _is_int(guess) or guess < 1):
            raise RequestError(
                "predicted_tokens",
                guess,
                "must be an integer >= 1 or None",
                "Use None if there is no guess.",
            )
