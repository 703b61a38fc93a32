"""The class `LLM`, with which users load a model and generate text: `from llm import LLM`.

`generate`, `chat`, `stream` and `add_request` take sampling parameters. If there are none, they use
those that the checkpoint recommends in its file generation_config.json.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from config import Config, shows_options
from engine.bad_words import with_bad_words_ids
from engine.json_schema import JsonGrammars
from engine.llm_engine import LLMEngine
from engine.outputs import OutputStream, Progress, PromptRequests, new_parts
from engine.prompt_queue import PromptInput, PromptQueue
from engine.request_checks import ParamsForPrompts, params_per_prompt
from engine.types import CacheStats, EngineStats
from sampling_params import SamplingParams
from utils.chats import ChatOptions, Message, check_chat, templated
from utils.checkpoint import folder_of
from utils.errors import CheckpointError, EngineClosedError, EngineUseError, RequestError, StepError
from utils.output_types import Logprob, Output
from utils.prompts import Prompt, Prompts, as_list, load_tokenizer, tokenized
from utils.stop_strings import SharedStopStrings, StopStrings
from utils.text import Decoder, decoder

__all__ = ["LLM", "Logprob", "Output", "SamplingParams"]


class LLM:
    """A loaded model that generates text.

        with LLM("path/to/Qwen3-0.6B") as llm:
            for out in llm.generate(["def add(a, b):"], SamplingParams(temperature=0)):
                print(out.text)

    The constructor takes options as keyword arguments: the fields of `Config`. A further option
    `preset` names a preset (docs/presets.md).

    All methods may be called from any thread at any time. One thread at a time runs a step, with
    the requests of all threads. `generate`, `chat` and `stream` return their own requests' outputs.

    Attributes:
        engine: the `LLMEngine`, which runs the requests.
        tokenizer: the checkpoint's tokenizer, loaded by transformers; None if there is none.
        decode: function that decodes token ids to text without special tokens.

    Raises a ConfigError, a CheckpointError or an OutOfMemoryError if the model cannot be loaded.
    """

    @shows_options
    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = LLMEngine(Config.from_options(model, **options))
        self._queue = PromptQueue(self.engine)
        # Streams of `add_request(..., stream=True)` that have something new, by request id.
        self._news: dict[int, OutputStream] = {}
        self._stops = SharedStopStrings()
        # Some tokenizers cannot encode in two threads at once. A signal handler may come between.
        self._tokenizing = threading.RLock()
        self._told: list[Output] = []  # outputs that `step` has made and not returned
        # Prompts that `add_request` added and that have ended. `step` will return their outputs.
        self._ended: deque[PromptRequests] = deque()
        self._defaults: SamplingParams | None = None  # those of the checkpoint, once they are asked
        try:
            self.tokenizer: Any | None = self._loaded_tokenizer()
        except BaseException:
            self.engine.close()
            raise
        self.decode: Decoder = decoder(self.tokenizer)
        self._decode_all = decoder(self.tokenizer, skip_special_tokens=False)
        self._no_text = decoder(None)

    def _loaded_tokenizer(self) -> Any | None:
        checkpoint, path = (
            self.engine.checkpoint,
            folder_of(self.config.tokenizer or "", "tokenizer"),
        )
        tokenizer = load_tokenizer(path)
        # A checkpoint may come without a tokenizer. Another folder is given for its tokenizer.
        if tokenizer is None and path != checkpoint.path:
            raise CheckpointError(f"tokenizer={self.config.tokenizer!r}: {path} has no tokenizer")
        self._grammars = JsonGrammars.of(checkpoint, tokenizer, path)
        return tokenizer

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
    ) -> list[Output]:
        """Generate the outputs of all prompts.

        Args:
            prompts: a prompt or a list of prompts. A prompt is a text, a list or an array of token
                ids, what a tokenizer returns, or a dictionary with the key `prompt` or
                `prompt_token_ids`. A table of token ids is a list of prompts.
            sampling_params: a SamplingParams, or a list of one per prompt. None means those that
                generation_config.json recommends (`default_sampling_params`).
            use_tqdm: show a progress bar with prefill and decode rates in tokens per second.
            raise_errors: if a request fails alone, raise its error once all requests have ended. If
                False, the output has the finish_reason "error" and the `error`.

        Returns:
            One `Output` per prompt, in the order of the prompts: a dictionary whose entries, such
            as `text` and `token_ids`, are attributes too. The page docs/options.md explains them.

        Raises:
            RequestError: a prompt or its parameters are wrong. No prompt of this call is run.
            StepError, WorkerDiedError: a step failed, or the process of a rank has ended.
            EngineClosedError: the engine was closed with `close`.
            EngineUseError: the caller is a function that a step runs, or a forked child process.
            LogitsError: `raise_errors` is True, and a request failed alone.
        """
        ended: deque[PromptRequests] = deque()
        outputs: dict[int, Output] = {}
        groups: list[PromptRequests] = []
        try:
            self._queue.add(groups, self._read(prompts, sampling_params), ended)
            with closing(Progress(len(groups), enabled=use_tqdm)) as progress:
                while len(outputs) < len(groups):
                    with self.engine.turns.until(lambda: bool(ended)) as may_step:
                        plan = self._queue.advance() if may_step else None
                        progress.update(plan, self.engine.num_new_tokens, len(ended))
                        # While `ended` has an element, no other thread may step. `close` in another
                        # thread may append one.
                        while ended:
                            outputs[ended[0].index] = ended[0].output()
                            ended.popleft()
            if self.engine.has_unfinished:
                with self.engine.turns.turn():
                    self.engine.finish_steps()
        except BaseException:
            self._queue.drop(groups)
            raise
        for error in filter(None, (seq.error for group in groups for seq in group.seqs)):
            if isinstance(error, StepError):  # of a step that another thread ran
                raise StepError(str(error)) from error
            if raise_errors:
                raise error
        return [outputs[i] for i in range(len(groups))]

    def stream(
        self, prompts: Prompts, sampling_params: ParamsForPrompts = None
    ) -> Generator[Output, None, None]:
        """Generate like `generate`, but return each output in parts while the output grows.

        Returns:
            An iterator of `Output`. Each is a part of one output. `index` is the
            index of the prompt, and `sample` is the index of the output among the prompt's `n`
            outputs. `text`, `token_ids` and `logprobs` do not repeat earlier parts of the output.
            `cumulative_logprob` is the sum over all parts so far. The
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
        messages: list[Message] | list[list[Message]],
        sampling_params: ParamsForPrompts = None,
        use_tqdm: bool = True,
        raise_errors: bool = False,
        *,
        tools: list[Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[Output]:
        """Generate the answer to a conversation, or to each conversation of a list.

        A message is a dictionary with `role` and `content`. The content is a text, or a list of
        OpenAI's content parts of the type "text". The chat template makes prompts from messages.

        Args:
            sampling_params, use_tqdm, raise_errors: as in `generate`.
            tools: functions that the model may call, as JSON schemas.
            chat_template: a template in place of the checkpoint's own.
            chat_template_kwargs: variables of the template, e.g. {"enable_thinking": False}.
            add_generation_prompt: end the prompt with the beginning of an answer.
            continue_final_message: generate the rest of the last message, not a new message. Needs
                add_generation_prompt=False.

        Raises a RequestError if the template is missing or fails, or options contradict each other.
        """
        self.engine.turns.check()
        options = ChatOptions(
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        check_chat(options)
        kinds = (list, tuple)
        several = isinstance(messages, kinds) and messages and isinstance(messages[0], kinds)
        chats = messages if several else [messages]
        with self._tokenizing:
            prompts = [templated(self.tokenizer, one, options) for one in chats]
        return self.generate(prompts, sampling_params, use_tqdm, raise_errors)

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """Return the SamplingParams of generation_config.json, changed by `overrides`.

        Raises a CheckpointError if a value of the file is wrong, a RequestError if an override is.
        """
        return SamplingParams.from_generation_config(self.engine.checkpoint.path, **overrides)

    # The name of this method in vLLM.
    get_default_sampling_params = default_sampling_params

    def get_tokenizer(self) -> Any | None:
        """Return the attribute `tokenizer`, as in vLLM."""
        return self.tokenizer

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
        inputs = self._read(as_list(prompt), sampling_params)
        groups: list[PromptRequests] = []
        ended, news = (None, self._news) if stream else (self._ended, None)
        self._queue.add(groups, inputs, ended, news)
        return groups[0].seqs[0].request_id

    def step(self) -> list[Output]:
        """Run one step. Return the outputs of prompts queued by `add_request` that have ended.

        There is one `Output` per prompt, as in `generate`. Of prompts queued with `stream=True`,
        all parts that are new are returned, as in `stream`, with `request_id` added. If `step`
        raises a StepError, all requests have ended, and the next `step` returns their outputs.
        """
        with self.engine.turns.step():
            try:
                self._queue.advance()
            except EngineClosedError:
                if not (self._ended or self._news):
                    raise
            # If an exception interrupts this, the next `step` returns what is in `_told`.
            for stream, part in new_parts(self._news):
                self._told.append(Output(part, request_id=stream.prompt_id))
            while self._ended:
                self._told.append(self._ended[0].output())
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
        left = self._queue or self._ended or self._news or self._told
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
        for one in self._queue.ids(request_id):
            self.engine.abort(one)

    def close(self) -> None:
        """End all requests and free the engine's memory. A second call of `close` does nothing.

        A later `step` still returns the outputs that `close` has ended.
        """
        with self.engine.turns.turn():
            try:
                self.engine.close()
            finally:
                self._queue.tell()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.engine.turns.is_foreign:
            self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise EngineUseError("an LLM cannot be copied or pickled: it owns the device's memory")

    def _read(self, prompts: Any, params: ParamsForPrompts) -> list[PromptInput]:
        """Check prompts and parameters, and make token ids of the prompts."""
        self.engine.turns.check()
        with self._tokenizing:
            found = tokenized(self.tokenizer, prompts)
        if params is None:
            self._defaults = self._defaults or self.default_sampling_params()
            params = [self._fitting(self._defaults, len(one.token_ids)) for one in found]
        per_prompt = params_per_prompt(params, len(found))
        # Schemas and stop strings are compiled before the turn, because many of them take long.
        with self._tokenizing:
            made = {key: self._prepared(one) for key, one in {id(p): p for p in per_prompt}.items()}
        pairs = zip(found, per_prompt, strict=True)
        return [PromptInput(prompt, *made[id(one)]) for prompt, one in pairs]

    def _prepared(
        self, params: SamplingParams
    ) -> tuple[SamplingParams, Decoder, StopStrings | None]:
        """Return parameters in terms of token ids, and what makes and ends the text."""
        own = with_bad_words_ids(self._grammars.applied(params), self.tokenizer)
        decode = self._decoder_for(params)
        return own, decode, self._stops.of(tuple(params.stop), decode.specials)

    def _fitting(self, params: SamplingParams, num_prompt: int) -> SamplingParams:
        """Let an output end with the context window if the recommended `max_tokens` exceed it."""
        limit, most = self.config.max_model_len or 0, params.max_tokens
        fits = most is None or num_prompt + most <= limit
        return params if fits else replace(params, max_tokens=None)

    def _decoder_for(self, params: SamplingParams) -> Decoder:
        if not params.detokenize:
            return self._no_text
        return self.decode if params.skip_special_tokens else self._decode_all

    def _parts(self, prompts: Prompts, params: ParamsForPrompts) -> Generator[Output, None, None]:
        groups: list[PromptRequests] = []
        news: dict[int, OutputStream] = {}
        try:
            self._queue.add(groups, self._read(prompts, params), news=news)
            num_open = sum(len(group.seqs) for group in groups)
            yield Output()
            while num_open:
                with self.engine.turns.until(lambda: bool(news)) as may_step:
                    if may_step:
                        self._queue.advance()
                    parts = [part for _, part in new_parts(news)]
                num_open -= sum(part.finish_reason is not None for part in parts)
                yield from parts
        finally:
            self._queue.drop(groups)
