"""The prompts whose requests are unfinished, and who is told when their outputs grow or end."""

from __future__ import annotations

from collections.abc import Iterable

from engine.outputs import OutputStream, PromptRequests


class OpenPrompts:
    """The prompts with unfinished requests. All threads share them.

    After a step `tell` looks at the requests that got tokens or ended, and at no other ones. So a
    step costs the same however many requests wait.
    """

    def __init__(self) -> None:
        self._prompts: dict[int, PromptRequests] = {}  # by the id of each of the prompt's requests
        self._streams: dict[int, OutputStream] = {}  # by request id

    def __bool__(self) -> bool:
        return bool(self._prompts)

    @property
    def has_streams(self) -> bool:
        """Whether `tell` needs to know which requests have new text."""
        return bool(self._streams)

    def add(
        self,
        prompts: Iterable[PromptRequests],
        news: dict[int, OutputStream] | None,
        *,
        has_text: bool,
    ) -> None:
        """Add prompts whose requests are queued. If `news` is given, their outputs are streamed."""
        for prompt in prompts:
            for seq in prompt.seqs if news is not None else ():
                # mypy: `news` is no None here.
                assert news is not None
                stream = OutputStream(seq, prompt, news, has_text=has_text)
                self._streams[seq.request_id] = stream
            self._prompts |= dict.fromkeys((seq.request_id for seq in prompt.seqs), prompt)

    def drop(self, request_ids: Iterable[int]) -> None:
        """Forget requests. Their callers are told nothing more."""
        for request_id in request_ids:
            self._prompts.pop(request_id, None)
            self._streams.pop(request_id, None)

    def ids(self, request_id: int) -> list[int]:
        """Return the ids of all requests of the prompt that has this request."""
        prompt = self._prompts.get(request_id)
        return [seq.request_id for seq in prompt.seqs] if prompt else [request_id]

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
            prompt = self._prompts.get(request_id)
            if prompt is not None and prompt.all_ended():
                self.drop(seq.request_id for seq in prompt.seqs)
                prompt.ended.append(prompt)
