"""Wires the parts from a Config and runs the step loop."""

from __future__ import annotations

from collections import deque

from config import Config
from engine.sequence import Sequence
from engine.types import BlockManager, ModelRunner, Scheduler, StepHandle, StepPlan, StepResult
from sampling_params import SamplingParams
from utils.checkpoint import Checkpoint, open_checkpoint, resolve
from utils.errors import (
    ConfigError,
    EngineClosedError,
    RequestError,
    RequestTooLongError,
    StepError,
)
from utils.registry import find_part

# Odd, so that the seeds of successive requests never repeat (it is 2^64 / golden ratio).
_SEED_STRIDE = 0x9E3779B97F4A7C15


class _FailedHandle(StepHandle):
    """A step that never started."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def result(self) -> StepResult:
        raise StepError(f"the step did not start: {self._error}") from self._error


class LLMEngine:
    """Scheduler, block manager and runner of one model, and the steps in flight.

    Args:
        config: the options; see `Config`.

    Attributes:
        config: the same with everything resolved.
        checkpoint: the opened model folder.
    """

    def __init__(self, config: Config) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(config.model)
        self.config = config = resolve(config, self.checkpoint)
        self.vocab_size = int(self.checkpoint.hf_config.vocab_size)
        make_scheduler = find_part("scheduler", config.scheduler, Scheduler, "engine")
        make_blocks = find_part("block_manager", config.block_manager, BlockManager, "memory")
        make_runner = find_part("model_runner", config.model_runner, ModelRunner, "engine")
        if config.enable_prefix_caching and not getattr(make_blocks, "caches_prefixes", True):
            raise ConfigError(
                "enable_prefix_caching",
                True,
                f"block_manager={config.block_manager!r} does not cache prefixes",
                "Leave it at None or choose another block_manager.",
            )
        self._runner: ModelRunner = make_runner(config, self.checkpoint)
        try:
            self._blocks: BlockManager = make_blocks(config, self._runner.kv_geometry)
            self._scheduler: Scheduler = make_scheduler(config, self._blocks)
        except BaseException:
            self._runner.close()
            raise
        self._pipeline: deque[tuple[StepPlan, StepHandle]] = deque()
        self._live: dict[int, Sequence] = {}
        self._next_request_id = 0
        self._closed = False

    @property
    def has_unfinished(self) -> bool:
        """Whether requests are waiting, running or in flight."""
        return bool(self._pipeline) or self._scheduler.has_unfinished

    def add_request(self, prompt_token_ids: list[int], params: SamplingParams) -> Sequence:
        """Check a request and queue it.

        Raises:
            RequestError: the prompt is empty or has a token id outside the vocabulary.
            RequestTooLongError: it exceeds max_model_len or the KV cache.
            EngineClosedError: after close().
        """
        self._check_open()
        total = self._checked_length(prompt_token_ids, params)
        request_id = self._next_request_id
        seed = params.seed
        if seed is None:
            seed = (self.config.seed + (request_id + 1) * _SEED_STRIDE) % 2**63
        seq = Sequence(
            request_id,
            prompt_token_ids,
            params,
            max_total_tokens=total,
            stop_token_ids=frozenset() if params.ignore_eos else self.checkpoint.eos_token_ids,
            seed=seed,
        )
        self._scheduler.add(seq)
        self._next_request_id += 1
        self._live[request_id] = seq
        return seq

    def step(self) -> tuple[StepPlan | None, list[Sequence]]:
        """Keep the pipeline full, then take in its oldest step.

        Returns:
            The step that was committed (None if there was nothing to do) and the requests that
            finished with it.

        Raises:
            StepError: the step failed; all unfinished requests were ended.
        """
        self._check_open()
        try:
            while len(self._pipeline) <= self._depth and (plan := self._scheduler.schedule()):
                self._launch(plan)
            if not self._pipeline:
                return self._nothing_planned()
            plan, handle = self._pipeline[0]
            result = handle.result()
            self._pipeline.popleft()
            finished = self._scheduler.commit(plan, result)
        except BaseException:
            self.abort_all()
            raise
        for seq in finished:
            del self._live[seq.request_id]
        return plan, finished

    def _launch(self, plan: StepPlan) -> None:
        try:
            handle = self._runner.execute(plan)
        except BaseException as error:
            # The scheduler counts the plan as in flight, so it has to come back.
            self._pipeline.append((plan, _FailedHandle(error)))
            raise
        self._pipeline.append((plan, handle))

    def _nothing_planned(self) -> tuple[None, list[Sequence]]:
        if self._scheduler.has_unfinished:
            raise StepError(
                f"{type(self._scheduler).__name__} planned nothing although requests are "
                "unfinished and nothing is in flight"
            )
        return None, []

    def abort(self, request_id: int) -> None:
        """End a request early; unknown and finished ones are passed over."""
        self._scheduler.abort(request_id)
        self._live.pop(request_id, None)

    def abort_all(self) -> None:
        """End every request and wait until nothing is in flight."""
        for request_id in list(self._live):
            self.abort(request_id)
        while self._pipeline:
            plan, handle = self._pipeline.popleft()
            try:
                result = handle.result()
            except Exception:
                self._scheduler.fail(plan)
            else:
                self._scheduler.commit(plan, result)

    def close(self) -> None:
        """End all requests and give the memory back; may be called twice."""
        if self._closed:
            return
        self.abort_all()
        self._closed = True
        self._runner.close()

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that a new request could take."""
        return self._blocks.num_free_blocks

    @property
    def _depth(self) -> int:
        return self.config.pipeline_depth or 0

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine was closed; construct a new one")

    def _checked_length(self, prompt: list[int], params: SamplingParams) -> int:
        """Most tokens the request may come to, prompt and output."""
        limit = self.config.max_model_len
        assert limit is not None
        if not prompt:
            raise RequestError("prompt", prompt, "is empty", "Give at least one token.")
        bad = [t for t in prompt if not isinstance(t, int) or not 0 <= t < self.vocab_size]
        if bad:
            raise RequestError(
                "prompt",
                bad[0],
                "is not a token id",
                f"Token ids are integers from 0 to {self.vocab_size - 1}.",
            )
        longest = limit - 1 if params.max_tokens is None else limit - params.max_tokens
        if len(prompt) > longest:
            raise RequestTooLongError(
                "prompt",
                f"{len(prompt)} tokens",
                f"with max_tokens={params.max_tokens} it exceeds max_model_len={limit}",
                "Shorten the prompt, lower max_tokens, or raise max_model_len.",
            )
        return limit if params.max_tokens is None else len(prompt) + params.max_tokens
