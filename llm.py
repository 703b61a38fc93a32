"""The user's entry: `from llm import LLM`."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any

from config import Config
from engine.llm_engine import LLMEngine
from engine.outputs import Increments, make_output
from engine.sequence import Sequence
from engine.types import CacheStats, EngineStats, StepPlan
from sampling_params import SamplingParams
from utils.errors import EngineClosedError, RequestError
from utils.progress import Progress
from utils.prompts import Prompt, Prompts, params_per_prompt, templated, tokenized
from utils.text import TextReader, decoder
from utils.tokenizer import load_tokenizer

__all__ = ["LLM", "SamplingParams"]


class LLM:
    """A model ready to generate.

        with LLM("path/to/Qwen3-0.6B") as llm:
            for out in llm.generate(["def add(a, b):"], SamplingParams(temperature=0)):
                print(out["text"])

    Args:
        model: checkpoint folder or hub name.
        options: any field of `Config`, and `preset` for several at once (docs/presets.md).

    Raises:
        ConfigError, CheckpointError, OutOfMemoryError: see `utils.errors`.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._closed = False
        self._engine = LLMEngine(Config.from_options(model, **options))
        # Requests of add_request, a group of n each: unfinished by the id of the first, the first
        # of each, and those ended but not yet returned by step.
        self._added: dict[int, list[Sequence]] = {}
        self._first_of: dict[int, int] = {}
        self._ended: list[list[Sequence]] = []
        try:
            self._tokenizer = load_tokenizer(self._engine.checkpoint.path)
            self._decode = decoder(self._tokenizer)
        except BaseException:
            self._engine.close()
            raise

    @property
    def config(self) -> Config:
        """The options with every default filled in."""
        return self._engine.config

    @property
    def tokenizer(self) -> Any | None:
        """transformers' tokenizer of the checkpoint, or None if it has none."""
        return self._tokenizer

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Continue every prompt.

        Args:
            prompts: texts, or lists of token ids, or a mixture; a single one counts as a list.
            sampling_params: for all prompts, or one per prompt; defaults if None.
            use_tqdm: show progress, with prefill and decode rates in tokens per second.

        Returns:
            One dictionary per prompt, in order:

            - `text`: without special tokens; empty if the checkpoint has no tokenizer;
            - `token_ids`: of the output, an end-of-sequence token included;
            - `finish_reason`: "stop", "length", "abort", or "error" if the model gave no usable
              token for this request; in `step` and `stream` "error" also after a step failed;
            - `error`: what the runner reported for this request, else None;
            - `prompt_token_ids`;
            - `logprobs`, `prompt_logprobs`: None unless asked for; for each token a dictionary of
              token ids and log-probabilities, the token itself first (None for the prompt's
              first token);
            - `metrics`: in seconds `queue_time`, `time_to_first_token` (from arrival),
              `mean_inter_token_time`, `p99_inter_token_time` and `longest_inter_token_time`
              (None where there is no such token); `cached_prompt_tokens`; `preemptions`;
            - `outputs`: only with n > 1, such dictionaries for all of them; the entries beside it
              are the first one's.

        Raises:
            RequestError: a prompt or its parameters cannot be served; then nothing was started.
            StepError: the device failed.
            EngineClosedError: after close().
        """
        groups: list[list[Sequence]] = []
        outputs: dict[int, dict[str, Any]] = {}
        try:
            groups += self._add(prompts, sampling_params, streams=False)
            with Progress(len(groups), enabled=use_tqdm) as progress:
                left = {seq.request_id: i for i, group in enumerate(groups) for seq in group}
                while left and self._engine.has_unfinished:
                    plan, finished = self._advance()
                    ended = {left.pop(seq.request_id, None) for seq in finished} - {None}
                    done = {i: groups[i] for i in ended if i is not None and _over(groups[i])}
                    progress.update(plan, self._engine.num_new_tokens, len(done))
                    # Now, while the device is busy with the next step.
                    for i, group in done.items():
                        outputs[i] = make_output(group, self._decode)
            self._finish_steps()
        except RequestError:
            raise
        except BaseException:
            self._engine.reset()
            self._collect_ended()
            raise
        return [outputs[i] for i in range(len(groups))]

    def stream(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> Generator[dict[str, Any], None, None]:
        """Continue every prompt, telling the outputs as they grow.

        Args:
            prompts, sampling_params: as of `generate`.

        Returns:
            An iterator of dictionaries: `index` (of the prompt), `sample` (of its `n`), `text` and
            `token_ids` that are new, and `finish_reason`, None but for the last one of an output,
            which has `error` as well.
            Texts are whole characters, and put together the text that `generate` returns.
            Closing the iterator, or dropping it, aborts what has not ended.

        Raises:
            RequestError, StepError, EngineClosedError: as `generate`.
        """
        groups = self._add(prompts, sampling_params, streams=True)
        increments = self._increments(groups)
        # It waits inside its `try` from here on, so that closing it always aborts.
        next(increments)
        return increments

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Answer a conversation, or several, through the checkpoint's chat template.

        Args:
            messages: dictionaries of `role` and `content`; or lists of them.
            sampling_params, use_tqdm: as of `generate`.

        Returns:
            As `generate`, one dictionary per conversation.

        Raises:
            RequestError: also if the checkpoint has no chat template or it refuses the messages.
            StepError, EngineClosedError: as `generate`.
        """
        self._check_open()
        kinds = (list, tuple)
        several = isinstance(messages, kinds) and messages and isinstance(messages[0], kinds)
        conversations: list[Any] = messages if several else [messages]
        prompts = [templated(self._tokenizer, one) for one in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for, changed by `overrides`.

        Raises:
            RequestError, CheckpointError: see `SamplingParams.from_generation_config`.
        """
        return SamplingParams.from_generation_config(self._engine.checkpoint.path, **overrides)

    def stats(self) -> EngineStats:
        """Totals since the engine started."""
        return self._engine.stats

    def cache_stats(self) -> CacheStats:
        """How much of the prompts was found in the prefix cache so far, and what was given up."""
        return self._engine.cache_stats

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes.

        Raises:
            EngineClosedError: after close().
        """
        self._engine.reset_prefix_cache()

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one request, to be run by `step` (or beside those of `generate`).

        Returns:
            Its id: for `abort`, and in the output that `step` returns.

        Raises:
            RequestError, EngineClosedError: as `generate`.
        """
        # A number in a list would pass for a prompt of one token.
        prompts: Prompts = [prompt] if isinstance(prompt, (str, list, tuple)) else prompt
        (group,) = self._add(prompts, sampling_params, streams=False)
        first = group[0].request_id
        self._added[first] = group
        self._first_of |= {seq.request_id: first for seq in group}
        return first

    def step(self) -> list[dict[str, Any]]:
        """Run one step of all requests.

        Returns:
            The outputs, as of `generate` and with `request_id`, of the requests of `add_request`
            that have ended.

        Raises:
            StepError: the device failed; the next `step` returns the requests that it ended.
            EngineClosedError: after close().
        """
        self._check_open()
        self._advance()
        ended, self._ended = self._ended, []
        return [{"request_id": g[0].request_id, **make_output(g, self._decode)} for g in ended]

    def now(self) -> float:
        """Seconds on the clock of all times of requests; virtual with a simulated runner."""
        return self._engine.now()

    def wait_until(self, moment: float) -> None:
        """Return when `now` is `moment` or later; a simulated runner moves its time there."""
        self._engine.wait_until(moment)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has something to do or to return."""
        return bool(self._added or self._ended) or self._engine.has_unfinished

    def abort(self, request_id: int) -> None:
        """End a request at the next step, with finish_reason "abort" and the tokens it has.

        May be called at any time and from any thread, while `generate` or `step` runs as well;
        unknown and finished requests are passed over.
        """
        for seq in self._added.get(request_id, ()):
            self._engine.abort(seq.request_id)
        self._engine.abort(request_id)

    def close(self) -> None:
        """End all requests and give the memory back; may be called twice."""
        self._closed = True
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _add(
        self,
        prompts: Prompts,
        params: SamplingParams | list[SamplingParams] | None,
        *,
        streams: bool,
    ) -> list[list[Sequence]]:
        """Queue the requests of all prompts, or none of them; `n` for each."""
        self._check_open()
        token_lists = tokenized(self._tokenizer, prompts)
        per_prompt = params_per_prompt(params, len(token_lists))
        groups: list[list[Sequence]] = []
        try:
            for tokens, one in zip(token_lists, per_prompt, strict=True):
                groups.append([])
                for i in range(one.n):
                    text = None
                    # Without a tokenizer the engine refuses stop strings.
                    if (streams or one.stop) and not (one.stop and self._tokenizer is None):
                        text = TextReader(self._decode, tuple(one.stop), one.min_tokens)
                    seq = self._engine.add_request(tokens, one.of_output(i), text, sample=i)
                    groups[-1].append(seq)
        except BaseException:
            self._engine.withdraw([seq for group in groups for seq in group])
            raise
        return groups

    def _increments(self, groups: list[list[Sequence]]) -> Generator[dict[str, Any], None, None]:
        seqs = [seq for group in groups for seq in group]
        has_text = self._tokenizer is not None
        left = [
            Increments(seq, i, k, has_text=has_text)
            for i, group in enumerate(groups)
            for k, seq in enumerate(group)
        ]
        try:
            yield {}
            while left:
                if self._engine.has_unfinished:
                    self._advance()
                for increments in left:
                    if news := increments.next():
                        yield news
                left = [increments for increments in left if not increments.ended]
        finally:
            if not self._closed and self._engine.drop(seqs):
                self._finish_steps()

    def _finish_steps(self) -> None:
        """Take in the last steps of requests that ended before them."""
        while not self._engine.num_unfinished and self._engine.has_unfinished:
            self._advance()

    def _advance(self) -> tuple[StepPlan | None, list[Sequence]]:
        try:
            plan, finished = self._engine.step()
        except BaseException:
            self._collect_ended()
            raise
        for seq in finished if self._first_of else ():
            first = self._first_of.pop(seq.request_id, -1)
            group = self._added.get(first)
            if group is not None and _over(group):
                self._ended.append(self._added.pop(first))
        return plan, finished

    def _collect_ended(self) -> None:
        """Put aside the requests of `add_request` that an exception has ended."""
        for first, group in list(self._added.items()):
            if _over(group):
                self._ended.append(self._added.pop(first))
                for seq in group:
                    self._first_of.pop(seq.request_id, None)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the LLM was closed; construct a new one")


def _over(group: list[Sequence]) -> bool:
    return all(seq.finish_reason is not None for seq in group)
