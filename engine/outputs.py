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
from engine.step import StepPlan, TokenLogprobs
from utils.output_types import Logprob, Output
from utils.prompts import TokenizedPrompt
from utils.text import Decoder


@dataclass(slots=True, eq=False)
class PromptRequests:
    """A prompt's requests. `PromptQueue` appends this object to `ended` when all have ended."""

    index: int  # index of the prompt among the caller's prompts
    seqs: list[Sequence]  # one request for each output
    ended: deque[PromptRequests]  # prompts whose requests have all ended
    decode: Decoder  # converts the tokens of the outputs to text
    prompt: TokenizedPrompt
    _num_ended: int = 0  # how many of the first `seqs` are known to have ended

    def all_ended(self) -> bool:
        """Whether all requests have ended. All calls together look at each request about once."""
        seqs = self.seqs
        while self._num_ended < len(seqs) and seqs[self._num_ended].finish_reason is not None:
            self._num_ended += 1
        return self._num_ended == len(seqs)

    def output(self) -> Output:
        """Return what `LLM.generate` returns for the prompt."""
        return make_output(self.seqs, self.decode, self.prompt.text)


def make_output(seqs: list[Sequence], decode: Decoder, prompt: str | None = None) -> Output:
    """Return what `LLM.generate` returns for a prompt, made from the prompt's ended requests."""
    outputs, first = [_completion(seq, decode) for seq in seqs], seqs[0]
    entries = dict(outputs[0])
    del entries["index"]
    tokens = first.token_ids[: first.num_prompt_tokens]
    return Output(
        request_id=first.request_id,
        prompt=prompt,
        prompt_token_ids=tokens,
        prompt_logprobs=_prompt_logprobs(first, decode, tokens),
        finished=all(seq.finish_reason is not None for seq in seqs),
        outputs=outputs,
        **entries,
    )


def _completion(seq: Sequence, decode: Decoder) -> Output:
    tokens, text = seq.output_token_ids, seq.text
    prompt = seq.token_ids[: seq.num_prompt_tokens]
    times, added = seq.token_times, seq.added_at
    gaps = sorted(b - a for a, b in pairwise(times))
    scores = _logprobs(seq, 0, len(tokens), decode, prompt)
    metrics = {
        "queue_time": None if seq.admitted_at is None else seq.admitted_at - added,
        "time_to_first_token": times[0] - added if times else None,
        "mean_inter_token_time": sum(gaps) / len(gaps) if gaps else None,
        "p99_inter_token_time": percentile(gaps, 0.99) if gaps else None,
        "longest_inter_token_time": gaps[-1] if gaps else None,
        "cached_prompt_tokens": seq.num_cached,
        "preemptions": seq.num_preemptions,
    }
    return Output(
        index=seq.sample,
        text=text.text if text is not None and text.stopped else decode.added(prompt, tokens),
        token_ids=tokens,
        cumulative_logprob=None if scores is None else added_logprobs(0.0, scores),
        logprobs=scores,
        hidden_states=_hidden_states(seq),
        finish_reason=seq.finish_reason,
        stop_reason=stop_reason(seq),
        error=seq.error,
        metrics=Output(metrics),
    )


def stop_reason(seq: Sequence) -> str | int | None:
    """Return the stop string, or the id in `stop_token_ids`, that ended the request, if one did."""
    if seq.finish_reason != "stop":
        return None
    if seq.text is not None and seq.text.stopped:
        return seq.text.stop_string
    last = seq.token_ids[-1]
    return last if last in seq.sampling.stop_token_ids else None


def added_logprobs(total: float, scores: list[TokenLogprobs]) -> float:
    """Return `total` plus the log-probability of each token, added one after the other.

    In this order a stream adds up to the same bits. The first entry of `scores` is the token's own.
    """
    for entry in scores:
        total += next(iter(entry.values()))
    return total


def _logprobs(
    seq: Sequence, start: int, stop: int, decode: Decoder, prompt: list[int]
) -> list[Any] | None:
    """Return the log-probabilities of some output tokens, if the request asked for them."""
    asked = seq.sampling.logprobs is not None
    return _scored(seq, seq.logprobs[start:stop], decode, prompt) if asked else None


def _scored(seq: Sequence, scores: list[Any], decode: Decoder, prompt: list[int]) -> list[Any]:
    """Return the entries of `scores` with the details that the request asked for.

    An entry is a dictionary from token ids to log-probabilities, or None for the first token of a
    prompt. The text of a token is the text that the token would add to that of the prompt.
    """
    if not seq.sampling.logprobs_details:
        return scores
    texts = dict[int, str | None]()

    def text(token: int) -> str | None:
        if token not in texts:
            name = decode.specials.get(token) or decode.added(prompt, [token])
            texts[token] = name if decode.has_text else None
        return texts[token]

    def detailed(token: int, value: float) -> Logprob:
        return Logprob(value, getattr(value, "rank", None), text(token))

    return [entry and {t: detailed(t, value) for t, value in entry.items()} for entry in scores]


def _prompt_logprobs(seq: Sequence, decode: Decoder, prompt: list[int]) -> list[Any] | None:
    """Return the log-probabilities of the prompt's tokens, if the request asked for them."""
    asked = seq.sampling.prompt_logprobs is not None
    return _scored(seq, seq.prompt_logprobs, decode, prompt) if asked else None


def _hidden_states(seq: Sequence) -> Any | None:
    """The hidden states of all tokens but the last output token, if the request asked for them."""
    if seq.sampling.hidden_states is None:
        return None
    import torch  # whoever needs no tensors need not import it

    # Tokens after a stop string have been dropped.
    end = max(len(seq.token_ids) - 1, seq.num_prompt_tokens)
    return torch.cat(seq.hidden_states)[: max(0, end - seq.sampling.hidden_states_start)]


def percentile(rising: list[float], share: float) -> float:
    """The percentile 100 * `share` of the sorted values `rising`, by the nearest-rank method."""
    return rising[math.ceil(share * len(rising)) - 1]


class OutputStream:
    """Gives the output of a request in parts, each with the tokens and the text that are new.

    Text that may become part of a stop string is held back. Without a tokenizer there is no text.

    Args:
        seq: the request.
        prompt: all requests of the request's prompt.
        news: the caller's streams with something new, by request id. `PromptQueue` adds this stream
            to `news` when the request has new tokens or has ended.
    """

    def __init__(
        self, seq: Sequence, prompt: PromptRequests, news: dict[int, OutputStream]
    ) -> None:
        self._seq, self._prompt, self.news = seq, prompt, news
        self._num_tokens = self._num_chars = 0  # how much the parts so far have
        self._num_seen = 0  # number of output tokens at the last call of `take`
        self.ended = False  # whether `take` has returned the last part
        self._logprob = 0.0  # sum of the log-probabilities so far

    @property
    def prompt_id(self) -> int:
        """Id of the prompt's first request, which `LLM.add_request` has returned."""
        return self._prompt.seqs[0].request_id

    def ready(self) -> bool:
        """Whether there are tokens that `take` has not seen, or the request has ended."""
        seq = self._seq
        if self.ended or seq.finish_reason is not None:
            return not self.ended
        return len(seq.token_ids) - seq.num_prompt_tokens > self._num_seen

    def take(self) -> Output | None:
        """Return the next part; None if there is no new text (without a tokenizer: no new token).

        The last part has a finish_reason, and `error`, `prompt_logprobs` and `hidden_states`.
        """
        seq, text, reason = self._seq, self._seq.text, self._seq.finish_reason
        assert text is not None
        self._num_seen = len(seq.token_ids) - seq.num_prompt_tokens
        chars, first = text.settled if reason is None else text.num_chars, self._num_tokens
        has_text = self._prompt.decode.has_text
        if reason is None and not (chars > self._num_chars if has_text else self._num_seen > first):
            return None
        tokens = seq.token_ids[seq.num_prompt_tokens + first :]
        self._num_tokens = first + len(tokens)
        given = self._prompt.prompt.token_ids
        scores = _logprobs(seq, first, self._num_tokens, self._prompt.decode, given)
        self._logprob = added_logprobs(self._logprob, scores or [])
        told = Output(
            index=self._prompt.index,
            sample=seq.sample,
            text=text.since(self._num_chars)[: chars - self._num_chars],
            token_ids=tokens,
            cumulative_logprob=None if scores is None else self._logprob,
            logprobs=scores,
            finish_reason=reason,
            stop_reason=stop_reason(seq),
        )
        self._num_chars, self.ended = chars, reason is not None
        if not self.ended:
            return told
        found = _prompt_logprobs(seq, self._prompt.decode, given)
        return Output(
            told, error=seq.error, prompt_logprobs=found, hidden_states=_hidden_states(seq)
        )


def new_parts(news: dict[int, OutputStream]) -> Iterator[tuple[OutputStream, Output]]:
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
