"""One request's state, as scheduler and engine see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.types import SeedKind
from sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.types import TokenLogprobs
    from utils.text import TextReader


class Sequence:
    """A request from arrival to finish.

    Attributes:
        request_id: unique in its engine, rising with arrival.
        token_ids: prompt and committed output.
        num_prompt_tokens: how many of them are the prompt.
        sampling: as given by the user.
        seed: key of the sampling noise.
        seed_kind: where the seed comes from.
        sample: index of this output among those of its prompt.
        max_total_tokens: length (prompt and output) at which it stops.
        stop_token_ids: tokens that end it.
        finish_reason: None while unfinished, else "stop", "length", "abort" or "error".
        error: what the runner reported, if that ended it.
        values: what the runner reported for each token of the output, if it was asked for.
        logprobs: of the committed output, if asked for.
        prompt_logprobs: of the prompt so far, if asked for; None for its first token.
        text: reads the output as text, for requests that stream or have stop strings.
        added_at, admitted_at: seconds on the runner's clock; the latter None before.
        token_times: when the host could read each token of the output, on the same clock.
        num_cached: prompt tokens found in the cache when it was first admitted.

    The rest belongs to the scheduler:
        slot: row in the runner's tables while running, else None.
        num_scheduled: most leading positions that are computed once all that is in flight has
            ended; before its length limit is applied.
        num_drafted: how many of them the runner may not keep.
        num_prefill: positions computed as prefill: the tokens known when it was admitted.
        num_in_flight: plans in flight that have a row of it.
        num_committed: leading positions whose KV is known to be written.
        capacity: tokens that its block table holds.
        num_preemptions: times it was thrown out and will be or was recomputed.
    """

    __slots__ = (
        "added_at",
        "admitted_at",
        "capacity",
        "error",
        "finish_reason",
        "logprobs",
        "max_total_tokens",
        "num_cached",
        "num_committed",
        "num_drafted",
        "num_in_flight",
        "num_preemptions",
        "num_prefill",
        "num_prompt_tokens",
        "num_scheduled",
        "prompt_logprobs",
        "request_id",
        "sample",
        "sampling",
        "seed",
        "seed_kind",
        "slot",
        "stop_token_ids",
        "text",
        "token_ids",
        "token_times",
        "values",
    )

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        max_total_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
        seed: int = 0,
        seed_kind: SeedKind = SeedKind.DERIVED,
        sample: int = 0,
    ) -> None:
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling = sampling
        self.seed = seed
        self.seed_kind = seed_kind
        self.sample = sample
        self.max_total_tokens = max_total_tokens
        self.stop_token_ids = stop_token_ids
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.values: list[Mapping[str, Any]] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.text: TextReader | None = None
        self.added_at = 0.0
        self.admitted_at: float | None = None
        self.token_times: list[float] = []
        self.num_cached = 0
        self.num_preemptions = 0
        self.reset()

    def reset(self) -> None:
        """Forget all that was computed, as on arrival or preemption."""
        self.slot: int | None = None
        self.num_scheduled = 0
        self.num_prefill = 0
        self.num_drafted = 0
        self.num_in_flight = 0
        self.num_committed = 0
        self.capacity = 0

    @property
    def cache_salt(self) -> str:
        """Requests share cached prefixes if this is equal."""
        salt = self.sampling.cache_salt
        if self.sampling.prompt_logprobs is None:
            return salt
        # Logits come of computing, so nothing of another request is of use; its own after a
        # preemption is.
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
