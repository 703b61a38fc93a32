"""The user's entry: `from llm import LLM`."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import Config
from engine.llm_engine import LLMEngine
from engine.requests import (
    ParamsForPrompts,
    PromptRequests,
    increments,
    make_output,
    params_per_prompt,
)
from engine.types import CacheStats, EngineStats, StepPlan
from sampling_params import SamplingParams
from utils.errors import EngineClosedError, RequestError
from utils.text import Prompt, Prompts, TextReader, decoder, load_tokenizer, templated, tokenized

__all__ = ["LLM", "SamplingParams"]


class LLM:
    """A model ready to generate.

        with LLM("path/to/Qwen3-0.6B") as llm:
            for out in llm.generate(["def add(a, b):"], SamplingParams(temperature=0)):
                print(out["text"])

    Options are the fields of `Config`, and `preset` for several at once (docs/presets.md).

    Attributes:
        engine: what runs below, with its parts: requests one by one, as `Sequence`, and steps that
            return their `StepPlan`.
        tokenizer: transformers' tokenizer of the checkpoint, or None if it has none.
        decode: token ids to text without special tokens; to nothing without a tokenizer.

    Raises:
        ConfigError, CheckpointError, OutOfMemoryError: see `utils.errors`.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = LLMEngine(Config.from_options(model, **options))
        # Prompts of `generate` and `add_request` that have not ended, by the id of each request.
        self._unfinished: dict[int, PromptRequests] = {}
        # Those of `add_request` that have ended and that `step` has not returned yet.
        self._ended: list[PromptRequests] = []
        try:
            self.tokenizer: Any | None = load_tokenizer(self.engine.checkpoint.path)
        except BaseException:
            self.engine.close()
            raise
        self.decode = decoder(self.tokenizer)

    @property
    def config(self) -> Config:
        """The options with every default filled in."""
        return self.engine.config

    def generate(
        self, prompts: Prompts, sampling_params: ParamsForPrompts = None, use_tqdm: bool = True
    ) -> list[dict[str, Any]]:
        """Continue every prompt.

        Args:
            prompts: texts, or lists of token ids, or a mixture; a single one counts as a list.
            sampling_params: for all prompts, or one per prompt; defaults if None.
            use_tqdm: show a bar with prefill and decode rates in tokens per second.

        Returns:
            One dictionary per prompt, in order: `text`, `token_ids`, `finish_reason`, `error`,
            `prompt_token_ids`, `logprobs`, `prompt_logprobs`, `metrics`, and with n > 1 `outputs`.
            docs/options.md explains them.

        Raises:
            RequestError: a prompt or its parameters cannot be served; then nothing was started.
            StepError: the device failed.
            EngineClosedError: after close().
        """
        ended: list[PromptRequests] = []
        outputs: dict[int, dict[str, Any]] = {}
        try:
            groups = self._add(prompts, sampling_params, ended)
            with closing(Progress(len(groups), enabled=use_tqdm)) as progress:
                while len(outputs) < len(groups):
                    plan = self._advance()
                    progress.update(plan, self.engine.num_new_tokens, len(ended))
                    # Now, while the device is busy with the next step.
                    outputs |= {one.index: make_output(one.seqs, self.decode) for one in ended}
                    ended.clear()
            self.engine.finish_steps()
        except (RequestError, EngineClosedError):
            raise
        except BaseException:
            self.engine.reset()
            self._collect_ended()
            raise
        return [outputs[i] for i in range(len(groups))]

    def stream(
        self, prompts: Prompts, sampling_params: ParamsForPrompts = None
    ) -> Generator[dict[str, Any], None, None]:
        """As `generate`, telling the outputs as they grow.

        Returns:
            An iterator of dictionaries: `index` (of the prompt), `sample` (of its `n`), `text` and
            `token_ids` that are new, and `finish_reason`, None but for the last one of an output,
            which has `error` as well. Texts are whole characters, and put together the text that
            `generate` returns. Closing the iterator, or dropping it, aborts what has not ended.
        """
        stream = self._increments(self._add(prompts, sampling_params))
        # It waits inside its `try` from here on, so that closing it always aborts.
        next(stream)
        return stream

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        sampling_params: ParamsForPrompts = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """As `generate`, for a conversation or several in the checkpoint's chat template.

        A message has `role` and `content`. A RequestError also says that there is no template, or
        that it refuses the messages.
        """
        self.engine.check_usable()
        kinds = (list, tuple)
        several = isinstance(messages, kinds) and messages and isinstance(messages[0], kinds)
        prompts = [templated(self.tokenizer, one) for one in (messages if several else [messages])]
        return self.generate(prompts, sampling_params, use_tqdm)

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """As `SamplingParams.from_generation_config`, for this checkpoint."""
        return SamplingParams.from_generation_config(self.engine.checkpoint.path, **overrides)

    def stats(self) -> EngineStats:
        """Totals since the engine started."""
        return self.engine.stats

    def cache_stats(self) -> CacheStats:
        """How much of the prompts was found in the prefix cache so far, and what was given up."""
        return self.engine.stats.cache

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, those that running requests would leave included."""
        self.engine.reset_prefix_cache()

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue a request, to be run by `step` or beside those of `generate`; errors as there.

        Returns its id: for `abort`, and in the output that `step` returns.
        """
        # A number in a list would pass for a prompt of one token.
        prompts: Prompts = [prompt] if isinstance(prompt, (str, list, tuple)) else prompt
        (group,) = self._add(prompts, sampling_params, self._ended)
        return group.seqs[0].request_id

    def step(self) -> list[dict[str, Any]]:
        """Run one step of all requests.

        Returns the outputs, as of `generate` and with `request_id`, of the requests of
        `add_request` that have ended. After a StepError the next `step` returns those it ended.
        """
        self._advance()
        ended, self._ended[:] = [group.seqs for group in self._ended], []
        return [{"request_id": s[0].request_id, **make_output(s, self.decode)} for s in ended]

    def now(self) -> float:
        """Seconds on the clock of all times of requests; virtual with a simulated runner."""
        return self.engine.runner.now()

    def wait_until(self, moment: float) -> None:
        """Return when `now` is `moment` or later; a simulated runner moves its time there."""
        self.engine.runner.wait_until(moment)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has something to do or to return."""
        return bool(self._unfinished or self._ended) or self.engine.has_unfinished

    def abort(self, request_id: int) -> None:
        """End a request at the next step, with finish_reason "abort" and the tokens it has.

        May be called at any time and from any thread; other requests than unfinished ones are
        passed over.
        """
        group = self._unfinished.get(request_id)
        for one in [seq.request_id for seq in group.seqs] if group else [request_id]:
            self.engine.abort(one)

    def close(self) -> None:
        """End all requests and give the memory back; may be called twice."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _add(
        self, prompts: Prompts, params: ParamsForPrompts, ended: list[PromptRequests] | None = None
    ) -> list[PromptRequests]:
        """Queue the requests of all prompts, or none of them; `n` for each.

        A prompt is put into `ended` when its requests have ended. It is None for a stream, whose
        requests all have a reader of their text.
        """
        self.engine.check_usable()
        token_lists = tokenized(self.tokenizer, prompts)
        per_prompt = params_per_prompt(params, len(token_lists))
        groups: list[PromptRequests] = []
        try:
            for tokens, one in zip(token_lists, per_prompt, strict=True):
                groups.append(PromptRequests(len(groups), [], [] if ended is None else ended))
                for i in range(one.n):
                    text = None
                    # Without a tokenizer the engine refuses stop strings.
                    if (ended is None or one.stop) and not (one.stop and self.tokenizer is None):
                        text = TextReader(self.decode, tuple(one.stop), one.min_tokens)
                    own = one.of_output(i) if one.n > 1 else one
                    groups[-1].seqs.append(self.engine.add_request(tokens, own, text, sample=i))
        except BaseException:
            self.engine.drop([seq for group in groups for seq in group.seqs])
            raise
        if ended is not None:
            self._unfinished |= {seq.request_id: group for group in groups for seq in group.seqs}
        return groups

    def _increments(self, groups: list[PromptRequests]) -> Generator[dict[str, Any], None, None]:
        has_text = self.tokenizer is not None
        seqs = [(seq, group.index) for group in groups for seq in group.seqs]
        left = dict.fromkeys(increments(seq, index, has_text=has_text) for seq, index in seqs)
        try:
            yield {}
            while left:
                if self.engine.has_unfinished:
                    self._advance()
                for one in list(left):
                    if news := next(one):
                        if news["finish_reason"] is not None:
                            del left[one]
                        yield news
        finally:
            self.engine.drop([seq for seq, _ in seqs])

    def _advance(self) -> StepPlan | None:
        """Run one step and put the prompts that have ended where they are waited for."""
        ids = None
        try:
            plan, finished = self.engine.step()
            # With nothing to do, whoever still waits has been ended by a reset of the engine.
            ids = [seq.request_id for seq in finished] if plan else None
        finally:
            self._collect_ended(ids)
        return plan

    def _collect_ended(self, request_ids: list[int] | None = None) -> None:
        """Put prompts that have ended where they are waited for; None looks at all requests."""
        for request_id in list(self._unfinished) if request_ids is None else request_ids:
            group = self._unfinished.get(request_id)
            if group and all(seq.finish_reason is not None for seq in group.seqs):
                for seq in group.seqs:
                    self._unfinished.pop(seq.request_id, None)
                group.ended.append(group)


class Progress:
    """The bar of a `generate` call: ended requests, and the rates of prefill and decode.

    A step's time counts as prefill if the step computed prompt tokens, else as decode.
    """

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar = tqdm(
            total=total, desc="Generating", unit="req", disable=not enabled, dynamic_ncols=True
        )
        self.close = self._bar.close
        # Tokens and seconds.
        self._done: dict[str, tuple[int, float]] = {"prefill": (0, 0.0), "decode": (0, 0.0)}
        self._last = time.perf_counter()

    def update(self, plan: StepPlan | None, num_tokens: int, num_finished: int) -> None:
        """Take in a committed step, which gave `num_tokens` to all requests."""
        if self._bar.disable:
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
