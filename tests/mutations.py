"""Plants bugs into a copy of the engine, one at a time, and sees whether the kit catches them.

python -m tests.mutations            all of them
python -m tests.mutations refcount   those whose name contains the word
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

from tests.edge_mutants import EDGE_MUTANTS
from tests.kernel_mutants import KERNEL_MUTANTS

ROOT = Path(__file__).parents[1]
_COPIED = ("benchmarks", "engine", "layers", "memory", "models", "tests", "utils")
# A bug that the kit cannot see in so many seconds counts as missed.
_TIMEOUT = 300
_BATCH, _SCHEDULER, _POLICIES = (
    "engine/running_batch.py",
    "engine/scheduler.py",
    "engine/policies.py",
)
_BLOCKS, _GROUPS = "memory/block_manager.py", "memory/cache_groups.py"
_RECORDS, _FAIR = "memory/prefix_records.py", "engine/fair_share.py"
_ADMISSION = "engine/admission.py"

# What is run on the copy: it has to fail.
_PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/contracts/test_shipped.py")
FUZZ = ("-m", "tests.contracts.fuzz", "--traces", "20000", "--jobs", "1", "--seed", "0")
STARVATION = (*_PYTEST, "-k", "starves")
MANAGERS = (*_PYTEST, "-k", "Manager")
RUNNERS = (*_PYTEST, "-k", "LocalRunner")
ATTENTION = (*_PYTEST[:-1], "tests/layers/attention/test_torch_sdpa.py")
BATCH = (*_PYTEST[:-1], "tests/engine/test_running_batch.py")
GROUPS = (*_PYTEST[:-1], "tests/memory/test_grouped_blocks.py")
SIMULATED = (*_PYTEST[:-1], "tests/engine/test_simulated_runner.py")
WAITING = (*_PYTEST[:-1], "tests/memory/test_waiting_prefixes.py")
POLICIES = (*_PYTEST[:-1], "tests/engine/test_policies.py")
GROWTH = (*_PYTEST[:-1], "tests/engine/test_scheduling_growth.py")
LEAKS = (*_PYTEST[:-1], "tests/engine/test_leaks.py")


@dataclass(frozen=True)
class Edit:
    """In `path`, the text `old`, of which there is one, becomes `new`."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A bug to plant.

    Attributes:
        command: arguments of Python that must fail with it.
    """

    name: str
    edits: tuple[Edit, ...]
    command: tuple[str, ...] = FUZZ


def _bug(name: str, path: str, old: str, new: str, command: tuple[str, ...] = FUZZ) -> Mutant:
    return Mutant(name, (Edit(path, old, new),), command)


MUTANTS: tuple[Mutant, ...] = (
    _bug(
        "late free skipped: a row that lands after its request's end releases nothing",
        _BATCH,
        "                if seq.num_in_flight == 0:\n                    self._release(seq)\n",
        "",
    ),
    _bug(
        "early free: a request that ends with a step in flight releases its blocks",
        _BATCH,
        "        if seq.num_in_flight == 0 and seq.slot is not None:",
        "        if seq.slot is not None:",
    ),
    _bug(
        "double free: an abort releases at once, and the row in flight again",
        _BATCH,
        "        if seq.num_in_flight == 0 and seq.slot is not None:",
        '        aborted = seq.finish_reason == "abort"\n'
        "        if (seq.num_in_flight == 0 or aborted) and seq.slot is not None:",
    ),
    _bug(
        "off by one in the blocks that a decode needs",
        _BATCH,
        "self.blocks.grow(seq.request_id, end)",
        "self.blocks.grow(seq.request_id, end - 1)",
    ),
    _bug(
        "off by one in the blocks that a table needs",
        "engine/types.py",
        "return -(-num_tokens // self.block_size) - len(",
        "return num_tokens // self.block_size - len(",
    ),
    _bug(
        "a failed grow keeps the blocks it got",
        _BLOCKS,
        "        if wanted > self.num_free_blocks:\n            return False\n",
        "        if wanted > self.num_free_blocks:\n"
        "            table += [self._take() for _ in range(self.num_free_blocks)]\n"
        "            return False\n",
    ),
    _bug(
        "published before it is computed: a prompt, on admission",
        _BATCH,
        "        self._grown[slot] = 0\n",
        "        self._grown[slot] = 0\n"
        "        self.blocks.commit(seq.request_id, seq.token_ids, len(seq.token_ids))\n",
    ),
    _bug(
        "published before it is computed: the token just sampled",
        _BATCH,
        "self.blocks.commit(seq.request_id, token_ids, committed)",
        "self.blocks.commit(seq.request_id, token_ids, len(token_ids))",
    ),
    Mutant(
        "hash without parent, and a hit is trusted without comparing the parent",
        (
            Edit(_BLOCKS, "xxh128_digest(parent.digest + tokens)", "xxh128_digest(tokens)"),
            Edit(_BLOCKS, "node.parent != sought.parent or ", ""),
        ),
    ),
    _bug(
        "an evicted block can still be found",
        _BLOCKS,
        "            node = self._idle.pop()\n            self.unlink(node)\n",
        "            node = self._idle.pop()\n",
    ),
    _bug(
        "refcount not raised on a hit",
        _BLOCKS,
        "            self._references[node.block] += 1\n",
        "            self._references[node.block] = 1\n",
    ),
    _bug(
        "a block that is found again stays among those to evict",
        _BLOCKS,
        "            if self._references[node.block] == 0:\n"
        "                self._idle.remove(node)\n            self._ref",
        "            self._ref",
    ),
    _bug(
        "the last token of a whole-prompt hit is not computed",
        _BLOCKS,
        "            return 1\n        hits.pop()\n",
        "            return 0\n        hits.pop()\n",
    ),
    _bug(
        "the last block of a whole-prompt hit is written by all that share it",
        _BLOCKS,
        "            table.append(self._take())\n"
        "            self._copies[request_id] = BlockCopy(source, table[-1])\n",
        "            table.append(source)\n",
    ),
    _bug(
        "copy dropped: a plan goes without it",
        _BATCH,
        "            self.blocks.take_copies(),\n",
        "            self.blocks.take_copies()[1:],\n",
    ),
    _bug(
        "copy dropped: only the manager forgets it",
        _BLOCKS,
        "        copies = tuple(self._copies.values())\n",
        "        copies = tuple(self._copies.values())[1:]\n",
    ),
    _bug(
        "wrong source: the first block of the prompt is copied",
        _BLOCKS,
        "BlockCopy(source, table[-1])",
        "BlockCopy((table[:-1] or [source])[0], table[-1])",
    ),
    Mutant(
        "the source of a copy is given up before the copy is planned",
        (
            Edit(
                _BLOCKS,
                "            self._copies[request_id] = BlockCopy(source, table[-1])\n",
                "            self._copies[request_id] = BlockCopy(source, table[-1])\n"
                "            self._drop(source)\n",
            ),
            Edit(_BLOCKS, "step.\n            self._drop(copy.source)\n", "\n            pass\n"),
            Edit(
                _BLOCKS,
                "            self._drop(copy.source)\n        super().release",
                "            pass\n        super().release",
            ),
        ),
    ),
    _bug(
        "a copy is made for who was released before it was planned",
        _BLOCKS,
        "        if copy := self._copies.pop(request_id, None):\n",
        "        if copy := self._copies.get(request_id):\n",
        MANAGERS,
    ),
    _bug(
        "the cache salt is ignored by the manager",
        _RECORDS,
        "parent = blocks[i - 1] if i else salt",
        'parent = blocks[i - 1] if i else ""',
    ),
    _bug(
        "the cache salt is not passed on by the scheduler",
        _BATCH,
        "return seq.token_ids, seq.cache_salt, *(",
        'return seq.token_ids, "", *(',
    ),
    _bug(
        "a waiting request keeps blocks that were evicted",
        _RECORDS,
        "        if match.num_lost != self.num_lost:\n",
        "        if not blocks:\n",
        WAITING,
    ),
    _bug(
        "a waiting request does not see what was published",
        _RECORDS,
        "if match.num_published == self.num_published else 0",
        "if blocks else 0",
        WAITING,
    ),
    _bug(
        "a waiting request is hashed in every step",
        _RECORDS,
        "        if match is None or match.salt != salt:\n",
        "        if match is not None or match is None:\n",
        WAITING,
    ),
    _bug(
        "a waiting request is given what another salt has found",
        _RECORDS,
        "        if match is None or match.salt != salt:\n",
        "        if match is None:\n",
        WAITING,
    ),
    _bug(
        "leak: the cache remembers requests that were aborted while they waited",
        _BATCH,
        "        self.blocks.abandon(seq.token_ids)\n",
        "",
        WAITING,
    ),
    _bug(
        "blocks that a waiting request would take out of the cache count as free",
        _BLOCKS,
        "return sum(self._references[node.block] == 0 for node in hits) <= left",
        "return True",
        WAITING,
    ),
    _bug(
        "a window does not see what was published",
        _RECORDS,
        "            if blocks[i].block < 0 and (node := find(blocks[i])):\n",
        "            if not i and (node := find(blocks[i])):\n",
        WAITING,
    ),
    _bug(
        "a window keeps blocks that were evicted",
        _GROUPS,
        "longest is None or any(node.block < 0 for node in self._read(blocks, longest)):",
        "longest is None:",
        WAITING,
    ),
    _bug(
        "lookahead takes prompts to be computed at once",
        _ADMISSION,
        "steps = -(-(length - 1) // rate) + max(1, end - length)",
        "steps = max(1, end - length)",
        (*POLICIES, "-k", "right_predictions"),
    ),
    _bug(
        "lookahead lets a request that decodes end a step too early",
        _ADMISSION,
        "seq.num_scheduled, end - seq.num_scheduled\n",
        "seq.num_scheduled, end - seq.num_scheduled - 1\n",
        (*POLICIES, "-k", "right_predictions"),
    ),
    _bug(
        "lookahead counts a request as it is at the beginning of a range of steps",
        _ADMISSION,
        "min(2 << i, new.steps + 1) - 2",
        "min(1 << i, new.steps) - 1",
        (*POLICIES, "-k", "step_by_step"),
    ),
    _bug(
        "lookahead forgets who joined in this step",
        _ADMISSION,
        "            self._courses.append(new)\n",
        "",
        (*POLICIES, "-k", "step_by_step"),
    ),
    _bug(
        "lookahead checks all ends for each request",
        _ADMISSION,
        "        if max(bounds) > most:\n            if self.num_checks >= self.max_checks:\n",
        "        if most > 0:\n            if self.num_checks < 0:\n",
        GROWTH,
    ),
    _bug(
        "reserve forgets who joined in this step",
        _ADMISSION,
        "lacking + most - there for",
        "lacking for",
        POLICIES,
    ),
    _bug(
        "policies are not told of a new step",
        _SCHEDULER,
        "        self._admission.begin_step(self.batch)\n",
        "",
        POLICIES,
    ),
    _bug(
        "a user who has had more than a share is forgotten at once",
        _FAIR,
        "            if self._counts and self.levels[idle] > self.fair_level:\n",
        "            if not idle:\n",
        GROWTH,
    ),
    _bug(
        "users are never forgotten while others have requests",
        _FAIR,
        "self.fair_level += len(seq.token_ids) / len(self._counts)",
        "self.fair_level += 0 / len(self._counts)",
        GROWTH,
    ),
    _bug(
        "an aborted request goes on waiting for a prefix",
        _SCHEDULER,
        "                del self.deferred[prefix][request_id]\n",
        "",
        (*_PYTEST[:-1], "tests/engine/test_shared_prefixes.py"),
    ),
    _bug(
        "who waits for a prefix is not told that it will not come",
        _SCHEDULER,
        "if leader is None or leader.num_committed",
        "if leader is not None and leader.num_committed",
    ),
    Mutant(
        "victim in flight: blocks run out, and no one waits for the step under way",
        (
            Edit(
                _SCHEDULER,
                "                if self.batch.num_in_flight:\n                    return None\n",
                "",
            ),
            Edit(
                _BATCH,
                'assert seq.num_in_flight == 0, "a request in flight cannot be preempted"',
                "pass",
            ),
        ),
    ),
    _bug(
        "stale table: a request that was preempted keeps the table it had",
        _BATCH,
        "        self._grown[slot] = 0\n",
        "        if not seq.num_preemptions:\n            self._grown[slot] = 0\n",
    ),
    _bug(
        "a preempted request forgets its output",
        _BATCH,
        "            tuple(seq.token_ids),\n",
        "            tuple(seq.token_ids[: seq.num_prompt_tokens]),\n",
    ),
    _bug(
        "lost block update: a new block is not sent",
        _BATCH,
        "        self._grown.setdefault(seq.slot, seq.capacity // self.blocks.block_size)\n",
        "",
    ),
    _bug(
        "lost block update: of several new blocks only the last is sent",
        _BATCH,
        "BlockUpdate(slot, first, tuple(table[first:]), group)",
        "BlockUpdate(slot, first, tuple(table[-1:]), group)",
    ),
    _bug(
        "budget overrun by a prompt",
        _SCHEDULER,
        "left -= self.batch.prefill(admitted, left)",
        "left -= self.batch.prefill(admitted, self.budget)",
    ),
    _bug(
        "budget overrun by decodes beside prompts",
        _SCHEDULER,
        "        if len(decodes) <= left:",
        "        if left >= 0:",
    ),
    _bug(
        "tokens attributed to the wrong slots",
        _BATCH,
        "plan.decode_counts, tokens, scores,",
        "plan.decode_counts, reversed([*tokens]), scores,",
    ),
    _bug(
        "one token too many in flight at a length limit",
        _BATCH,
        "return seq.num_scheduled + 1 < seq.max_total_tokens",
        "return seq.num_scheduled < seq.max_total_tokens",
    ),
    _bug(
        "late token: what was computed after the end is appended",
        _BATCH,
        "            if seq.finish_reason is not None:\n                # The request ended",
        '            if seq.finish_reason == "abort":\n                # The request ended',
    ),
    _bug(
        "a stop token does not stop",
        _BATCH,
        "if token in seq.stop_token_ids:",
        "if token == max(seq.stop_token_ids, default=-1):",
    ),
    _bug(
        "a request that can never fit is taken in",
        _BATCH,
        "if needed > (there := blocks.num_blocks):",
        "if needed > (there := blocks.num_blocks) + 1:",
    ),
    _bug(
        "an aborted request stays in a queue by key",
        _POLICIES,
        "        self.waiting.remove(seq)\n",
        "        pass\n",
    ),
    _bug(
        "an aborted request stays in the queue by arrival",
        _POLICIES,
        "        if not self._arrived.pop(seq.request_id, None):\n"
        "            self._back.remove(seq)\n",
        "        if self._back:\n            self._back.pop()\n        else:\n"
        "            self._arrived.popitem(last=False)\n",
    ),
    _bug(
        "has_unfinished forgets those that wait",
        _SCHEDULER,
        "return bool(self._waiting or self.batch.num_running)",
        "return bool(self.batch.num_running)",
    ),
    _bug(
        "starvation: prompts always come before decodes",
        _POLICIES,
        "return budget if gap < self.max_gap else budget - num_decodes",
        "return budget",
        STARVATION,
    ),
    _bug(
        "kept count off by one: what was drafted and not kept is committed",
        _BATCH,
        "committed = before + len(token_ids) - num_known\n",
        "committed = before + min(len(token_ids) - num_known + 1, num_planned)\n",
    ),
    _bug(
        "kept count off by one: the next row is taken to start one position early",
        _BATCH,
        "seq.num_scheduled -= before + num_planned - committed",
        "seq.num_scheduled -= before + num_planned - committed + 1",
    ),
    _bug(
        "kept count forgotten: the next row is taken to start where all would have been kept",
        _BATCH,
        "                seq.num_scheduled -= before + num_planned - committed\n",
        "",
    ),
    _bug(
        "kept count: a request that kept fewer is not decoded on",
        _BATCH,
        "seq.num_drafted -= num_planned - 1\n                if _goes_on(seq):\n",
        "seq.num_drafted -= num_planned - 1\n                if not seq:\n",
    ),
    _bug(
        "positions forgotten in the budget: every row drafts as many as it may",
        _SCHEDULER,
        "min(self.max_decode_tokens, left // len(seqs))",
        "self.max_decode_tokens",
    ),
    _bug(
        "block not reserved for drafts",
        _BATCH,
        "        if self.reserve(seq, wanted):\n            return wanted\n",
        "        if wanted:\n            return wanted\n",
    ),
    _bug(
        "blocks reserved for drafts from the earliest start alone",
        _BATCH,
        "        end = min(seq.num_scheduled + num_positions,",
        "        end = min(seq.num_scheduled - seq.num_drafted + num_positions,",
    ),
    _bug(
        "log-probabilities longer than tokens after a stop",
        _BATCH,
        "seq.logprobs += scores[: len(token_ids) - num_known]",
        "seq.logprobs += scores",
    ),
    _bug(
        "values longer than tokens after a stop",
        _BATCH,
        "seq.values += report.values[: max(len(token_ids) - num_known, 1)]",
        "seq.values += report.values",
    ),
    _bug(
        "a row that failed is committed like the others",
        _BATCH,
        '                self.finish(seq, "error")\n                continue\n',
        '                self.finish(seq, "error")\n                seq.finish_reason = None\n',
    ),
    _bug(
        "a prompt without output is sampled from",
        _BATCH,
        "samples = reaches_end and seq.num_prefill < seq.max_total_tokens",
        "samples = reaches_end",
    ),
    _bug(
        "a window slides by drafted positions",
        _BATCH,
        "self.blocks.commit(seq.request_id, token_ids, committed)",
        "self.blocks.commit(seq.request_id, token_ids, committed + seq.num_drafted)",
    ),
    _bug(
        "a window gives a block back that the next position reads",
        _GROUPS,
        "first_read = self._first_block(num_computed)",
        "first_read = self._first_block(num_computed + 1)",
    ),
    _bug(
        "a hit lacks a block of its window",
        _GROUPS,
        "                first_cached = i + 1\n",
        "                first_cached = i\n",
        GROUPS,
    ),
    _bug(
        "a prompt without room for all its tokens shares blocks",
        _GROUPS,
        "elif max(first_cached, need) <= first:",
        "elif first_cached <= first:",
        GROUPS,
    ),
    _bug(
        "a prompt publishes blocks that it will take again",
        _GROUPS,
        "        if self._has_room(request_id) and request.publishes and self._shares:\n",
        "        if request.publishes and self._shares:\n",
        GROUPS,
    ),
    _bug(
        "a block of a window is found after other tokens",
        _GROUPS,
        'xxhash.xxh128_hexdigest(parent.encode("utf-8", "surrogatepass") + tokens)',
        "xxhash.xxh128_hexdigest(tokens)",
        GROUPS,
    ),
    _bug(
        "groups do not agree on a hit",
        _GROUPS,
        "        while found != most:\n",
        "        for _ in range(1 if most else 0):\n",
        GROUPS,
    ),
    _bug(
        "a long prompt loses the blocks that have left its window",
        _GROUPS,
        "            if len(table) < self._num_places[request_id]:\n",
        "            if len(table) < self._num_places[request_id] - 1:\n",
        GROUPS,
    ),
    _bug(
        "a request with a window takes blocks for all its tokens",
        _GROUPS,
        "return max(least, min(most, self.num_blocks))",
        "return super().most_blocks(num_tokens)",
        GROUPS,
    ),
    _bug(
        "lost block update: blocks that moved to the end of a table are not sent",
        _BATCH,
        "                if seq.capacity < seq.num_prefill:\n",
        "                if seq.capacity < 0:\n",
        GROUPS,
    ),
    _bug(
        "a window is one position short",
        "engine/cache_kinds.py",
        "return max(0, position - self.window + 1)",
        "return max(0, position - self.window + 2)",
        GROUPS,
    ),
    _bug(
        "a window forgets which blocks it gave back",
        _GROUPS,
        "        del self._tables[request_id][: self._num_freed.pop(request_id)]\n",
        "        self._num_freed.pop(request_id)\n",
    ),
    _bug(
        "one group grows and another does not",
        _GROUPS,
        "> b.num_free_blocks for b in self.groups):",
        "> b.num_free_blocks for b in self.groups[:1]):",
    ),
    _bug(
        "policies see the group that has the most",
        _GROUPS,
        "return min(blocks.num_free_blocks for blocks in self.groups)",
        "return max(blocks.num_free_blocks for blocks in self.groups)",
        GROUPS,
    ),
    _bug(
        "of several groups one gets the blocks of the first",
        _BATCH,
        "                table = blocks.table(seq.request_id)\n",
        "                table = self.blocks.table(seq.request_id)\n",
    ),
    _bug(
        "wall clock read in the scheduler: at admission",
        _BATCH,
        "seq.admitted_at, seq.num_cached = self._clock(), cached",
        'seq.admitted_at, seq.num_cached = __import__("time").perf_counter(), cached',
        SIMULATED,
    ),
    _bug(
        "wall clock read in the scheduler: at commit",
        _BATCH,
        "self.blocks.block_size, result.ended_at\n",
        'self.blocks.block_size, __import__("time").perf_counter()\n',
        SIMULATED,
    ),
    _bug(
        "wall clock read by the engine: at arrival",
        "engine/llm_engine.py",
        "seq.text, seq.added_at = text, self.runner.now()",
        'seq.text, seq.added_at = text, __import__("time").perf_counter()',
        SIMULATED,
    ),
    _bug(
        "time to first token from admission",
        "engine/outputs.py",
        '"time_to_first_token": times[0] - added if times else None,',
        '"time_to_first_token": times[0] - (seq.admitted_at or 0) if times else None,',
        SIMULATED,
    ),
    _bug(
        "stats().preemptions never added",
        "engine/llm_engine.py",
        'totals["preemptions"] += seq.num_preemptions',
        'totals["preemptions"] += 0',
        SIMULATED,
    ),
    _bug(
        "admission right after a preemption",
        _SCHEDULER,
        "may_admit=not num_preemptions",
        "may_admit=True",
        (*_PYTEST[:-1], "tests/engine/test_scheduler.py"),
    ),
    _bug(
        "eviction by cost without ageing",
        "memory/eviction.py",
        "        self._floor, block = self.blocks.pop()\n",
        "        _, block = self.blocks.pop()\n",
        (*_PYTEST[:-1], "tests/memory/test_eviction.py"),
    ),
    _bug(
        "min_tokens after a preemption: counted from the output so far",
        "engine/changed_rows.py",
        "len(new.token_ids) - new.num_output_tokens + new.sampling.min_tokens",
        "len(new.token_ids) + new.sampling.min_tokens",
        (*_PYTEST[:-1], "tests/test_sampling.py", "-k", "min_tokens"),
    ),
    _bug(
        "min_tokens after a preemption: the output counts as prompt",
        _BATCH,
        "            len(seq.token_ids) - seq.num_prompt_tokens,\n            tuple(",
        "            0,\n            tuple(",
        (*_PYTEST[:-1], "tests/test_sampling.py", "-k", "min_tokens"),
    ),
    _bug(
        "keep_output as a no-op",
        "engine/requests.py",
        "        del self.token_ids[self.num_prompt_tokens + num_tokens :]\n"
        "        del self.token_times[num_tokens:]\n"
        "        del self.logprobs[num_tokens:]\n"
        "        del self.values[num_tokens:]\n",
        "        return\n",
        BATCH,
    ),
    _bug(
        "leak: the cache keeps what it knew of ended requests",
        _BLOCKS,
        "self._withdraw(self._requests.pop(request_id))",
        "self._withdraw(self._requests[request_id])",
        LEAKS,
    ),
    _bug(
        "leak: the policy of fair shares keeps what it charged",
        _FAIR,
        "self.charged.pop(seq.request_id)",
        "self.charged[seq.request_id]",
        LEAKS,
    ),
    _bug(
        "leak: the engine goes on reading the text of ended requests",
        "engine/llm_engine.py",
        "            if seq.finish_reason is not None:\n"
        "                del self._read[request_id]\n",
        "",
        LEAKS,
    ),
    Mutant(
        "leak: who asked for a request is remembered for ever",
        (
            Edit(
                "engine/prompt_queue.py",
                "self._prompts.pop(seq.request_id, None)",
                "self._prompts.get(seq.request_id)",
            ),
            # Or it would be seen at once: `step` would have something to return for ever.
            Edit("llm.py", "left = self._queue or self._ended", "left = self._ended"),
        ),
        LEAKS,
    ),
    _bug(
        "runner: a slot keeps the seed of its last request",
        "layers/step_rows.py",
        "    tables.seeds[slots] = header[3:].T\n",
        "",
        RUNNERS,
    ),
    _bug(
        "runner: sampled tokens are stored one position too early",
        "layers/step_rows.py",
        "    tables.tokens[sampled.slots, sampled.positions] = tokens",
        "    tables.tokens[sampled.slots, sampled.positions - 1] = tokens",
        RUNNERS,
    ),
    _bug(
        "runner: of all layers only the first is copied",
        "memory/kv_cache.py",
        "self.data[:, target] = self.data[:, source]",
        "self.data[:1, target] = self.data[:1, source]",
        RUNNERS,
    ),
    _bug(
        "runner: copies are made of the last one alone",
        "engine/model_runner.py",
        "for copy in plan.block_copies:",
        "for copy in plan.block_copies[-1:]:",
        RUNNERS,
    ),
    _bug(
        "attention: a query sees the position after its own",
        "layers/attention/sdpa_parts.py",
        "mask = others <= own",
        "mask = others <= own + 1",
        ATTENTION,
    ),
    _bug(
        "attention: a window of a prefill is one position too long",
        "layers/attention/sdpa_parts.py",
        "mask &= others > own - window",
        "mask &= others >= own - window",
        ATTENTION,
    ),
    _bug(
        "attention: a long decode pads all others",
        "layers/attention/sdpa_parts.py",
        "if not groups or padding > PADDING",
        "if not groups or padding > 1 << 60",
        ATTENTION,
    ),
    _bug(
        "attention: one call gathers the cache rows of all decodes",
        "layers/attention/sdpa_parts.py",
        "(len(groups[-1]) + 1) * longest > CACHE_ROWS",
        "longest > 1 << 60",
        ATTENTION,
    ),
    _bug(
        "attention: the mask of a chunk has all its rows",
        "layers/attention/sdpa_parts.py",
        "QUERY_ROWS = 256",
        "QUERY_ROWS = 1 << 20",
        ATTENTION,
    ),
    _bug(
        "attention: decodes of a group get the queries of others",
        "layers/attention/torch_sdpa.py",
        "self._decode_part(at + first, ",
        "self._decode_part(slice(first, first + len(at)), ",
        ATTENTION,
    ),
    _bug(
        "attention: a window of a decode is one position too short",
        "layers/attention/torch_sdpa.py",
        "begins = (lens - window).clamp(min=0)",
        "begins = (lens - window + 1).clamp(min=0)",
        ATTENTION,
    ),
    _bug(
        "attention: a decode does not see its own position",
        "layers/attention/torch_sdpa.py",
        "visible = self._columns[:longest] < lens",
        "visible = self._columns[:longest] < lens - 1",
        ATTENTION,
    ),
)

MUTANTS += tuple(
    Mutant(name, tuple(starmap(Edit, edits)), command)
    for name, edits, command in (*KERNEL_MUTANTS, *EDGE_MUTANTS)
)


def apply(edit: Edit, root: Path) -> str:
    """Make the edit below `root` and return the text there was.

    Raises:
        ValueError: the text to be replaced is not there exactly once: the list is out of date.
    """
    path = root / edit.path
    before = path.read_text()
    if before.count(edit.old) != 1:
        raise ValueError(f"{edit.path} has {before.count(edit.old)} times:\n{edit.old}")
    path.write_text(before.replace(edit.old, edit.new))
    return before


def copy_engine(target: Path) -> None:
    """The code without history and environments; assets by reference."""
    for name in _COPIED:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, target / path.name)
    (target / "assets").symlink_to(ROOT / "assets")


def fails(command: tuple[str, ...], root: Path) -> str | None:
    """The last words of a run that failed; None if it passed or took too long."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=root, capture_output=True, text=True, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return None
    lines = [
        line for line in done.stdout.splitlines() + done.stderr.splitlines() if "Error" in line
    ]
    return (lines or ["failed"])[0] if done.returncode else None


def try_mutant(mutant: Mutant) -> tuple[Mutant, str | None, float]:
    """What caught it, and after how many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_engine(root)
        for edit in mutant.edits:
            apply(edit, root)
        begin = time.monotonic()
        return mutant, fails(mutant.command, root), time.monotonic() - begin


def main() -> int:
    words = sys.argv[1:]
    mutants = [m for m in MUTANTS if all(word in m.name for word in words)]
    missed = 0
    with ThreadPoolExecutor(2) as threads:
        for mutant, caught, seconds in threads.map(try_mutant, mutants):
            missed += caught is None
            print(f"{'caught' if caught else 'MISSED'} {seconds:5.1f} s  {mutant.name}")
            if caught:
                print(f"{'':17}{caught.strip()[:110]}", flush=True)
    print(f"{len(mutants) - missed} of {len(mutants)} caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
