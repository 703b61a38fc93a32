"""The state of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from engine.step import SeedKind, TokenLogprobs
from sampling_params import SamplingParams

if TYPE_CHECKING:
    from utils.text_reader import TextReader


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
    seed_kind: SeedKind = SeedKind.DERIVED  # where the seed comes from
    sample: int = 0  # index of this output among the outputs of its prompt
    num_prompt_tokens: int = field(init=False)  # number of prompt tokens in `token_ids`
    finish_reason: str | None = None  # None while unfinished, or "stop", "length", "abort", "error"
    error: Exception | None = None  # the `RowReport.error` that ended the request, if any
    # For each output token, its mapping in `RowReport.values`; empty if the runner returns none.
    values: list[Mapping[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # log-probs of output, if requested
    # Log-probabilities of the prompt tokens computed so far, if requested. Before the position
    # `prompt_logprobs_start` and for the first token, which no position predicts, they are None.
    prompt_logprobs: list[TokenLogprobs | None] = field(init=False)
    # Tensors [n, hidden_size], from position `hidden_states_start` on, if requested.
    hidden_states: list[Any] = field(default_factory=list)
    num_hidden: int = 0  # number of positions in `hidden_states`
    text: TextReader | None = None  # converts output to text, for streaming or stop strings
    added_at: float = 0.0  # time of arrival
    admitted_at: float | None = None  # time of the first admission
    token_times: list[float] = field(default_factory=list)  # `StepResult.ended_at` for each token
    num_cached: int = 0  # prompt tokens found in the cache at the first admission
    num_preemptions: int = 0  # how often the request was preempted

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
        unscored = min(max(1, self.sampling.prompt_logprobs_start), self.num_prompt_tokens)
        self.prompt_logprobs = [None] * unscored
        self.reset()

    def reset(self) -> None:
        """Initialise the fields that only the scheduler sets. Called at arrival and preemption."""
        self.slot = None
        self.num_scheduled = self.num_committed = self.num_drafted = self.num_in_flight = 0
        self.num_prefill = self.capacity = 0

    @property
    def cache_salt(self) -> str:
        """A string for the prefix cache: only requests with equal salts share cached prefixes."""
        return self.sampling.cache_salt

    @property
    def most_cached(self) -> int | None:
        """How many leading tokens may be taken from the prefix cache now; None for no limit."""
        asked, limits = self.sampling, []
        if asked.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens:
            # The cache keeps no logits: the token before the first missing one must be computed.
            limits.append(len(self.prompt_logprobs) - 1)
        if asked.hidden_states is not None:
            limits.append(asked.hidden_states_start + self.num_hidden)
        return min(limits, default=None)

    def add_hidden_states(self, end: int, found: Any) -> None:
        """Add hidden states [n, hidden_size] of positions before `end` that had none so far."""
        known = self.sampling.hidden_states_start + self.num_hidden
        new = found[max(0, known - (end - len(found))) :]
        self.hidden_states.append(new)
        self.num_hidden += len(new)

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the output tokens so far."""
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
