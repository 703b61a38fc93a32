"""Queues the prompts of `LLM`, runs steps, and tells callers about new and ended outputs.

Each prompt has `n` outputs, and each output is one request of the engine. A `PromptRequests` holds
the requests of one prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from engine.llm_engine import LLMEngine
from engine.outputs import OutputStream, PromptRequests
from engine.types import StepPlan
from sampling_params import SamplingParams
from utils.prompts import TokenizedPrompt
from utils.stop_strings import StopStrings
from utils.text import Decoder
from utils.text_reader import TextReader


class PromptInput(NamedTuple):
    """A prompt, the parameters of its outputs, and the decoder of their tokens."""

    prompt: TokenizedPrompt
    params: SamplingParams
    decode: Decoder
    stops: StopStrings | None  # the stop strings of `params`


class PromptQueue:
    """The prompts whose requests are queued or running. All threads share them.

    After a step, `tell` looks only at the requests that got tokens or ended. So the cost of a step
    does not grow with the number of waiting requests.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._prompts: dict[int, PromptRequests] = {}  # by the id of each of the prompt's requests
        self._streams: dict[int, OutputStream] = {}  # by request id
        # `LLMEngine.num_resets` at the last step; None during a step.
        self._resets: int | None = None

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def add(
        self,
        groups: list[PromptRequests],
        inputs: Iterable[PromptInput],
        ended: deque[PromptRequests] | None = None,
        news: dict[int, OutputStream] | None = None,
    ) -> None:
        """Queue `n` requests for each prompt. If one request is wrong, no request is queued.

        Appends the `PromptRequests` of each prompt to `groups`. So the caller can end them, even if
        Ctrl-C interrupts this method. If `ended` is given, `tell` later appends to `ended` the
        `PromptRequests` whose requests have all ended. If `news` is given, the outputs are
        streamed: `tell` adds streams with something new to `news`.
        """
        told = deque[PromptRequests]() if ended is None else ended
        try:
            with self._engine.turns.turn(), self._engine.all_or_none():
                for one in inputs:
                    group = PromptRequests(len(groups), [], told, one.decode, one.prompt)
                    groups.append(group)
                    self._queue(group, one, streamed=news is not None)
                for group in groups:
                    for seq in group.seqs:
                        if news is not None:
                            self._streams[seq.request_id] = OutputStream(seq, group, news)
                        self._prompts[seq.request_id] = group
        except BaseException:
            self.drop(groups)
            raise

    def _queue(self, group: PromptRequests, one: PromptInput, *, streamed: bool) -> None:
        tokens, params, stops = one.prompt.token_ids, one.params, one.stops
        # The parameters of output 0 differ from those of the other outputs.
        own = [params.of_output(i) for i in (0, 1)] if params.n > 1 else [params]
        includes = params.include_stop_str_in_output
        for i in range(params.n):
            text = None
            # Without a text, `LLMEngine.add_request` rejects stop strings: there is no tokenizer.
            if (streamed or stops) and not (stops and not one.decode.has_text):
                text = TextReader(
                    one.decode, stops, params.min_tokens, tokens, includes_stop=includes
                )
            group.seqs.append(self._engine.add_request(tokens, own[min(i, 1)], text, sample=i))

    def drop(self, groups: list[PromptRequests]) -> None:
        """End the requests of these prompts. Nobody gets their outputs."""
        for group in groups:
            self._forget(group)
        self._engine.drop([seq for group in groups for seq in group.seqs])

    def _forget(self, group: PromptRequests) -> None:
        for seq in group.seqs:
            self._prompts.pop(seq.request_id, None)
            self._streams.pop(seq.request_id, None)

    def ids(self, request_id: int) -> list[int]:
        """Return the ids of all requests of the prompt that has this request."""
        group = self._prompts.get(request_id)
        return [seq.request_id for seq in group.seqs] if group else [request_id]

    def advance(self) -> StepPlan | None:
        """Run a step of the engine. Return the plan of the step that was committed."""
        # The engine says which requests have something new. But if a call was interrupted, or if
        # `LLMEngine.reset` was called, any request may have ended.
        before, self._resets, ids = self._resets, None, None
        try:
            plan, finished = self._engine.step()
            if plan and self._engine.num_resets == before:
                ids = [seq.request_id for seq in finished]
                ids += self._engine.new_texts if self._streams else []
        finally:
            self.tell(ids)
        self._resets = self._engine.num_resets
        return plan

    def tell(self, request_ids: list[int] | None = None) -> None:
        """Tell the callers which streams have something new, and which prompts have ended.

        Args:
            request_ids: ids of all requests that got tokens or ended since the last call. None: any
                request may have.
        """
        ids = [*self._prompts] if request_ids is None else request_ids
        for request_id in ids:
            stream = self._streams.get(request_id)
            if stream is not None and stream.ready():
                stream.news[request_id] = stream
        for request_id in ids:
            group = self._prompts.get(request_id)
            if group is not None and group.all_ended():
                self._forget(group)
                group.ended.append(group)
