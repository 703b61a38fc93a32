"""One request's state, as scheduler and engine see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from engine.step import SeedKind, TokenLogprobs
from sampling_params import SamplingParams

if TYPE_CHECKING:
    from utils.text import TextReader


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """A request from arrival to finish. All times are seconds on the runner's clock."""

    request_id: int  # unique in its engine, rising with arrival
    token_ids: list[int]  # prompt and committed output; the prompt that is passed in is copied
    sampling: SamplingParams  # as given by the user
    _: KW_ONLY
    max_total_tokens: int  # length (prompt and output) at which it stops
    stop_token_ids: frozenset[int] = frozenset()  # tokens that end it
    seed: int = 0  # key of the sampling noise
    seed_kind: SeedKind = SeedKind.DERIVED
    sample: int = 0  # index of this output among those of its prompt
    num_prompt_tokens: int = field(init=False)
    finish_reason: str | None = None  # None while unfinished, or "stop", "length", "abort", "error"
    error: Exception | None = None  # what the runner reported, if that ended the request
    # What the runner reported for each token of the output, if it was asked for.
    values: list[Mapping[str, Any]] = field(default_factory=list)
    # Of each token of the output, and of the prompt so far, if asked for; None for its first token.
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    text: TextReader | None = None  # reads the output of requests that stream or have stop strings
    added_at: float = 0.0
    admitted_at: float | None = None  # for the first time
    token_times: list[float] = field(default_factory=list)  # when the host could read each token
    num_cached: int = 0  # prompt tokens found in the cache when it was first admitted
    num_preemptions: int = 0  # times that it was or will be computed again

    # The rest belongs to the scheduler. First the row in the runner's tables, while running.
    slot: int | None = field(init=False)
    # Most leading positions that are computed once all that is in flight has ended, before the
    # length limit is applied; how many of them the runner may not keep.
    num_scheduled: int = field(init=False)
    num_drafted: int = field(init=False)
    num_prefill: int = field(init=False)  # computed as prefill: the tokens known at admission
    num_in_flight: int = field(init=False)  # plans in flight that have a row of it
    num_committed: int = field(init=False)  # leading positions whose KV is known to be written
    capacity: int = field(init=False)  # tokens that its block table holds

    def __post_init__(self) -> None:
        self.token_ids = list(self.token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.reset()

    def reset(self) -> None:
        """Forget all that was computed, as on arrival or preemption."""
        self.slot = None
        self.num_scheduled = self.num_committed = self.num_drafted = self.num_in_flight = 0
        self.num_prefill = self.capacity = 0

    @property
    def cache_salt(self) -> str:
        """Requests share cached prefixes if this is equal."""
        salt = self.sampling.cache_salt
        if self.sampling.prompt_logprobs is None:
            return salt
        # Prompt log-probabilities need computed logits, so the cached blocks of other requests are
        # of no use; the request's own are, after a preemption.
        return f"{salt}\0{self.request_id}"

    @property
    def output_token_ids(self) -> list[int]:
        """The committed output."""
        return self.token_ids[self.num_prompt_tokens :]

    def keep_output(self, num_tokens: int) -> None:
        """Drop what was committed beyond so many tokens of the output."""
        del self.token_ids[self.num_prompt_tokens + num_tokens :]
        del self.token_times[num_tokens:]
        del self.logprobs[num_tokens:]
        del self.values[num_tokens:]

    @property
    def num_expected_tokens(self) -> int:
        """Length, prompt and output, that it is guessed to reach; above its present one."""
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
