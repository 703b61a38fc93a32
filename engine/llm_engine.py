"""The engine makes a scheduler, a block manager and a runner from a Config, and runs steps."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from config import Config
from engine.checking.exactness import check_exact
from engine.checking.kv_sanitizer import SanitizedRunner
from engine.hidden_rows import no_states
from engine.parts import make_block_managers, make_runner, make_scheduler, resolve
from engine.processors import OwnProcessor, own_processors
from engine.request_checks import check_request
from engine.requests import Sequence
from engine.step import SeedKind, StepPlan
from engine.turns import Turns
from engine.types import BlockManager, EngineStats, ModelRunner, Scheduler, StepHandle
from memory.cache_groups import grouped
from sampling_params import SamplingParams
from utils.checkpoint import Checkpoint, open_checkpoint
from utils.errors import EngineClosedError, RequestError, StepError, shown
from utils.text_reader import TextReader

# Seeds that the engine derives for successive requests differ by this number, modulo 2^63. The
# number is 2^64 divided by the golden ratio, and odd. So a seed is repeated after 2^63 requests.
_SEED_STRIDE = 0x9E3779B97F4A7C15


class LLMEngine:
    """Runs one model. Owns the scheduler, the block manager, the runner and the steps in flight.

    Methods must not run at the same time, except `abort` and `drop`. If several threads use the
    engine, each call needs the turn, which `turns` hands out. `LLM` takes the turn for its callers.
    """

    turns: Turns  # hands out the turn to threads
    scheduler: Scheduler  # each `reset` makes a new scheduler and a new block manager
    blocks: BlockManager  # manages the blocks of all cache groups
    num_new_tokens: int  # number of all tokens that were sampled in the last committed step
    num_resets: int  # number of calls of `reset`, each of which ended all requests

    def __init__(self, config: Config) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(config.model)
        self._asked = config
        self.config = config = resolve(config, self.checkpoint)
        self._pipeline: deque[tuple[StepPlan, StepHandle]] = deque()
        self._live: dict[int, Sequence] = {}  # all unfinished requests, by request id
        self._read: dict[int, Sequence] = {}  # unfinished requests with a TextReader, by id
        self._slots: dict[int, int] = {}  # id of the last request that got a slot, by slot
        self._aborts: deque[int] = deque()
        names = ("steps", "finished_requests", "prompt_tokens", "output_tokens", "preemptions")
        self._totals = dict.fromkeys(names, 0)
        self._next_request_id = self.num_new_tokens = self.num_resets = 0
        self.new_texts: list[int] = []  # ids of requests whose text the last step has read
        self._closed = self._stale = False
        self._failure: BaseException | None = None  # why `_stale` is True
        self._dropped: deque[Sequence] = deque()
        self.turns = Turns(self._between_turns)
        self.runner: ModelRunner = make_runner(config, self.checkpoint)
        try:
            if config.kv_sanitizer:
                self.runner = SanitizedRunner(self.runner, config)
            self.reset()
            if config.check_exact and not self.runner.exact:
                check_exact(self)
        except BaseException:
            self.runner.close()
            raise

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs, or a step is in flight."""
        return bool(self._pipeline) or self.scheduler.has_unfinished

    def add_request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        text: TextReader | None = None,
        *,
        sample: int = 0,
    ) -> Sequence:
        """Check and queue a request for one output. A prompt with `n` outputs needs `n` requests.

        `sample` is the index of this output among the outputs of the prompt. `text` converts the
        output to text while the output grows, and finds the stop strings.

        Raises:
            RequestError: the prompt or a sampling parameter is invalid or unsupported.
            RequestTooLongError: the request is too long for max_model_len or for the KV cache.
            EngineClosedError: the engine is closed.
        """
        self.check_usable()
        vocab_size = int(self.checkpoint.hf_config.vocab_size)
        layers = self.runner.hidden_layers
        total = check_request(prompt_token_ids, params, self.config, vocab_size, layers)
        if params.stop and text is None:
            problem = "there is no tokenizer to find it"
            raise RequestError("stop", params.stop, problem, "Use stop_token_ids.")
        if params.json_schema is not None:
            problem, fix = "LLMEngine has no tokenizer to compile it for", "Use LLM."
            raise RequestError("json_schema", params.json_schema, problem, fix)
        if params.logits_processors:
            outside, sent = self.turns.outside, self.config.tensor_parallel_size > 1
            params = own_processors(params, prompt_token_ids, sample, outside, sent=sent)
        request_id = self._next_request_id
        seed = params.seed
        if seed is None:
            seed = (self.config.seed + (request_id + 1) * _SEED_STRIDE) % 2**63
        ends = frozenset() if params.ignore_eos else self.checkpoint.eos_token_ids
        seq = Sequence(
            request_id,
            prompt_token_ids,
            params,
            max_total_tokens=total,
            stop_token_ids=ends.union(params.stop_token_ids),
            seed=seed,
            seed_kind=SeedKind.DERIVED if params.seed is None else SeedKind.GIVEN,
            sample=sample,
        )
        seq.text, seq.added_at = text, self.runner.now()
        if params.hidden_states is not None:
            seq.hidden_states.append(no_states(self.checkpoint, self.config))
        self._next_request_id += 1
        with self._inside():
            self._live[request_id] = seq
            try:
                self.scheduler.add(seq)
            except BaseException:
                del self._live[request_id]
                raise
            if text is not None:
                self._read[request_id] = seq
        return seq

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Context manager that ends all requests added in its block if the block raises."""
        self.check_usable()
        first = self._next_request_id
        try:
            yield
        except BaseException:
            # Ctrl-C may have come before the caller stored what `add_request` returned.
            ids = range(first, self._next_request_id)
            self.drop([self._live[one] for one in ids if one in self._live])
            raise

    def step(self) -> tuple[StepPlan | None, list[Sequence]]:
        """End aborted requests, start steps, commit the oldest step in flight, find stop strings.

        Starts steps until `pipeline_depth` + 1 steps are in flight or the scheduler plans no step.
        Returns the plan of the committed step, or None if there was no step to commit. Also returns
        all requests that ended during this call. If `step` raises any exception, all requests end.
        New requests can be added after the exception, unless the exception is a StepError or
        WorkerDiedError and the runner has several ranks.

        Raises:
            StepError: a step failed in the runner, or the scheduler has requests but plans no step.
            WorkerDiedError: a rank's process has ended.
        """
        self.check_usable()
        depth = self.config.pipeline_depth or 0
        with self._inside():
            try:
                asked = [self._aborts.popleft() for _ in range(len(self._aborts))]
                ended = [seq for one in asked if (seq := self.scheduler.abort(one))]
                while len(self._pipeline) <= depth and (plan := self.scheduler.schedule()):
                    self._pipeline.append((plan, self.runner.execute(plan)))
                    self._slots.update((new.slot, new.request_id) for new in plan.new_requests)
                committed, finished = self._commit_oldest()
                ended += finished
                slots = committed.sampled_slots if committed and self._read else []
                ended += self._read_texts(ended, slots)
                # `_read_texts` has dropped the tokens after stop strings, so `stats` excludes them.
                self._forget(ended)
            except BaseException as error:
                self.reset("error", error)
                raise
        return committed, ended

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Context manager for code that changes the engine's state.

        If the code fails unexpectedly, `_stale` stays True, and `check_usable` calls `reset`.
        """
        before, self._stale = self._stale, True
        try:
            yield
            self._stale = before
        except RequestError:
            self._stale = before
            raise
        except BaseException as error:
            self._failure = error
            raise

    def _commit_oldest(self) -> tuple[StepPlan | None, list[Sequence]]:
        if not self._pipeline:
            if self.scheduler.has_unfinished:
                problem = "although requests are unfinished and nothing is in flight"
                raise StepError(f"{type(self.scheduler).__name__} planned nothing {problem}")
            return None, []
        plan, handle = self._pipeline[0]
        result = handle.result()
        finished = self.scheduler.commit(plan, result)
        self.num_new_tokens = sum(map(len, result.tokens))
        self._pipeline.popleft()
        self._totals["steps"] += 1
        return plan, finished

    def _read_texts(self, ended: list[Sequence], slots: list[int]) -> list[Sequence]:
        """Convert new tokens to text. End and return requests whose text has a stop string."""
        stopped: list[Sequence] = []
        ids = [seq.request_id for seq in ended] + [self._slots[slot] for slot in slots]
        self.new_texts = [one for one in dict.fromkeys(ids) if one in self._read]
        for request_id in self.new_texts:
            seq = self._read[request_id]
            start, is_ended = seq.num_prompt_tokens, seq.finish_reason is not None
            assert seq.text is not None
            if seq.text.read(seq.token_ids, start=start, ended=is_ended):
                if seq.finish_reason is None:
                    self.scheduler.abort(request_id)
                    seq.finish_reason = "stop"
                    stopped.append(seq)
                elif seq.finish_reason == "length":
                    seq.finish_reason = "stop"
                seq.keep_output(seq.text.num_tokens)
            if seq.finish_reason is not None:
                del self._read[request_id]
        return stopped

    def abort(self, request_id: int) -> None:
        """End a request at the next `step`. May be called from any thread at any time."""
        # Ignore an id that no request has yet: otherwise a later request with this id would end.
        if request_id < self._next_request_id:
            self._aborts.append(request_id)

    def drop(self, seqs: list[Sequence]) -> None:
        """End requests that the caller no longer wants, at once or when the present turn ends.

        May be called from any thread at any time: the garbage collector may call `drop` in the
        middle of another method.
        """
        if self.turns.is_foreign:
            return
        self._dropped.extend(seqs)
        with self.turns.attempt() as free:
            if free:
                self._end_dropped()

    def _between_turns(self) -> None:
        if self._dropped:
            # A step that fails here has ended all requests, whose threads see the error there.
            with suppress(Exception):
                self._end_dropped()

    def _end_dropped(self) -> None:
        dropped = list(self._dropped)
        self._reset_if_stale()
        with self._inside():
            for seq in dropped:
                self._read.pop(seq.request_id, None)
                if self.scheduler.abort(seq.request_id):
                    self._forget([seq])
        for _ in dropped:
            self._dropped.popleft()
        self.finish_steps()

    def finish_steps(self) -> None:
        """If all requests have ended, commit the steps that are still in flight."""
        while self.has_unfinished and not self._live:
            self.step()

    def reset(self, reason: str = "abort", cause: BaseException | None = None) -> None:
        """End all requests, wait for steps in flight, make a new scheduler and block manager.

        The requests get the finish_reason `reason`, and a StepError if `cause` is given.
        """
        self.num_resets += 1
        with self._inside():
            # All requests end, so the results and errors of the steps in flight are ignored.
            while self._pipeline:
                with suppress(Exception):
                    self._pipeline[0][1].result()
                self._pipeline.popleft()
            for seq in self._live.values():
                if seq.finish_reason is None:
                    seq.finish_reason = reason
                    if cause is not None:
                        seq.error = StepError(f"the engine lost its state: {shown(cause)}")
                        seq.error.__cause__ = cause
            self._forget(list(self._live.values()))
            self._read.clear()
            groups = self.runner.kv_groups
            self.config, managers = make_block_managers(self._asked, self.config, groups)
            if isinstance(self.runner, SanitizedRunner):
                managers = self.runner.watch(managers)
            self.blocks = grouped(managers)
            self.scheduler = make_scheduler(self.config, self.blocks, self.runner.now)
        self._stale, self._failure = False, None

    def close(self) -> None:
        """End all requests and free the runner's memory. Do nothing if the engine is closed."""
        if self._closed:
            return
        try:
            if not sys.is_finalizing():  # when Python ends, nothing can be imported any more
                self.reset()
        finally:
            self._closed = True
            self.runner.close()

    @property
    def stats(self) -> EngineStats:
        """Counts of steps, requests, tokens and blocks."""
        return EngineStats(
            **self._totals,
            unfinished_requests=len(self._live),
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free_blocks,
            cache=self.blocks.stats,
        )

    def _forget(self, seqs: list[Sequence]) -> None:
        """Add ended requests to the totals that `stats` returns, and remove them from `_live`."""
        totals = self._totals
        for seq in seqs:
            del self._live[seq.request_id]
            for call in seq.sampling.logits_processors:
                if isinstance(call, OwnProcessor):
                    call.release()
            totals["finished_requests"] += 1
            totals["prompt_tokens"] += seq.num_prompt_tokens
            totals["output_tokens"] += len(seq.token_ids) - seq.num_prompt_tokens
            totals["preemptions"] += seq.num_preemptions

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache. Requests that are running now will add no blocks to the cache."""
        self.check_usable()
        with self._inside():
            self.blocks.reset_prefix_cache()

    def check_usable(self) -> None:
        """Raise EngineClosedError after `close`. Call `reset` after an unexpected failure."""
        if self._closed:
            raise EngineClosedError("the engine was closed; construct a new one")
        self._reset_if_stale()

    def _reset_if_stale(self) -> None:
        if self._stale:
            self.reset("error", self._failure or StepError("a call was interrupted"))
