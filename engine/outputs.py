"""What the user gets of a request."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from engine.sequence import Sequence
from utils.percentile import percentile
from utils.text import Decode


def make_output(seqs: list[Sequence], decode: Decode) -> dict[str, Any]:
    """The dictionary of a prompt's outputs; see `LLM.generate`."""
    outputs = [_one_output(seq, decode) for seq in seqs]
    first = seqs[0]
    asked = first.sampling.prompt_logprobs is not None
    out = {
        **outputs[0],
        "prompt_token_ids": first.token_ids[: first.num_prompt_tokens],
        "prompt_logprobs": first.prompt_logprobs if asked else None,
    }
    return out if len(outputs) == 1 else {**out, "outputs": outputs}


def _one_output(seq: Sequence, decode: Decode) -> dict[str, Any]:
    tokens = seq.output_token_ids
    stopped = seq.text is not None and seq.text.stopped
    return {
        "text": seq.text.text if seq.text is not None and stopped else decode(tokens),
        "token_ids": tokens,
        "finish_reason": seq.finish_reason,
        "error": seq.error,
        "logprobs": seq.logprobs if seq.sampling.logprobs is not None else None,
        "metrics": _metrics(seq),
    }


def _metrics(seq: Sequence) -> dict[str, float | None]:
    times, added = seq.token_times, seq.added_at
    gaps = sorted(b - a for a, b in pairwise(times))
    return {
        "queue_time": None if seq.admitted_at is None else seq.admitted_at - added,
        "time_to_first_token": times[0] - added if times else None,
        "mean_inter_token_time": sum(gaps) / len(gaps) if gaps else None,
        "p99_inter_token_time": percentile(gaps, 0.99) if gaps else None,
        "longest_inter_token_time": gaps[-1] if gaps else None,
        "cached_prompt_tokens": seq.num_cached,
        "preemptions": seq.num_preemptions,
    }


class Increments:
    """The parts of a request's output that have not been told yet.

    Args:
        index: of its prompt.
        sample: of the output among the prompt's `n`.
        has_text: False without a tokenizer, when tokens are told as they come.
    """

    def __init__(self, seq: Sequence, index: int, sample: int, *, has_text: bool) -> None:
        self._seq = seq
        self._has_text = has_text
        self._where = {"index": index, "sample": sample}
        self._num_tokens = self._num_chars = 0
        self.ended = False

    def next(self) -> dict[str, Any] | None:
        """What is new, or None if nothing can be shown yet."""
        seq, text = self._seq, self._seq.text
        assert text is not None
        self.ended = seq.finish_reason is not None
        chars = len(text.text) if self.ended else text.settled
        tokens = seq.output_token_ids[self._num_tokens :]
        news = chars > self._num_chars if self._has_text else bool(tokens)
        if not news and not self.ended:
            return None
        new = text.text[self._num_chars : chars]
        self._num_tokens += len(tokens)
        self._num_chars = chars
        told = {
            **self._where,
            "text": new,
            "token_ids": tokens,
            "finish_reason": seq.finish_reason,
        }
        return {**told, "error": seq.error} if self.ended else told
