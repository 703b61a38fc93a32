"""Outputs that are JSON of a given schema. The library llguidance finds the tokens that may follow.

llguidance is an extra of this package. It refuses what it does not support in a schema.
Source: https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampling_params import SamplingParams
from utils.checkpoint import Checkpoint
from utils.errors import RequestError
from utils.text import load_tokenizer

# What may stand between the parts of JSON: nothing, a space, or a new line and its indentation. A
# small model repeats spaces up to `max_tokens` if their number has no limit, which JSON allows.
_DEFAULTS = {"whitespace_pattern": r"( |\n[ \t]{0,16})?"}


@dataclass(frozen=True)
class JsonSchema:
    """A JSON schema, compiled for the tokenizer in the folder `path`. Makes logits processors.

    Raises a RequestError if the schema or the tokenizer cannot be used, or llguidance is missing.
    """

    text: str
    path: Path
    vocab_size: int  # number of logits, which may exceed the number of the tokenizer's tokens
    eos_token_ids: tuple[int, ...]
    _matcher: Any = field(init=False, repr=False, compare=False)  # llguidance's state at the start

    def __post_init__(self) -> None:
        try:
            from llguidance import LLMatcher

            found = version("llguidance")
        except ImportError as error:
            problem, fix = "llguidance is not installed", "Install it: pip install llguidance."
            raise RequestError("json_schema", self.text, problem, fix) from error
        if [int(part) for part in re.findall(r"\d+", found)[:2]] < [1, 8]:
            # Version 1.7 ignores `_DEFAULTS`.
            problem, fix = f"llguidance {found} is too old", "Install version 1.8 or later."
            raise RequestError("json_schema", self.text, problem, fix)
        try:
            tokenizer = _llguidance_tokenizer(self.path, self.vocab_size, self.eos_token_ids)
        except Exception as error:  # tokenizers may raise any error
            fix = "Use a checkpoint with a fast tokenizer and an end-of-sequence token."
            raise RequestError("json_schema", self.text, str(error), fix) from error
        grammar = LLMatcher.grammar_from_json_schema(self.text, defaults=_DEFAULTS)
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            problem = f"the schema cannot be used ({matcher.get_error().strip()})"
            raise RequestError("json_schema", self.text, problem, "Change the schema.")
        object.__setattr__(self, "_matcher", matcher)

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonSchema, (self.text, self.path, self.vocab_size, self.eos_token_ids)

    def for_request(self, prompt_token_ids: list[int], sample: int) -> JsonProcessor:
        """Return the logits processor of an output."""
        return JsonProcessor(self, len(prompt_token_ids))

    def matcher(self) -> Any:
        """Return an `llguidance.LLMatcher` that has consumed no token."""
        return self._matcher.deep_copy()


class JsonProcessor:
    """Logits processor that excludes all tokens after which no JSON of the schema can be reached.

    After the end of the JSON, only end-of-sequence tokens remain.
    """

    def __init__(self, schema: JsonSchema, num_prompt_tokens: int) -> None:
        self._made_from = schema, num_prompt_tokens
        self._matcher = schema.matcher()
        self._eos = list(schema.eos_token_ids)
        self._num_seen = num_prompt_tokens
        self._ended = False  # with `ignore_eos`, the output goes on after the end of the JSON

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonProcessor, self._made_from

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        new, self._num_seen = token_ids[self._num_seen :], len(token_ids)
        allowed = np.zeros(len(logits), dtype=np.uint8)
        self._ended = self._ended or not set(self._eos).isdisjoint(new)
        if not self._ended:
            if not self._matcher.consume_tokens(new):
                raise ValueError(self._matcher.get_error())
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, count=len(logits), bitorder="little")
        # The matcher knows one end-of-sequence token. All others are as good.
        allowed[self._eos] = self._ended or allowed[self._eos[0]]
        excluded = torch.from_numpy(allowed == 0).to(logits.device)
        return logits.masked_fill_(excluded, float("-inf"))


def with_json_schema(params: SamplingParams, checkpoint: Checkpoint) -> SamplingParams:
    """Return `params` with a last logits processor in place of the `json_schema`, if it has one."""
    if params.json_schema is None:
        return params
    vocab_size = int(checkpoint.hf_config.vocab_size)
    eos = tuple(sorted(checkpoint.eos_token_ids))
    schema = JsonSchema(str(params.json_schema), checkpoint.path, vocab_size, eos)
    return replace(params, json_schema=None, logits_processors=(*params.logits_processors, schema))


# Kept because it takes 0.3 s to make one for 49,152 tokens, also in every process of a rank.
@lru_cache(maxsize=1)
def _llguidance_tokenizer(path: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Any:
    from llguidance.hf import from_tokenizer

    if not eos_token_ids:
        raise ValueError("the checkpoint names no end-of-sequence token")
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer")
    size = max(vocab_size, len(tokenizer))
    return from_tokenizer(tokenizer, n_vocab=size, eos_token=eos_token_ids[0])
