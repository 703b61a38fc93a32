"""The class `LLM`, with which users load a model and generate text: `from llm import LLM`.

Each prompt has `n` outputs, and each output is one request of the engine. A `PromptRequests` holds
the requests of one prompt.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

from config import Config
from engine.json_schema import JsonGrammars
from engine.llm_engine import LLMEngine
from engine.open_prompts import OpenPrompts
from engine.outputs import OutputStream, Progress, PromptRequests, make_output, new_parts
from engine.request_checks import ParamsForPrompts, params_per_prompt
from engine.types import CacheStats, EngineStats, StepPlan
from sampling_params import SamplingParams
from utils.errors import EngineClosedError, EngineUseError, RequestError, StepError
from utils.prompts import Prompt, Prompts, load_tokenizer, templated, tokenized
from utils.stop_strings import SharedStopStrings, StopStrings
from utils.text import Decoder, decoder
from utils.text_reader import TextReader

__all__ = ["LLM", "SamplingParams"]


class LLM:
    """A loaded model that generates text.

        with LLM("path/to/Qwen3-0.6B") as llm:
            for out in llm.generate(["def add(a, b):"], SamplingParams(temperature=0)):
                print(out["text"])

    `options` are fields of `Config`. A further option `preset` names a preset (docs/presets.md).

    All methods may be called from any thread at any time. One thread at a time runs a step, with
    the requests of all threads. `generate`, `chat` and `stream` return their own requests' outputs.

    Attributes:
        engine: the `LLMEngine`, which runs the requests.
        tokenizer: the checkpoint's tokenizer, loaded by transformers; None if there is none.
        decode: function that decodes token ids to text without special tokens.

    Raises a ConfigError, a CheckpointError or an OutOfMemoryError if the model cannot be loaded.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = LLMEngine(Config.from_options(model, **options))
        self._unfinished = OpenPrompts()
        # Streams of `add_request(..., stream=True)` that have something new, by request id.
        self._news: dict[int, OutputStream] = {}
        self._stops = SharedStopStrings()
        self._resets: int | None = None  # `engine.num_resets` at the last step; None during a step
        # Some tokenizers cannot encode in two threads at once. A signal handler may come between.
        self._tokenizing = threading.RLock()
        self._told: list[dict[str, Any]] = []  # outputs that `step` has made and not returned
        # Prompts that `add_request` added and that have ended. `step` will return their outputs.
        self._ended: deque[PromptRequests] = deque()
        try:
            self.tokenizer: Any | None = load_tokenizer(self.engine.checkpoint.path)
        except BaseException:
            self.engine.close()
            raise
        self.decode: Decoder = decoder(self.tokenizer)
        self._grammars = JsonGrammars.of(self.engine.checkpoint, self.tokenizer)

    @property
    def config(self) -> Config:
        """The engine's options, with actual values in place of None and "auto"."""
        return self.engine.config

    @property
    def vocab_size(self) -> int:
        """Number of token ids; also the number of logits that a logits processor gets."""
        return int(self.engine.checkpoint.hf_config.vocab_size)

    def generate(
        self,
        prompts: Prompts,
        sampling_params: ParamsForPrompts = None,
        use_tqdm: bool = True,
        raise_errors: bool = False,
    ) -> list[dict[str, Any]]:
        """Generate the outputs of all prompts.

        Args:
            prompts: a prompt or a list of prompts. A prompt is a text or a list of token ids.
            sampling_params: a SamplingParams, or a list of one per prompt. None: SamplingParams().
            use_tqdm: show a progress bar with prefill and decode rates in tokens per second.
            raise_errors: if a request fails alone, raise its error once all requests have ended. If
                False, the output has the finish_reason "error" and the `error`.

        Returns:
            One dictionary per prompt, in the order of the prompts. The page docs/options.md
            explains the keys of the dictionary, such as `text` and `token_ids`.

        Raises:
            RequestError: a prompt or its parameters are wrong. No prompt of this call is run.
            StepError, WorkerDiedError: a step failed, or the process of a rank has ended.
            EngineClosedError: the engine was closed with `close`.
            EngineUseError: the caller is a function that a step runs, or a forked child process.
            LogitsError: `raise_errors` is True, and a request failed alone.
        """
        ended: deque[PromptRequests] = deque()
        outputs: dict[int, dict[str, Any]] = {}
        groups: list[PromptRequests] = []
        try:
            self._add(groups, prompts, sampling_params, ended)
            with closing(Progress(len(groups), enabled=use_tqdm)) as progress:
                while len(outputs) < len(groups):
                    with self.engine.turns.until(lambda: bool(ended)) as may_step:
                        plan = self._advance() if may_step else None
                        progress.update(plan, self.engine.num_new_tokens, len(ended))
                        # While `ended` has an element, no other thread may step. `close` in another
                        # thread may append one.
                        while ended:
                            outputs[ended[0].index] = make_output(ended[0].seqs, self.decode)
                            ended.popleft()
            if self.engine.has_unfinished:
                with self.engine.turns.turn():
                    self.engine.finish_steps()
        except BaseException:
            self._drop(groups)
            raise
        for error in filter(None, (seq.error for group in groups for seq in group.seqs)):
            if isinstance(error, StepError):  # of a step that another thread ran
                raise StepError(str(error)) from error
            if raise_errors:
                raise error
        return [outputs[i] for i in range(len(groups))]

    def stream(
        self, prompts: Prompts, sampling_params: ParamsForPrompts = None
    ) -> Generator[dict[str, Any], None, None]:
        """Generate like `generate`, but return each output in parts while the output grows.

        Returns:
            An iterator of dictionaries. Each dictionary is a part of one output. `index` is the
            index of the prompt, and `sample` is the index of the output among the prompt's `n`
            outputs. `text` and `token_ids` do not repeat earlier parts of the output. The
            `finish_reason` of a part is None, except in the last part of an output. The last part
            also has the key `error`, whose value is None unless the request failed. No `text` ends
            within a character. The texts of an output's parts, joined, are the text that `generate`
            returns. Closing or deleting the iterator aborts unfinished requests.
        """
        stream = self._parts(prompts, sampling_params)
        # Start the generator: it queues the requests, and its `finally` aborts them.
        next(stream)
        return stream

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        sampling_params: ParamsForPrompts = None,
        use_tqdm: bool = True,
        raise_errors: bool = False,
    ) -> list[dict[str, Any]]:
        """Generate the answer to a conversation, or to each conversation of a list.

        A message is a dictionary with `role` and `content`. The checkpoint's chat template makes
        prompts from the messages. If the template is missing or fails, a RequestError is raised.
        """
        self.engine.turns.check()
        kinds = (list, tuple)
        several = isinstance(messages, kinds) and messages and isinstance(messages[0], kinds)
        chats = messages if several else [messages]
        with self._tokenizing:
            prompts = [templated(self.tokenizer, one) for one in chats]
        return self.generate(prompts, sampling_params, use_tqdm, raise_errors)

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """Return the SamplingParams of generation_config.json, changed by `overrides`."""
        return SamplingParams.from_generation_config(self.engine.checkpoint.path, **overrides)

    def stats(self) -> EngineStats:
        """Return counts of steps, requests, tokens and blocks (see `EngineStats`)."""
        with self.engine.turns.turn():
            return self.engine.stats

    def cache_stats(self) -> CacheStats:
        """Return counts of the prefix cache, e.g. of cached blocks (see `CacheStats`)."""
        return self.stats().cache

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Requests that run now will add no blocks to the cache."""
        with self.engine.turns.turn():
            self.engine.reset_prefix_cache()

    def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, stream: bool = False
    ) -> int:
        """Queue a prompt and return its id. `step` returns the prompt's outputs with the id.

        If `stream` is True, `step` returns the outputs in parts, as `stream` does. Later calls of
        `step`, `generate` or `stream` run the prompt. Raises RequestError, EngineClosedError.
        """
        # `prompt=5` is an error. It must not become [5], which is a valid prompt of one token id.
        prompts: Prompts = [prompt] if isinstance(prompt, (str, list, tuple)) else prompt
        groups: list[PromptRequests] = []
        ended, news = (None, self._news) if stream else (self._ended, None)
        self._add(groups, prompts, sampling_params, ended, news)
        return groups[0].seqs[0].request_id

    def step(self) -> list[dict[str, Any]]:
        """Run one step. Return the outputs of prompts queued by `add_request` that have ended.

        There is one dictionary per prompt, as in `generate`, with `request_id` added. Of prompts
        queued with `stream=True`, all parts that are new are returned, as in `stream`, with
        `request_id` added. If `step` raises a StepError, all requests have ended, and the next
        `step` returns their outputs.
        """
        with self.engine.turns.step():
            try:
                self._advance()
            except EngineClosedError:
                if not (self._ended or self._news):
                    raise
            # If an exception interrupts this, the next `step` returns what is in `_told`.
            for stream, part in new_parts(self._news):
                self._told.append({"request_id": stream.prompt_id, **part})
            while self._ended:
                seqs = self._ended[0].seqs
                output = make_output(seqs, self.decode)
                self._told.append({"request_id": seqs[0].request_id, **output})
                self._ended.popleft()
            told, self._told = self._told, []
        return told

    def now(self) -> float:
        """Return the time in seconds on the model runner's clock, which may be simulated."""
        self.engine.turns.check_process()
        return self.engine.runner.now()

    def wait_until(self, moment: float) -> None:
        """Wait until `now()` is `moment` or later. A simulated clock is moved forward."""
        self.engine.turns.check_process()
        self.engine.runner.wait_until(moment)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has requests to run or outputs to return."""
        self.engine.turns.check_process()
        left = self._unfinished or self._ended or self._news or self._told
        return bool(left) or self.engine.has_unfinished

    def abort(self, request_id: int) -> None:
        """End all outputs of a prompt at the next `step`. Their finish_reason becomes "abort".

        The outputs keep the tokens generated so far. Also a function that a step runs may call
        `abort`. The id of a request that has ended or does not exist is ignored.
        """
        self.engine.turns.check_process()
        if type(request_id) is not int:
            fix = "Give the number that add_request returned."
            raise RequestError("request_id", request_id, "is not a request id", fix)
        for one in self._unfinished.ids(request_id):
            self.engine.abort(one)

    def close(self) -> None:
        """End all requests and free the engine's memory. A second call of `close` does nothing.

        A later `step` still returns the outputs that `close` has ended.
        """
        with self.engine.turns.turn():
            try:
                self.engine.close()
            finally:
                self._unfinished.tell()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.engine.turns.is_foreign:
            self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise EngineUseError("an LLM cannot be copied or pickled: it owns the device's memory")

    def _add(
        self,
        groups: list[PromptRequests],
        prompts: Prompts,
        params: ParamsForPrompts,
        ended: deque[PromptRequests] | None = None,
        news: dict[int, OutputStream] | None = None,
    ) -> None:
        """Queue `n` requests for each prompt. If one request is wrong, no request is queued.

        Appends the `PromptRequests` of each prompt to `groups`. So the caller can end them, even if
        Ctrl-C interrupts this method. When all requests of a prompt have ended, its
        `PromptRequests` is appended to `ended`. If `news` is given instead, the outputs are
        streamed: streams with something new are added to `news`.
        """
        self.engine.turns.check()
        specials = self.decode.specials
        with self._tokenizing:
            token_lists = tokenized(self.tokenizer, prompts)
        per_prompt = params_per_prompt(params, len(token_lists))
        # Schemas and stop strings are compiled before the turn, because many of them take long.
        with self._tokenizing:
            own = {id(one): one for one in per_prompt}
            stops = {key: self._stops.of(tuple(one.stop), specials) for key, one in own.items()}
            own = {key: self._grammars.applied(one) for key, one in own.items()}
        try:
            with self.engine.turns.turn(), self.engine.all_or_none():
                for tokens, key in zip(token_lists, map(id, per_prompt), strict=True):
                    group = PromptRequests(len(groups), [], deque() if ended is None else ended)
                    groups.append(group)
                    self._queue(group, tokens, own[key], stops[key], streamed=news is not None)
                self._unfinished.add(groups, news, has_text=self.tokenizer is not None)
        except BaseException:
            self._drop(groups)
            raise

    def _queue(
        self,
        group: PromptRequests,
        tokens: list[int],
        params: SamplingParams,
        stop: StopStrings | None,
        *,
        streamed: bool,
    ) -> None:
        # The parameters of output 0 differ from those of the other outputs.
        own = [params.of_output(i) for i in (0, 1)] if params.n > 1 else [params]
        for i in range(params.n):
            text = None
            # `engine.add_request` rejects stop strings if there is no tokenizer.
            if (streamed or stop) and not (stop and self.tokenizer is None):
                text = TextReader(self.decode, stop, params.min_tokens, tokens)
            group.seqs.append(self.engine.add_request(tokens, own[min(i, 1)], text, sample=i))

    def _drop(self, groups: list[PromptRequests]) -> None:
        seqs = [seq for group in groups for seq in group.seqs]
        self._unfinished.drop(seq.request_id for seq in seqs)
        self.engine.drop(seqs)

    def _parts(
        self, prompts: Prompts, params: ParamsForPrompts
    ) -> Generator[dict[str, Any], None, None]:
        groups: list[PromptRequests] = []
        news: dict[int, OutputStream] = {}
        try:
            self._add(groups, prompts, params, news=news)
            num_open = sum(len(group.seqs) for group in groups)
            yield {}
            while num_open:
                with self.engine.turns.until(lambda: bool(news)) as may_step:
                    if may_step:
                        self._advance()
                    parts = [part for _, part in new_parts(news)]
                num_open -= sum(part["finish_reason"] is not None for part in parts)
                yield from parts
        finally:
            self._drop(groups)

    def _advance(self) -> StepPlan | None:
        # The engine says which requests have something new. But if a call was interrupted, or if
        # `LLMEngine.reset` was called, any request may have ended.
        before, self._resets, ids = self._resets, None, None
        try:
            plan, finished = self.engine.step()
            if plan and self.engine.num_resets == before:
                ids = [seq.request_id for seq in finished]
                ids += self.engine.new_texts if self._unfinished.has_streams else []
        finally:
            self._unfinished.tell(ids)
        self._resets = self.engine.num_resets
        return plan
