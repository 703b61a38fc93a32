"""Rows whose logits are changed before their tokens are drawn.

The changes come in this order: `logit_bias`, penalties, then tokens that are forbidden
(`allowed_token_ids`, bad words, `min_tokens`), then logits processors. Of the R sampled rows of a
step, those with changed logits are divided into blocks of at most `BLOCK_ROWS` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device_state import Staging
from engine.types import NO_LIMIT, NewRequest
from layers.logits import Filters, Penalties, forbid, logit_bounds, penalize
from layers.sampler import Sampler
from layers.step_rows import SampledRows
from sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASES, LogitsProcessor
from utils.errors import LogitsError, shown

# Maximum number of rows in a block of rows with changed logits. For 64 rows of 151,936 bfloat16
# logits each, the logits, a float32 copy and the token counts for penalties take 97 MB together.
BLOCK_ROWS = 64
# Bytes that `penalize` takes at most for one token of a row: its id as int32 and int64, three
# float32 values of old and new logits, two float32 counts, and masks.
_TABLE_BYTES = 36


def table_width(num_tokens: int) -> int:
    """Return how many columns of the token table penalties read for `num_tokens` tokens.

    Widths are powers of two, so that a growing request changes the shapes of tensors rarely.
    """
    return max(256, 1 << (num_tokens - 1).bit_length())


def block_bytes(num_rows: int, vocab_size: int, dtype_bytes: int, max_model_len: int) -> int:
    """Return how many bytes a block needs: three copies of logits, two in float32, and tokens."""
    row = vocab_size * (dtype_bytes + 8) + min(table_width(max_model_len), max_model_len) * (
        _TABLE_BYTES
    )
    return min(num_rows, BLOCK_ROWS) * row


def options_bytes(vocab_size: int) -> int:
    """Return how many bytes of device memory the `OwnOptions` of one request take at most."""
    return vocab_size + 12 * MAX_BIASES + MAX_BAD_WORDS * (4 * MAX_BAD_WORD_TOKENS + 4)


@dataclass(frozen=True, slots=True)
class OwnOptions:
    """What one request asks to change in its logits. The tensors are uploaded when it gets a slot.

    Attributes:
        bias: ids of tokens, int64 [B], and what is added to their logits, float32 [B].
        disallowed: which tokens `allowed_token_ids` forbids, bool [vocabulary].
        withheld: ids of the W tokens that `min_tokens` forbids, int64 [W].
        words: of Q bad words the tokens before the last one, int32 [Q, M], and the last token,
            int64 [Q]. Words with fewer than M + 1 tokens have entries -1 on the left.
    """

    bias: tuple[Tensor, Tensor] | None
    disallowed: Tensor | None
    withheld: Tensor | None
    words: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(new: NewRequest, vocab_size: int, staging: Staging) -> OwnOptions:
        s, upload = new.sampling, staging.upload
        bias = disallowed = withheld = words = None
        if s.logit_bias:
            ids, values = zip(*s.logit_bias, strict=True)
            bias = upload(np.array(ids, np.int64)), upload(np.array(values, np.float32))
        if s.allowed_token_ids is not None:
            mask = np.ones(vocab_size, dtype=np.bool_)
            mask[list(s.allowed_token_ids)] = False
            disallowed = upload(mask)
        if new.withheld_token_ids:
            withheld = upload(np.array(new.withheld_token_ids, np.int64))
        if s.bad_words_ids:
            width = max(map(len, s.bad_words_ids))
            padded = [(-1,) * (width - len(ids)) + tuple(ids) for ids in s.bad_words_ids]
            both = np.array(padded, np.int32)
            before = np.ascontiguousarray(both[:, :-1])
            words = upload(before), upload(both[:, -1].astype(np.int64))
        return OwnOptions(bias, disallowed, withheld, words)


def changes(new: NewRequest, num_known: int) -> bool:
    """Return whether an option changes the logits for the token after `num_known` tokens."""
    s = new.sampling
    always = s.penalizes or s.logits_processors or s.logit_bias or s.bad_words_ids
    return bool(always or s.allowed_token_ids is not None) or withholds(new, num_known) > 0


def withholds(new: NewRequest, num_known: int) -> int:
    """Return for how many tokens after the first `num_known` ones `min_tokens` forbids tokens."""
    return first_free(new) - num_known if new.withheld_token_ids else 0


def first_free(new: NewRequest) -> int:
    """Return the first position at which `min_tokens` forbids no token."""
    return len(new.token_ids) - new.num_output_tokens + new.sampling.min_tokens


class Candidate(NamedTuple):
    """A sampled row that may belong to a block: its index, request, and the request's options.

    `num_known` is the number of tokens that the request has before the new one.
    """

    row: int
    new: NewRequest
    own: OwnOptions
    num_known: int


@dataclass(frozen=True, slots=True)
class ChangedRows:
    """A block of S sampled rows whose logits are changed before their tokens are drawn.

    In `bias`, `withheld` and `words` the first tensor says to which row each bias, each withheld
    token or each bad word belongs: it has the index of this row in the block.

    Attributes:
        rows: index of each row among the R sampled rows of the step, int64 [S].
        filters: whether any row of the block has filters.
        width: number of columns of the token table that penalties read; 0 without penalties.
        bias: index of the row, token and bias, each [B], or None.
        disallowed: indices in the block of rows with `allowed_token_ids`, int64 [A], and which
            tokens these forbid, bool [A, vocabulary], or None.
        withheld: index of the row, token, and first position at which the row may draw the token,
            each int64 [W], or None.
        words: index of the row, tokens before the last one, and last token, of Q bad words: int64
            [Q], int32 [Q, M] right-aligned after entries -1, int64 [Q]; or None.
        processors: index in the block, and processors, of each row with logits processors.
        lasts: for how many further steps the same block can be used, if no row leaves it.
    """

    rows: Tensor
    filters: bool
    width: int
    bias: tuple[Tensor, Tensor, Tensor] | None
    disallowed: tuple[Tensor, Tensor] | None
    withheld: tuple[Tensor, Tensor, Tensor] | None
    words: tuple[Tensor, Tensor, Tensor] | None
    processors: list[tuple[int, tuple[LogitsProcessor, ...]]]
    lasts: int

    @staticmethod
    def of(candidates: Sequence[Candidate], staging: Staging) -> ChangedRows:
        """Make a block of rows, and upload what is not on the device yet."""
        own = [one.own for one in candidates]
        options = [one.new.sampling for one in candidates]
        left = [withholds(one.new, one.num_known) for one in candidates]
        longest = max((c.num_known for c in candidates if c.new.sampling.penalizes), default=0)
        width = table_width(longest) if longest else 0
        biases = [(i, one.bias) for i, one in enumerate(own) if one.bias]
        words = [(i, one.words) for i, one in enumerate(own) if one.words]
        masks = [(i, one.disallowed) for i, one in enumerate(own) if one.disallowed is not None]
        held = [
            (i, ids)
            for i, one in enumerate(own)
            if (ids := one.withheld) is not None and left[i] > 0
        ]
        calls = [(i, tuple(s.logits_processors)) for i, s in enumerate(options)]
        return ChangedRows(
            rows=_int64(staging, [one.row for one in candidates]),
            filters=any(s.filters for s in options),
            width=width,
            bias=_joined(staging, biases) if biases else None,
            disallowed=_stacked(staging, masks) if masks else None,
            withheld=_withheld(staging, held, candidates) if held else None,
            words=_words(staging, words) if words else None,
            processors=[(i, some) for i, some in calls if some],
            lasts=min(
                [n - 1 for n in left if n > 0] + ([width - longest] if width else [NO_LIMIT])
            ),
        )

    def draw(
        self,
        sampler: Sampler,
        tokens: Tensor,
        logits: Tensor,
        sampled: SampledRows,
        parameters: Tensor,
    ) -> tuple[Tensor, dict[int, LogitsError]]:
        """Draw S tokens, int64 [S]. `logits`, `sampled`, `parameters` have all R sampled rows.

        Also returns the errors of logits processors, by the index of their row in the block. The
        tokens of these rows are `NO_TOKEN`.
        """
        own = sampled[self.rows]
        *filters, repetition, presence, frequency, num_prompt = parameters[:, self.rows]
        changed = logits.index_select(0, self.rows).float()
        if self.bias is not None:
            row, token, bias = self.bias
            changed[row, token] += bias
        if self.width:
            penalties = Penalties(repetition, presence, frequency)
            known = tokens[:, : self.width].index_select(0, own.slots)
            penalize(changed, known, num_prompt, own.positions, penalties)
        self._forbid(changed, tokens, own, num_prompt)
        errors: dict[int, LogitsError] = {}
        for i, calls in self.processors:
            ids = tokens[own.slots[i], : own.positions[i]].tolist()
            if error := _process(calls, ids, changed, i):
                errors[i] = error
        least = logit_bounds(changed, Filters(*filters)) if self.filters else None
        return sampler.whole(changed, own, least=least), errors

    def _forbid(
        self, changed: Tensor, tokens: Tensor, own: SampledRows, num_prompt: Tensor
    ) -> None:
        if self.disallowed is not None:
            row, mask = self.disallowed
            changed[row] = changed[row].masked_fill_(mask, float("-inf"))
        if self.withheld is not None:
            row, token, first = self.withheld
            forbid(changed, row, token, own.positions[row] < first)
        if self.words is not None:
            row, before, last = self.words
            back = torch.arange(before.shape[1], 0, -1, device=before.device)
            at = own.positions[row].unsqueeze(1) - back
            # A word is forbidden in the output: tokens of the prompt complete none.
            output = at >= num_prompt[row].unsqueeze(1)
            same = tokens[own.slots[row].unsqueeze(1), at.clamp(min=0)] == before
            forbid(changed, row, last, ((same & output) | (before < 0)).all(1))


def _joined(
    staging: Staging, parts: list[tuple[int, tuple[Tensor, Tensor]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index of each element's row, and the tensors of all rows, each joined to one."""
    rows = _repeated(staging, [i for i, _ in parts], [len(first) for _, (first, _) in parts])
    return rows, torch.cat([a for _, (a, _) in parts]), torch.cat([b for _, (_, b) in parts])


def _words(
    staging: Staging, words: list[tuple[int, tuple[Tensor, Tensor]]]
) -> tuple[Tensor, Tensor, Tensor]:
    width = max(before.shape[1] for _, (before, _) in words)
    # Bad words of several requests get the length of the longest.
    padded = [(i, (F.pad(b, (width - b.shape[1], 0), value=-1), last)) for i, (b, last) in words]
    return _joined(staging, padded)


def _stacked(staging: Staging, masks: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    return _int64(staging, [i for i, _ in masks]), torch.stack([mask for _, mask in masks])


def _withheld(
    staging: Staging, held: list[tuple[int, Tensor]], candidates: Sequence[Candidate]
) -> tuple[Tensor, Tensor, Tensor]:
    counts = [len(ids) for _, ids in held]
    rows = _repeated(staging, [i for i, _ in held], counts)
    firsts = _repeated(staging, [first_free(candidates[i].new) for i, _ in held], counts)
    return rows, torch.cat([ids for _, ids in held]), firsts


def _repeated(staging: Staging, values: list[int], counts: list[int]) -> Tensor:
    """Return each value as often as its count says, int64 [sum(counts)]."""
    each = _int64(staging, counts)
    # With `output_size` the host need not wait for the device.
    return _int64(staging, values).repeat_interleave(each, output_size=sum(counts))


def _int64(staging: Staging, values: list[int]) -> Tensor:
    return staging.upload(np.array(values, dtype=np.int64))


def _process(
    calls: tuple[LogitsProcessor, ...], token_ids: list[int], logits: Tensor, row: int
) -> LogitsError | None:
    """Let logits processors change a row of `logits`, float32 [rows, vocabulary].

    `token_ids` are the prompt and output tokens of the row's request. If a processor fails, the row
    is filled with NaN, and the error is returned.
    """
    shape = logits[row].shape
    try:
        for call in calls:
            # A copy begins at an aligned address. What torch computes from a tensor may depend on
            # the alignment, which in the block would depend on the row's place.
            out = call(list(token_ids), logits[row].clone())
            if not isinstance(out, Tensor) or out.shape != shape or out.is_complex():
                raise TypeError(f"it must return a real tensor of shape {tuple(shape)}")
            logits[row].copy_(out)  # fails for a tensor that is sparse or has no data
    except (Exception, SystemExit) as error:  # SystemExit would end the process of a rank
        logits[row] = float("nan")
        failed = LogitsError(f"logits processor {shown(call)} failed: {shown(error)}")
        failed.__cause__ = error
        return failed
    return None
