"""The prompts of `LLM`: queues their requests, runs steps, and finds the prompts that have ended.

Each prompt has `n` outputs, and each output is one request of the engine. A `PromptRequests` holds
the requests of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.llm_engine import LLMEngine
from engine.outputs import OutputStream, PromptRequests
from engine.types import StepPlan
from sampling_params import SamplingParams
from utils.prompts import TokenizedPrompt
from utils.text import Decoder
from utils.text_reader import TextReader


class PromptInput(NamedTuple):
    """A prompt, the parameters of its outputs, and what converts their tokens to text."""

    prompt: TokenizedPrompt
    params: SamplingParams
    decode: Decoder


class PromptQueue:
    """The prompts whose requests are queued or running.

    Attributes:
        unfinished: request id -> `PromptRequests`, for all unfinished requests except those of
            `LLM.stream`.
        streams: prompt's request id -> its outputs, for `LLM.add_request(..., stream=True)`.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self.unfinished: dict[int, PromptRequests] = {}
        self.streams: dict[int, list[OutputStream]] = {}

    def add(
        self,
        groups: list[PromptRequests],
        inputs: Sequence[PromptInput],
        ended: list[PromptRequests] | None = None,
        *,
        later: bool = False,
    ) -> None:
        """Queue `n` requests for each prompt. If one request is wrong, no request is queued.

        Appends the `PromptRequests` of each prompt to `groups`. So the caller can end them, even if
        Ctrl-C interrupts this method. When all requests of a prompt have ended, its
        `PromptRequests` is appended to `ended`. If `ended` is None, the outputs are streamed; with
        `later`, `LLM.step` returns their parts.
        """
        told = [] if ended is None else ended
        try:
            with self._engine.turns.turn(), self._engine.all_or_none():
                for one in inputs:
                    group = PromptRequests(len(groups), [], told, one.decode, one.prompt.text)
                    groups.append(group)
                    self._queue(group, one, streamed=ended is None)
                for group in groups if ended is not None or later else ():
                    self.unfinished |= dict.fromkeys((s.request_id for s in group.seqs), group)
                    if ended is None:
                        self.streams[group.seqs[0].request_id] = outputs_of([group])
        except BaseException:
            self.drop(groups)
            raise

    def _queue(self, group: PromptRequests, one: PromptInput, *, streamed: bool) -> None:
        tokens, params = one.prompt.token_ids, one.params
        stop = tuple(params.stop)
        for i in range(params.n):
            text = None
            # `engine.add_request` rejects stop strings if there is no tokenizer.
            if (streamed or stop) and not (stop and not one.decode.has_text):
                included = params.include_stop_str_in_output
                text = TextReader(
                    one.decode, stop, params.min_tokens, tokens, includes_stop=included
                )
            own = params.of_output(i) if params.n > 1 else params
            group.seqs.append(self._engine.add_request(tokens, own, text, sample=i))

    def drop(self, groups: list[PromptRequests]) -> None:
        """End the requests of these prompts. Nobody gets their outputs."""
        seqs = [seq for group in groups for seq in group.seqs]
        for request_id in [seq.request_id for seq in seqs]:
            self.unfinished.pop(request_id, None)
            self.streams.pop(request_id, None)
        self._engine.drop(seqs)

    def advance(self) -> StepPlan | None:
        """Run a step of the engine. Return the plan of the step that was committed."""
        ids = None
        try:
            plan, finished = self._engine.step()
            # If no step was in flight, `plan` is None. Then `LLMEngine.reset` may have ended
            # requests that are not in `finished`, so `collect_ended(None)` checks all prompts.
            ids = [seq.request_id for seq in finished] if plan else None
        finally:
            self.collect_ended(ids)
        return plan

    def collect_ended(self, request_ids: list[int] | None = None) -> None:
        """Move prompts whose requests have all ended to `PromptRequests.ended`.

        `request_ids` are requests that have ended; None if it is unknown which ones.
        """
        for request_id in list(self.unfinished) if request_ids is None else request_ids:
            group = self.unfinished.get(request_id)
            if group and all(seq.finish_reason is not None for seq in group.seqs):
                for seq in group.seqs:
                    self.unfinished.pop(seq.request_id, None)
                group.ended.append(group)


def outputs_of(groups: list[PromptRequests]) -> list[OutputStream]:
    """Return a stream for each output of these prompts."""
    seqs = [(seq, group) for group in groups for seq in group.seqs]
    return [OutputStream(seq, own.index, has_text=own.decode.has_text) for seq, own in seqs]
