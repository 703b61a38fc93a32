"""Outputs that are JSON of a given schema. The library llguidance finds the tokens that may follow.

llguidance is an extra of this package. It refuses what it does not support in a schema.
Source: https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampling_params import SamplingParams
from utils.checkpoint import Checkpoint
from utils.errors import RequestError
from utils.prompts import load_tokenizer

# What may stand between the parts of JSON: nothing, a space, or a new line and its indentation. A
# small model repeats spaces up to `max_tokens` if their number has no limit, which JSON allows.
_DEFAULTS = {"whitespace_pattern": r"( |\n[ \t]{0,16})?"}


class JsonGrammars:
    """Compiles JSON schemas for the tokenizer of a checkpoint.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint.
        vocab_size: number of logits, which may exceed the number of the tokenizer's tokens.
        eos_token_ids: ids of the end-of-sequence tokens.
        path: folder of the tokenizer, from which the processes of ranks load it.
    """

    def __init__(
        self, tokenizer: Any | None, vocab_size: int, eos_token_ids: tuple[int, ...], path: Path
    ) -> None:
        self._tokenizer = tokenizer
        self.vocab_size, self.eos_token_ids, self.path = vocab_size, eos_token_ids, path

    @staticmethod
    def of(checkpoint: Checkpoint, tokenizer: Any | None, path: Path) -> JsonGrammars:
        """Return the grammars of a checkpoint and of the tokenizer in the folder `path`."""
        eos = tuple(sorted(checkpoint.eos_token_ids))
        return JsonGrammars(tokenizer, int(checkpoint.hf_config.vocab_size), eos, path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _grammars_of_rank, (self.vocab_size, self.eos_token_ids, self.path)

    def applied(self, params: SamplingParams) -> SamplingParams:
        """Return `params` with a last logits processor in place of `json_schema`, if it has one.

        Raises a RequestError if the schema or the tokenizer cannot be used, or llguidance is
        missing.
        """
        if params.json_schema is None:
            return params
        schema = JsonSchema(self, str(params.json_schema))
        try:
            matcher = schema.matcher()
            matcher.compute_bitmask()
            _check(matcher)  # no value fulfils the schema
        except Exception as error:  # tokenizers may raise any error, and so may llguidance
            found = _first_line(str(error) or repr(error))
            fix = "Change the schema. docs/structured-output.md says what is needed."
            raise RequestError(
                "json_schema", schema.text, f"it cannot be used: {found}", fix
            ) from error
        processors = (*params.logits_processors, schema)
        return replace(params, json_schema=None, logits_processors=processors)

    @cached_property
    def llguidance_tokenizer(self) -> Any:
        """The `llguidance.LLTokenizer`. It takes 19 ms to make one for 4,096 tokens."""
        try:
            from llguidance.hf import from_tokenizer

            found = version("llguidance")
        except ImportError as error:
            raise ValueError("llguidance is not installed (pip install llguidance)") from error
        # Version 1.7 ignores `_DEFAULTS`.
        if [int(part) for part in re.findall(r"\d+", found)[:2]] < [1, 8]:
            raise ValueError(f"llguidance {found} is too old; install 1.8 or later")
        if self._tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer")
        if not self.eos_token_ids:
            raise ValueError("the checkpoint names no end-of-sequence token")
        size = max(self.vocab_size, len(self._tokenizer))
        return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self.eos_token_ids[0])


# The process of a rank has one checkpoint, so it keeps one.
@lru_cache(maxsize=1)
def _grammars_of_rank(vocab_size: int, eos_token_ids: tuple[int, ...], path: Path) -> JsonGrammars:
    return JsonGrammars(load_tokenizer(path), vocab_size, eos_token_ids, path)


@dataclass(frozen=True)
class JsonSchema:
    """A JSON schema, as JSON text. Makes logits processors."""

    grammars: JsonGrammars
    text: str

    def for_request(self, prompt_token_ids: list[int], sample: int) -> JsonProcessor:
        """Return the logits processor of an output."""
        return JsonProcessor(self, len(prompt_token_ids))

    def matcher(self) -> Any:
        """Return a new `llguidance.LLMatcher`. Raises a ValueError if the schema cannot be used.

        Copies of a matcher share a budget of states. So each output has a new matcher, which takes
        0.25 ms for a schema of three properties: no output depends on the others.
        """
        tokenizer = self.grammars.llguidance_tokenizer
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(self.text, defaults=_DEFAULTS)
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        _check(matcher)
        return matcher


class JsonProcessor:
    """Logits processor that excludes all tokens after which no JSON of the schema can be reached.

    After the end of the JSON, only end-of-sequence tokens remain.
    """

    def __init__(self, schema: JsonSchema, num_prompt_tokens: int) -> None:
        self._made_from = schema, num_prompt_tokens
        self._matcher = schema.matcher()
        self._eos = list(schema.grammars.eos_token_ids)
        self._num_seen = num_prompt_tokens
        self._ended = False  # with `ignore_eos`, the output goes on after the end of the JSON

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonProcessor, self._made_from

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        new, self._num_seen = token_ids[self._num_seen :], len(token_ids)
        allowed = np.zeros(len(logits), dtype=np.uint8)
        self._ended = self._ended or not set(self._eos).isdisjoint(new)
        if not self._ended:
            self._matcher.consume_tokens(new)
            _check(self._matcher)
            mask = self._matcher.compute_bitmask()
            # After an error the mask is that of the end.
            _check(self._matcher)
            bits = np.frombuffer(mask, dtype=np.uint8)
            allowed = np.unpackbits(bits, count=len(logits), bitorder="little")
        # The matcher knows one end-of-sequence token. All others are as good.
        allowed[self._eos] = self._ended or allowed[self._eos[0]]
        excluded = torch.from_numpy(allowed == 0).to(logits.device)
        return logits.masked_fill_(excluded, float("-inf"))


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise ValueError(f"llguidance: {_first_line(matcher.get_error())}")


def _first_line(text: str) -> str:
    # llguidance adds the whole grammar and its state to some errors.
    return text.strip().partition("\n")[0][:200]
