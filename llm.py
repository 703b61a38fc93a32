"""The user's entry: `from llm import LLM`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from config import Config
from engine.llm_engine import LLMEngine
from engine.sequence import Sequence
from engine.types import CacheStats
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
            included), `finish_reason` ("stop" or "length") and `prompt_token_ids`.

        Raises:
            RequestError: a prompt or its parameters cannot be served; then nothing was started.
            StepError: the device failed.
            EngineClosedError: after close().
        """
        if self._closed:
            raise EngineClosedError("generate() after close(); construct a new LLM")
        token_lists = self._tokenized(prompts)
        params = self._params_per_prompt(sampling_params, len(token_lists))
        seqs: list[Sequence] = []
        try:
            for tokens, one in zip(token_lists, params, strict=True):
                seqs.append(self._engine.add_request(tokens, one))
            self._run(seqs, use_tqdm)
        except RequestError:
            for seq in seqs:
                self._engine.abort(seq.request_id)
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
        with Progress(len(seqs), enabled=use_tqdm) as progress:
            while any_left(seqs):
                plan, finished = self._engine.step()
                progress.update(plan, len(finished))
        # Requests that ended by a stop token may have a last step in flight.
        while self._engine.has_unfinished:
            self._engine.step()

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


def any_left(seqs: list[Sequence]) -> bool:
    """Whether one of `seqs` has not finished."""
    return any(seq.finish_reason is None for seq in seqs)
