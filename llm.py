"""The user's entry: `from llm import LLM`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from config import Config
from engine.llm_engine import LLMEngine
from engine.sequence import Sequence
from engine.types import CacheStats, StepPlan
from sampling_params import SamplingParams
from utils.errors import EngineClosedError, RequestError
from utils.progress import Progress

__all__ = ["LLM", "SamplingParams"]

Prompt = str | list[int]


class LLM:
    """A model ready to generate.

        with LLM("path/to/Qwen3-0.6B") as llm:
            for out in llm.generate(["def add(a, b):"], SamplingParams(temperature=0)):
                print(out["text"])

    Args:
        model: checkpoint folder or hub name.
        options: any field of `Config`.

    Raises:
        ConfigError, CheckpointError, OutOfMemoryError: see `utils.errors`.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._closed = False
        self._engine = LLMEngine(Config.from_options(model, **options))
        # Requests of add_request: unfinished, and ended but not yet returned by step.
        self._added: dict[int, Sequence] = {}
        self._ended: list[Sequence] = []
        try:
            self._tokenizer = self._engine.checkpoint.load_tokenizer()
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
        prompts: Prompt | list[str] | list[list[int]] | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Continue every prompt.

        Args:
            prompts: texts, or lists of token ids, or a mixture; a single one counts as a list.
            sampling_params: for all prompts, or one per prompt; defaults if None.
            use_tqdm: show progress, with prefill and decode rates in tokens per second.

        Returns:
            One dictionary per prompt, in order: `text` (without special tokens; empty if the
            checkpoint has no tokenizer), `token_ids` (of the output, an end-of-sequence token
            included), `finish_reason` ("stop", "length" or "abort") and
            `prompt_token_ids`.

        Raises:
            RequestError: a prompt or its parameters cannot be served; then nothing was started.
            StepError: the device failed.
            EngineClosedError: after close().
        """
        self._check_open()
        token_lists = self._tokenized(prompts)
        params = self._params_per_prompt(sampling_params, len(token_lists))
        seqs: list[Sequence] = []
        try:
            for tokens, one in zip(token_lists, params, strict=True):
                seqs.append(self._engine.add_request(tokens, one))
            self._run(seqs, use_tqdm)
        except RequestError:
            self._engine.withdraw(seqs)
            raise
        except BaseException:
            self._engine.reset()
            raise
        return [self._output(seq) for seq in seqs]

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
        self._check_open()
        (params,) = self._params_per_prompt(sampling_params, 1)
        seq = self._engine.add_request(self._tokenize(prompt), params)
        self._added[seq.request_id] = seq
        return seq.request_id

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
        if not self._engine.has_unfinished:
            # What is left here was ended by an exception.
            self._ended += self._added.values()
            self._added.clear()
        ended, self._ended = self._ended, []
        return [{"request_id": seq.request_id, **self._output(seq)} for seq in ended]

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has something to do or to return."""
        return bool(self._added or self._ended) or self._engine.has_unfinished

    def abort(self, request_id: int) -> None:
        """End a request at the next step, with finish_reason "abort" and the tokens it has.

        May be called at any time and from any thread, while `generate` or `step` runs as well;
        unknown and finished requests are passed over.
        """
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

    def _run(self, seqs: list[Sequence], use_tqdm: bool) -> None:
        left = {seq.request_id for seq in seqs}
        with Progress(len(seqs), enabled=use_tqdm) as progress:
            while left and self._engine.has_unfinished:
                plan, finished = self._advance()
                before = len(left)
                left.difference_update(seq.request_id for seq in finished)
                progress.update(plan, before - len(left))
        # Requests that ended by a stop token may have a last step in flight.
        while not self._added and self._engine.has_unfinished:
            self._advance()

    def _advance(self) -> tuple[StepPlan | None, list[Sequence]]:
        plan, finished = self._engine.step()
        self._ended += [seq for seq in finished if self._added.pop(seq.request_id, None)]
        return plan, finished

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the LLM was closed; construct a new one")

    def _tokenized(
        self, prompts: Prompt | list[str] | list[list[int]] | list[Prompt]
    ) -> list[list[int]]:
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise RequestError(
                "prompts", prompts, "is no list of prompts", "Give a list of texts or token ids."
            )
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        return [self._tokenize(prompt) for prompt in prompts]  # type: ignore[arg-type]

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, (list, tuple)):
            return list(prompt)
        if not isinstance(prompt, str):
            raise RequestError(
                "prompt", prompt, "is neither text nor token ids", "Give a str or a list of int."
            )
        if self._tokenizer is None:
            raise RequestError(
                "prompt",
                prompt,
                "the checkpoint has no tokenizer",
                "Give token ids, or add the tokenizer's files to the folder.",
            )
        try:
            return list(self._tokenizer.encode(prompt))
        except (TypeError, ValueError) as error:
            raise RequestError(
                "prompt", prompt, f"the tokenizer refuses it ({error})", "Give valid Unicode."
            ) from error

    @staticmethod
    def _params_per_prompt(
        params: SamplingParams | list[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = SamplingParams()
        per_prompt = params if isinstance(params, list) else [params] * count
        if len(per_prompt) != count:
            raise RequestError(
                "sampling_params",
                f"{len(per_prompt)} of them",
                f"there are {count} prompts",
                "Give one SamplingParams for all prompts or one for each.",
            )
        for one in per_prompt:
            if not isinstance(one, SamplingParams):
                raise RequestError(
                    "sampling_params", one, "is no SamplingParams", "Construct a SamplingParams."
                )
        return per_prompt

    def _output(self, seq: Sequence) -> dict[str, Any]:
        tokens = seq.output_token_ids
        text = ""
        if self._tokenizer is not None:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return {
            "text": text,
            "token_ids": tokens,
            "finish_reason": seq.finish_reason,
            "prompt_token_ids": seq.token_ids[: seq.num_prompt_tokens],
        }
