"""Bugs of what runs on a GPU, which tests without one have to catch; `tests.mutations` plants them.

They are plain data, since `tests.mutations` imports this module: the name, the edits (path, text
of which there is one, what it becomes), and the arguments of Python that must fail.
"""

from __future__ import annotations

Edits = tuple[tuple[str, str, str], ...]
PlainMutant = tuple[str, Edits, tuple[str, ...]]

_ROWS, _STORE = "layers/kernels/step_rows.py", "layers/kernels/rowwise.py"
_PARTS, _TILES = "layers/kernels/decode_parts.py", "layers/kernels/decode_tiles.py"
_DECODE, _PREFILL = "layers/kernels/paged_decode.py", "layers/kernels/paged_prefill.py"
_HANDLES, _STAGING = "engine/step_handles.py", "engine/device_state.py"
_SAMPLING, _SIZING = "engine/sampling_rows.py", "memory/sizing.py"
_SCORING, _CHANGED = "engine/step_scores.py", "engine/changed_rows.py"
_STATE, _GRAPHS = "engine/device_state.py", "engine/graphs.py"
_LOGITS, _BOUNDS = "layers/logits.py", "layers/kernels/logit_bounds.py"

_PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
ROWS = (*_PYTEST, "tests/kernels/test_step_rows.py")
WINDOWS = (*_PYTEST, "tests/kernels/test_paged_attention.py", "-k", "in_interpreter")
GRAPHS = (*_PYTEST, "tests/engine/test_graphs.py")
EXACT = (*_PYTEST, "tests/kernels/test_exact_decode.py")
LARGE_POOL = (*_PYTEST, "tests/kernels/test_large_pool.py")
STREAM = (*_PYTEST, "tests/engine/test_stream_steps.py")
STAGING = (*_PYTEST, "tests/engine/test_staging.py")
SAMPLING = (*_PYTEST, "tests/engine/test_sampling_rows.py")
COSTS = (*_PYTEST, "tests/engine/test_option_costs.py", "tests/engine/test_sampling_rows.py")
WORDS = (*_PYTEST, "tests/test_logit_options.py", "-k", "prompt")
PROMPTS = (*_PYTEST, "tests/test_prompt_logprobs.py", "-k", "start")
SIZING = (*_PYTEST, "tests/memory/test_sizing.py")
PEER = (*_PYTEST, "-m", "not slow", "tests/kernels/test_peer.py")
COLLECTIVES = (*_PYTEST, "tests/engine/test_collectives.py")
EXACT = (*_PYTEST, "tests/layers/test_exact_logits.py")
EXACT_KERNELS = (*_PYTEST, "-m", "not slow", "tests/kernels/test_exact_logits.py")


def _bug(name: str, path: str, old: str, new: str, command: tuple[str, ...]) -> PlainMutant:
    return name, ((path, old, new),), command


_PADDING: tuple[PlainMutant, ...] = (
    _bug(
        "padding: a captured step stores its keys and values in block 0",
        _ROWS,
        "tl.store(mappings_out[group] + first + at, tl.where(live, mapping, -1), mask=mask)",
        "tl.store(mappings_out[group] + first + at, tl.where(live, mapping, 0), mask=mask)",
        ROWS,
    ),
    _bug(
        "all cache groups store keys and values in the blocks of the first",
        _ROWS,
        "tl.load(tables_ptr[group] + entry",
        "tl.load(tables_ptr[0] + entry",
        ROWS,
    ),
    _bug(
        "a window of a decode is one token too long",
        _DECODE,
        "tokens >= until_row - WINDOW",
        "tokens >= until_row - WINDOW - 1",
        WINDOWS,
    ),
    _bug(
        "a window of a prefill is one token too long",
        _PREFILL,
        "(positions[:, None] - WINDOW < tokens[None, :])",
        "(positions[:, None] - WINDOW <= tokens[None, :])",
        WINDOWS,
    ),
    _bug(
        "decode attention loads what a window has left behind",
        _TILES,
        "        there = there & (tokens >= hidden)\n",
        "",
        WINDOWS,
    ),
    _bug(
        "prefill attention loads what a window has left behind",
        _PREFILL,
        "                there = there & (tokens >= first_seen)\n",
        "",
        WINDOWS,
    ),
    _bug(
        "padding: the kernel that stores takes it for the first row of the cache",
        _STORE,
        "    block = slot // block_size\n",
        "    slot = tl.maximum(slot, 0)\n    block = slot // block_size\n",
        ROWS,
    ),
    _bug(
        "padding: decodes of it are those of slot 0",
        _GRAPHS,
        "slots = np.full(size, self._padding, dtype=np.int64)",
        "slots = np.zeros(size, dtype=np.int64)",
        ROWS,
    ),
    _bug(
        "padding: chunks of it are those of slot 0",
        _STATE,
        "columns += [(padding, 0, 0, 0)] * (width - len(columns)) + [(padding, 0, left, 0)]",
        "columns += [(padding, 0, 0, 0)] * (width - len(columns)) + [(0, 0, left, 0)]",
        GRAPHS,
    ),
    _bug(
        "padding: attention reads a position of it",
        _ROWS,
        "tl.store(lens_out + request, tl.where(live, end, 0).to(tl.int32))",
        "tl.store(lens_out + request, end.to(tl.int32))",
        ROWS,
    ),
    _bug(
        "padding: its token is stored",
        _ROWS,
        "position, known, mask=live)",
        "position, known, mask=mask)",
        ROWS,
    ),
    _bug(
        "a captured decode step runs with the slots of the one before",
        _GRAPHS,
        "            if plan.decode != self._decode:\n",
        "            if len(plan.decode) != len(self._decode):\n",
        GRAPHS,
    ),
    _bug(
        "captured steps: what chunks sample is not next to the decodes",
        _STATE,
        "np.concatenate((np.flatnonzero(~samples), np.flatnonzero(samples)))",
        "np.concatenate((np.flatnonzero(samples), np.flatnonzero(~samples)))",
        GRAPHS,
    ),
    _bug(
        "captured steps: a chunk without a sample counts as one with",
        _GRAPHS,
        "num_chunks, states = sum(chunk.samples for chunk in plan.prefill), []",
        "num_chunks, states = len(plan.prefill), []",
        GRAPHS,
    ),
    _bug(
        "captured steps: a model that ignores where logits go is believed",
        _GRAPHS,
        "        if out is not None and made is not out:\n            out.copy_(made)\n",
        "",
        GRAPHS,
    ),
    _bug(
        "rows: of a decode's several rows all get the token of the last",
        _ROWS,
        "next_position = tl.where(drawn, end - behind + 1, 0)",
        "next_position = tl.where(drawn, end, 0)",
        ROWS,
    ),
    _bug(
        "rows: a state keeps the rows of its last decodes after a prefill",
        _STATE,
        "self._decode, self._decode_rows = plan.decode, None if plan.prefill else rows",
        "self._decode, self._decode_rows = plan.decode, rows",
        (*_PYTEST, "tests/engine/test_device_state.py"),
    ),
)

_OFFSETS: tuple[PlainMutant, ...] = (
    _bug(
        "int32 offsets: decode attention, all tiles",
        _TILES,
        "    return pages.to(tl.int64)\n",
        "    return pages\n",
        LARGE_POOL,
    ),
    _bug(
        "int32 offsets: prefill attention",
        _PREFILL,
        "row = ids.to(tl.int64) * page_stride",
        "row = ids * page_stride",
        LARGE_POOL,
    ),
    _bug(
        "int32 offsets: the store, of slots in int32",
        _STORE,
        "slot = tl.load(slots_ptr + token, mask=live, other=-1).to(tl.int64)",
        "slot = tl.load(slots_ptr + token, mask=live, other=-1)",
        LARGE_POOL,
    ),
    _bug(
        "int32 offsets: the store of keys",
        _STORE,
        "row = block * block_stride + offset * slot_stride + (head",
        "row = block.to(tl.int32) * block_stride + offset * slot_stride + (head",
        LARGE_POOL,
    ),
    _bug(
        "int32 offsets: the store of values",
        _STORE,
        "row = block * block_stride + offset * slot_stride + value",
        "row = block.to(tl.int32) * block_stride + offset * slot_stride + value",
        LARGE_POOL,
    ),
    _bug(
        "int32 offsets: rows of the cache",
        _ROWS,
        "mapping = block.to(tl.int64) * block_size",
        "mapping = block * block_size",
        ROWS,
    ),
)

_EXACT: tuple[PlainMutant, ...] = (
    _bug(
        "decode attention: parts are folded from the last to the first",
        _PARTS,
        "            split = start + i\n",
        "            split = begin + end - 1 - (start + i)\n",
        EXACT,
    ),
    _bug(
        "decode attention: a program stores the total of its splits instead of each",
        _DECODE,
        "                part = first_slot + split\n"
        "                store_part(work, part, acc, norm, top, rows, dims, PART_ROWS)\n",
        "                part = first_slot + split\n"
        "                store_part(work, part, t_acc, t_norm, t_top, rows, dims, PART_ROWS)\n",
        EXACT,
    ),
    _bug(
        "decode attention: the tokens before the newest one are not read again with it",
        _DECODE,
        "known = tl.maximum(num_tokens - 1, 0) // STEP * STEP",
        "known = tl.maximum(num_tokens - 1, 0)",
        EXACT,
    ),
    _bug(
        "decode attention: the number of slots is not looked at",
        _DECODE,
        "in_list) > capacity",
        "in_list) > capacity * 1000",
        EXACT,
    ),
)

_BUFFERS: tuple[PlainMutant, ...] = (
    _bug(
        "results: a runner's buffers are reused one step early",
        "engine/model_runner.py",
        "config.max_num_seqs, depth + 2)",
        "config.max_num_seqs, depth + 1)",
        STREAM,
    ),
    _bug(
        "results: there is one buffer less than promised",
        _HANDLES,
        "for _ in range(in_flight)",
        "for _ in range(max(1, in_flight - 1))",
        STREAM,
    ),
    _bug(
        "results: the last buffer never has its turn",
        _HANDLES,
        "self._turn = (self._turn + 1) % len(self._results)",
        "self._turn = (self._turn + 1) % max(1, len(self._results) - 1)",
        STREAM,
    ),
    _bug(
        "results: they are read without a wait",
        _HANDLES,
        "            self._done.synchronize()\n",
        "            pass\n",
        STREAM,
    ),
    (
        "results: a step is done before its tokens are copied",
        (
            (_HANDLES, "                done.record(self.stream)\n", ""),
            (
                _HANDLES,
                "                pinned.copy_(",
                "                done.record(self.stream)\n                pinned.copy_(",
            ),
        ),
        STREAM,
    ),
    _bug(
        "staging: a buffer is written again without a wait",
        _STAGING,
        "        self._read[self._turn].synchronize()\n",
        "",
        STAGING,
    ),
    _bug(
        "staging: the wait is for the wrong buffer",
        _STAGING,
        "        self._read[self._turn].synchronize()\n",
        "        self._read[self._turn - 1].synchronize()\n",
        STAGING,
    ),
    _bug(
        "staging: a group's end is not recorded",
        _STAGING,
        "            self._read[self._turn].record()\n",
        "            pass\n",
        STAGING,
    ),
    _bug(
        "staging: the arrays of a group overlap",
        _STAGING,
        "self._used += -(-size // 16) * 16",
        "self._used += size // 16 * 16",
        STAGING,
    ),
)

_SCORES: tuple[PlainMutant, ...] = (
    _bug(
        "scores: the request of a group that wants the fewest decides for all",
        _SCORING,
        "max(num_top.get(group, 0), count)",
        "min(num_top.get(group, count), count)",
        COSTS,
    ),
    _bug(
        "scores: all rows are one group",
        _SCORING,
        "    while most < num_top:\n        most *= 4\n",
        "",
        COSTS,
    ),
    _bug(
        "scores: the logits of all prompt rows exist at once",
        _SCORING,
        "PROMPT_ROWS = 256",
        "PROMPT_ROWS = 1 << 20",
        COSTS,
    ),
    _bug(
        "scores: prompt tokens before the start are scored",
        _SAMPLING,
        "first = max(chunk.start + 1, new.sampling.prompt_logprobs_start)",
        "first = chunk.start + 1",
        PROMPTS,
    ),
    _bug(
        "penalties: the rows of a block read the whole token table",
        _CHANGED,
        "tokens[:, : self.width].index_select",
        "tokens.index_select",
        COSTS,
    ),
    _bug(
        "penalties: a block keeps its width while its requests grow",
        _CHANGED,
        "[width - longest]",
        "[NO_LIMIT]",
        COSTS,
    ),
    _bug(
        "min_tokens: a row stays among the changed ones for ever",
        _CHANGED,
        "or withholds(new, num_known) > 0",
        "or bool(new.withheld_token_ids)",
        COSTS,
    ),
    _bug(
        "min_tokens: rows found once are used after the minimum",
        _CHANGED,
        "[n - 1 for n in left if n > 0]",
        "[n for n in left if n > 0]",
        COSTS,
    ),
    _bug(
        "bias: it is not added",
        _CHANGED,
        "            changed[row, token] += bias\n        if self.width:",
        "            pass\n        if self.width:",
        COSTS,
    ),
    _bug(
        "prompt_logprobs: a cached block may hold the token before the first one",
        "engine/requests.py",
        "limits.append(len(self.prompt_logprobs) - 1)",
        "limits.append(len(self.prompt_logprobs))",
        PROMPTS,
    ),
    _bug(
        "prompt_logprobs: of all blocks of several groups the cached ones are used",
        "memory/cache_groups.py",
        "if most is None else min(most, len(token_ids) - 1)",
        "if True else min(most, len(token_ids) - 1)",
        PROMPTS,
    ),
    _bug(
        "allowed_token_ids: the tokens of another request of the block",
        _CHANGED,
        "changed[row] = changed[row].masked_fill_(mask",
        "changed[row] = changed[row].masked_fill_(mask.flip(0)",
        COSTS,
    ),
    _bug(
        "bad words: tokens of the prompt complete a word",
        _CHANGED,
        "((same & output) | (before < 0)).all(1)",
        "(same | (before < 0)).all(1)",
        WORDS,
    ),
    _bug(
        "bad words: one that does not match allows what another one forbids",
        _LOGITS,
        'least, "amin")',
        'least, "amax", include_self=False)',
        COSTS,
    ),
    (
        "scores: of equally likely tokens the highest id comes first",
        (
            (_LOGITS, "(_MASK32 - tokens)", "tokens"),
            (_LOGITS, "_MASK32 - (keys & _MASK32)", "keys & _MASK32"),
        ),
        EXACT,
    ),
    _bug(
        "filters: the search adds weights in float32, in an order that follows the block",
        _BOUNDS,
        "(total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)",
        "(total.to(tl.float64) * top_p.to(tl.float64)).to(tl.float32)",
        EXACT_KERNELS,
    ),
    _bug(
        "scores: every request gets as many as the one that wants the most",
        _SCORING,
        "zip(ids[:num_top], values[:num_top], strict=True)",
        "zip(ids, values, strict=True)",
        COSTS,
    ),
)

_MEMORY: tuple[PlainMutant, ...] = (
    _bug(
        "memory: no margin is left",
        _SIZING,
        "usage.peak - _MARGIN_BYTES",
        "usage.peak",
        SIZING,
    ),
    _bug(
        "memory: the margin is a tenth",
        _SIZING,
        "_MARGIN_BYTES = 256 << 20",
        "_MARGIN_BYTES = 26 << 20",
        SIZING,
    ),
    _bug(
        "memory: of the steps only the largest is counted",
        _SIZING,
        "peak += torch.cuda.max_memory_reserved(device) - start",
        "peak = max(peak, torch.cuda.max_memory_reserved(device) - start)",
        SIZING,
    ),
    _bug(
        "memory: a step is not charged for what the one before left cached",
        _SIZING,
        "    for step in steps:\n        torch.cuda.empty_cache()\n",
        "    for step in steps:\n",
        SIZING,
    ),
    _bug(
        "memory: what steps take is not subtracted",
        _SIZING,
        "usage.weights - usage.peak - ",
        "usage.weights - ",
        SIZING,
    ),
    _bug(
        "memory: what others hold is given away",
        _SIZING,
        "allowed = min(int(utilization * usage.total), usage.free_before)",
        "allowed = int(utilization * usage.total)",
        SIZING,
    ),
)

_RANKS: tuple[PlainMutant, ...] = (
    _bug(
        "ranks: an exchange adds them in another order",
        "layers/kernels/peer.py",
        "for peer in tl.static_range(SIZE):",
        "for peer in tl.static_range(SIZE - 1, -1, -1):",
        PEER,
    ),
    _bug(
        "ranks: the residual is added before the sum is rounded",
        "layers/kernels/peer.py",
        "    return total.to(mine.dtype)\n",
        "    return total\n",
        PEER,
    ),
    _bug(
        "ranks: each adds its share of a large sum from itself on",
        "engine/ranks/collectives.py",
        "ordered_sum(parts, x.dtype)",
        "ordered_sum(parts.roll(-self.rank, 0), x.dtype)",
        COLLECTIVES,
    ),
    _bug(
        "ranks: zeros keep their sign where they are gathered",
        "layers/parallel.py",
        "total = parts[0].float() + 0.0",
        "total = parts[0].float().clone()",
        COLLECTIVES,
    ),
    _bug(
        "ranks: another rank's embedding is a product with zero",
        "layers/linear.py",
        "rows.masked_fill_(others.unsqueeze(-1), 0.0)",
        "rows * ~others.unsqueeze(-1)",
        (*_PYTEST, "tests/layers/test_embed_head.py"),
    ),
)

KERNEL_MUTANTS: tuple[PlainMutant, ...] = (
    *_PADDING,
    *_OFFSETS,
    *_EXACT,
    *_BUFFERS,
    *_SCORES,
    *_MEMORY,
    *_RANKS,
)
