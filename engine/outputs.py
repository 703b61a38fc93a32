"""The outputs that users get, whole or in parts, and the progress bar of `generate`."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tqdm import tqdm

from engine.requests import Sequence
from engine.step import StepPlan
from utils.text import Decoder


@dataclass(slots=True, eq=False)
class PromptRequests:
    """A prompt's requests. `LLM` appends this object to `ended` when all have ended."""

    index: int  # index of the prompt among the caller's prompts
    seqs: list[Sequence]  # one request for each output
    ended: deque[PromptRequests]  # prompts whose requests have all ended
    _num_ended: int = 0  # how many of the first `seqs` are known to have ended

    def all_ended(self) -> bool:
        """Whether all requests have ended. All calls together look at each request about once."""
        seqs = self.seqs
        while self._num_ended < len(seqs) and seqs[self._num_ended].finish_reason is not None:
            self._num_ended += 1
        return self._num_ended == len(seqs)


def make_output(seqs: list[Sequence], decode: Decoder) -> dict[str, Any]:
    """The dictionary that `LLM.generate` returns for a prompt, made from the prompt's requests."""
    outputs, first = [_one_output(seq, decode) for seq in seqs], seqs[0]
    asked = first.sampling.prompt_logprobs is not None
    out = {
        **outputs[0],
        "prompt_token_ids": first.token_ids[: first.num_prompt_tokens],
        "prompt_logprobs": first.prompt_logprobs if asked else None,
    }
    return out if len(outputs) == 1 else {**out, "outputs": outputs}


def _one_output(seq: Sequence, decode: Decoder) -> dict[str, Any]:
    tokens, text = seq.output_token_ids, seq.text
    prompt = seq.token_ids[: seq.num_prompt_tokens]
    times, added = seq.token_times, seq.added_at
    gaps = sorted(b - a for a, b in pairwise(times))
    return {
        "text": text.text if text is not None and text.stopped else decode.added(prompt, tokens),
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

    Args:
        seq: the request.
        prompt: all requests of the request's prompt.
        news: the caller's streams with something new, by request id. `LLM` adds this stream to
            `news` when the request has new tokens or has ended.
        has_text: whether there is a tokenizer.
    """

    def __init__(
        self,
        seq: Sequence,
        prompt: PromptRequests,
        news: dict[int, OutputStream],
        *,
        has_text: bool,
    ) -> None:
        self._seq, self._prompt, self._has_text = seq, prompt, has_text
        self.news = news
        self._num_tokens = self._num_chars = 0  # how much the parts so far have
        self._num_seen = 0  # number of output tokens at the last call of `take`
        self.ended = False  # whether `take` has returned the last part

    @property
    def prompt_id(self) -> int:
        """Id of the prompt's first request, which `LLM.add_request` has returned."""
        return self._prompt.seqs[0].request_id

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
        chars = text.settled if reason is None else text.num_chars
        is_new = chars > self._num_chars if self._has_text else self._num_seen > self._num_tokens
        if reason is None and not is_new:
            return None
        tokens = seq.token_ids[seq.num_prompt_tokens + self._num_tokens :]
        told = {
            "index": self._prompt.index,
            "sample": seq.sample,
            "text": text.since(self._num_chars)[: chars - self._num_chars],
            "token_ids": tokens,
            "finish_reason": reason,
        }
        self._num_tokens, self._num_chars = self._num_tokens + len(tokens), chars
        self.ended = reason is not None
        return {**told, "error": seq.error} if self.ended else told


def new_parts(news: dict[int, OutputStream]) -> Iterator[tuple[OutputStream, dict[str, Any]]]:
    """Take the next part of each stream in `news`, and remove the stream from `news`.

    While `news` has an element, no other thread may step (`Turns.until`). So a stream is removed
    after its part was taken.
    """
    for request_id in sorted(news):
        stream = news[request_id]
        if stream.ready() and (part := stream.take()):
            yield stream, part
        news.pop(request_id, None)
        # `LLM.close` in another thread may have ended the request meanwhile.
        if stream.ready():
            news[request_id] = stream


class _Forgiving:
    """A text stream that ignores what the stream below it does not take."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with suppress(Exception):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(Exception):
            self._stream.flush()


class Progress:
    """Progress bar of `generate`. Steps with prompt tokens count as prefill, others as decode.

    A bar that cannot be written is not shown: sys.stderr may be any object, or be closed.
    """

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar: Any | None = None
        # All bars of the process share a lock. If a write raises an error, tqdm keeps the lock. A
        # bar that is off is not made, because tqdm would take the lock even then.
        stream = getattr(sys, "stderr", None)
        if enabled and stream is not None:
            with suppress(Exception):
                options = {"desc": "Generating", "unit": "req", "dynamic_ncols": True}
                self._bar = tqdm(total=total, file=_Forgiving(stream), **options)
        self._done: dict[str, tuple[int, float]] = {"prefill": (0, 0.0), "decode": (0, 0.0)}
        self._last = time.perf_counter()

    def update(self, plan: StepPlan | None, num_tokens: int, num_finished: int) -> None:
        """Update the bar: a step sampled `num_tokens` tokens, and `num_finished` prompts ended."""
        if self._bar is None:
            return
        now = time.perf_counter()
        if plan is not None:
            kind = "prefill" if plan.prefill else "decode"
            tokens, seconds = self._done[kind]
            tokens += plan.num_prefill_tokens or num_tokens
            self._done[kind] = tokens, seconds + now - self._last
            rates = {k: f"{n / s:.0f} tok/s" if s else "-" for k, (n, s) in self._done.items()}
            self._bar.set_postfix(rates, refresh=False)
        self._last = now
        self._bar.update(num_finished)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
