"""The contract of a block manager: subclass BlockManagerContract and pytest does the rest."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from config import Config
from engine.scheduler import ContinuousScheduler
from engine.types import CacheKind, FullPages, KVGeometry
from tests.contracts.audit import AuditedBlocks
from tests.contracts.driver import MakeBlocks
from tests.contracts.scheduler import TogetherContract, run_machine
from tests.contracts.traces import Combination, shipped_policies


def audited(
    make_blocks: MakeBlocks,
    num_blocks: int,
    block_size: int,
    options: dict[str, Any],
    kind: CacheKind,
) -> AuditedBlocks:
    """A manager of so many blocks."""
    geometry = KVGeometry(1, 1, 1, block_size, num_blocks, dtype_bytes=4, kind=kind)
    return AuditedBlocks(make_blocks(Config(model="none", **options), geometry), kind)


class BlockManagerMachine(RuleBasedStateMachine):
    """Any order of calls that the contract allows; the audit compares each answer."""

    def __init__(
        self,
        make_blocks: MakeBlocks,
        options: dict[str, Any],
        kind: CacheKind,
        most_uncommitted: int | None,
    ) -> None:
        super().__init__()
        self.most_uncommitted = most_uncommitted
        self.make_blocks = make_blocks
        self.options = options
        self.kind = kind
        self.tokens: dict[int, list[int]] = {}
        self.past: list[list[int]] = []
        self.waiting: list[tuple[list[int], str]] = []
        self.next_id = 0

    @initialize(num_blocks=st.integers(1, 12), block_size=st.sampled_from([1, 2, 4]))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.blocks = audited(self.make_blocks, num_blocks, block_size, self.options, self.kind)

    @rule(
        words=st.lists(st.integers(0, 1), max_size=6),
        tail=st.lists(st.integers(0, 3), max_size=2),
        salt=st.sampled_from(["", "", "salt"]),
        computed=st.booleans(),
    )
    def begin(self, words: list[int], tail: list[int], salt: str, computed: bool) -> None:
        tokens = [word for word in words for _ in range(self.blocks.block_size)] + tail
        self._begin(tokens or [0], salt)
        if computed and self.tokens:
            self.commit(-1, 0)

    @precondition(lambda self: self.past or self.tokens)
    @rule(
        which=st.integers(0),
        num_blocks=st.sampled_from([1, 2, 99]),
        tail=st.lists(st.integers(0, 3), max_size=2),
    )
    def begin_again(self, which: int, num_blocks: int, tail: list[int]) -> None:
        known = [*self.past, *self.tokens.values()]
        end = num_blocks * self.blocks.block_size
        self._begin([*known[which % len(known)][:end], *tail], "")

    @precondition(lambda self: self.past or self.tokens)
    @rule(
        which=st.integers(0),
        end=st.integers(1, 30),
        tail=st.lists(st.integers(0, 3), max_size=2),
        salt=st.sampled_from(["", "", "salt"]),
    )
    def wait(self, which: int, end: int, tail: list[int], salt: str) -> None:
        known = [*self.past, *self.tokens.values()]
        self.waiting.append(([*known[which % len(known)][:end], *tail], salt))

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0), further=st.lists(st.integers(0, 3), max_size=3))
    def look(self, which: int, further: list[int]) -> None:
        """The audit compares with what a list that was never seen would get."""
        tokens, salt = self.waiting[which % len(self.waiting)]
        tokens += further
        self.blocks.pending(tokens, salt)
        self.blocks.fits(tokens, salt)

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0), admitted=st.booleans())
    def wait_no_more(self, which: int, admitted: bool) -> None:
        tokens, salt = self.waiting.pop(which % len(self.waiting))
        if admitted:
            self._begin(tokens, salt)
        else:
            self.blocks.abandon(tokens)

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0), generated=st.lists(st.integers(0, 3), min_size=1, max_size=9))
    def generate(self, which: int, generated: list[int]) -> None:
        request_id = self._pick(which)
        uncommitted = len(self.tokens[request_id]) - self.blocks.written[request_id]
        if self.most_uncommitted is not None and (
            uncommitted + len(generated) > self.most_uncommitted
        ):
            return
        if self.blocks.grow(request_id, len(self.tokens[request_id]) + len(generated) - 1):
            self.tokens[request_id] += generated

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0), short=st.sampled_from([0, 0, 1, 5]))
    def commit(self, which: int, short: int) -> None:
        request_id = self._pick(which)
        self.blocks.take_copies()
        tokens, written = self.tokens[request_id], self.blocks.written
        # The newest token may have no place yet.
        end = min(len(tokens) - short, len(self.blocks.table(request_id)) * self.blocks.block_size)
        written[request_id] = max(written[request_id], end)
        self.blocks.commit(request_id, tokens, written[request_id])

    @rule()
    def plan(self) -> None:
        self.blocks.take_copies()

    @rule(really=st.integers(0, 9))
    def reset(self, really: int) -> None:
        # Seldom: nothing is found for long after it.
        if really == 9:
            self.blocks.reset_prefix_cache()

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0))
    def release(self, which: int) -> None:
        request_id = self._pick(which)
        self.past.append(self.tokens.pop(request_id))
        self.blocks.release(request_id)

    def teardown(self) -> None:
        if hasattr(self, "blocks"):
            for request_id in self.tokens:
                self.blocks.release(request_id)
            self.blocks.check_idle()

    def _begin(self, tokens: list[int], salt: str) -> None:
        blocks, fits = self.blocks, self.blocks.fits(tokens, salt)
        # What is remembered of a list must not change what is found.
        afresh = blocks.inner.begin(self.next_id, [*tokens], salt)
        blocks.inner.release(self.next_id)
        assert blocks.begin(self.next_id, tokens, salt) == afresh
        if self.blocks.grow(self.next_id, len(tokens)):
            assert fits, f"fits({tokens}) is False, and there are enough blocks"
            self.tokens[self.next_id] = tokens
        else:
            self.blocks.release(self.next_id)
        self.next_id += 1

    def _pick(self, which: int) -> int:
        return [*self.tokens][which % len(self.tokens)]


class BlockManagerContract(TogetherContract):
    """What a block manager must do, alone and under a scheduler.

        class TestMyBlocks(BlockManagerContract):
            make_blocks = MyBlockManager

    Attributes:
        make_blocks: the class or a factory.
        make_scheduler: what it is driven by in the traces.
        kind: of the cache group whose blocks the manager has in the tests without a scheduler. With
            a scheduler, i.e. in traces, the manager has a group with full pages. In a trace with a
            second group, this group has a `CachingWindowManager` if `make_blocks` can cache
            prefixes with several groups. Otherwise the groups have `PagedBlockManager` and
            `WindowBlockManager`.
        most_uncommitted: how many of a request's tokens may be uncommitted when it gets more; None
            for any number.
    """

    make_blocks: ClassVar[Any]
    make_scheduler: ClassVar[Any] = ContinuousScheduler
    kind: ClassVar[CacheKind] = FullPages()
    most_uncommitted: ClassVar[int | None] = None

    def combinations(self, depth: int) -> list[Combination]:
        cls = type(self)
        policies = shipped_policies(cls.make_scheduler, cls.make_blocks)
        return [
            Combination(cls.make_scheduler, cls.make_blocks, depth, self.options, policies),
        ]

    def test_no_order_of_calls_breaks_a_rule(self) -> None:
        make, most = type(self).make_blocks, self.most_uncommitted
        machine = partial(BlockManagerMachine, make, self.options, self.kind, most)
        run_machine(machine, 5 * self.num_examples)

    def test_an_empty_cache_finds_nothing(self) -> None:
        blocks = self._blocks()
        assert blocks.begin(0, [*range(20)]) == 0
        blocks.release(0)
        blocks.check_idle()

    def test_a_prefix_is_found_again_but_not_its_last_token(self) -> None:
        blocks = self._caching()
        tokens = [*range(22)]
        self._serve(blocks, tokens)
        for length, found in [(22, 20), (21, 20), (20, 19), (19, 16), (5, 4), (4, 3), (3, 0)]:
            assert blocks.begin(1, tokens[:length]) == found
            assert len(blocks.take_copies()) == (found % 4 > 0)
            blocks.release(1)
        assert blocks.begin(1, [*tokens[:4], 77, *tokens[5:]]) == 4
        blocks.release(1)
        assert blocks.begin(1, tokens[4:]) == 0
        blocks.release(1)
        blocks.check_idle()

    def test_no_more_tokens_are_found_than_may_be(self) -> None:
        blocks = self._caching()
        tokens = [*range(22)]
        self._serve(blocks, tokens)
        for most in (*range(24), None):
            found = blocks.begin(1, tokens, "", most)
            assert found <= 20 if most is None else found <= most
            blocks.release(1)
        blocks.check_idle()

    def test_nothing_is_copied_for_a_request_that_was_released(self) -> None:
        blocks = self._caching()
        self._serve(blocks, [*range(8)])
        assert blocks.begin(1, [*range(8)]) == 7
        blocks.release(1)
        assert blocks.take_copies() == ()
        blocks.check_idle()

    def test_salts_do_not_share(self) -> None:
        blocks = self._caching()
        self._serve(blocks, [*range(20)])
        assert blocks.begin(1, [*range(20)], "salt") == 0

    def test_a_reset_forgets(self) -> None:
        blocks = self._caching()
        self._serve(blocks, [*range(20)])
        blocks.reset_prefix_cache()
        assert blocks.begin(1, [*range(20)]) == 0

    def _blocks(self) -> AuditedBlocks:
        make = type(self).make_blocks
        return audited(make, 8, 4, self.options, self.kind)

    def _caching(self) -> AuditedBlocks:
        blocks = self._blocks()
        if not blocks.caches_prefixes:
            pytest.skip("it caches no prefixes")
        return blocks

    @staticmethod
    def _serve(blocks: AuditedBlocks, tokens: list[int]) -> None:
        """The whole life of a request, with which it leaves its blocks behind."""
        blocks.begin(0, tokens)
        assert blocks.grow(0, len(tokens))
        blocks.written[0] = len(tokens)
        blocks.commit(0, tokens, len(tokens))
        blocks.release(0)
