"""The table of parts, what None and "auto" stand for, and the parts that come of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from config import Config
from engine.checking.fake_runner import FakeRunner
from engine.llm_engine import LLMEngine
from engine.parts import (
    PART_KINDS,
    POLICIES,
    find,
    make_block_managers,
    make_scheduler,
    resolve,
)
from engine.policies import Policy
from engine.scheduler import ContinuousScheduler, StaticScheduler
from engine.types import CacheKind, FullPages, KVGeometry, WindowPages
from memory.block_manager import PagedBlockManager, PrefixCacheManager, RadixCacheManager
from memory.cache_groups import CachingWindowManager, WindowBlockManager
from memory.eviction import LFUPolicy, LRUPolicy
from sampling_params import SamplingParams
from tests.checkpoints import Checkpoints
from utils.checkpoint import Checkpoint
from utils.errors import ConfigError, ContractError
from utils.registry import PartKind

# Beside these "auto" and None are left to the runner: see `resolve`.
LEFT_TO_THE_RUNNER = {"attention_backend", "num_kvcache_blocks", "kvcache_memory_bytes"}


def _config(**options: Any) -> Config:
    return Config(model="x", **{"device": "cpu", "max_num_seqs": 4, **options})


def _checkpoint(limit: int = 8192) -> Checkpoint:
    hf_config = SimpleNamespace(dtype=torch.bfloat16, max_position_embeddings=limit)
    return Checkpoint(Path("somewhere"), hf_config, frozenset())


def _resolved(*, cuda: bool = False, limit: int = 8192, **options: Any) -> Config:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: cuda)
        return resolve(_config(**options), _checkpoint(limit))


def _group(kind: CacheKind | None = None) -> KVGeometry:
    return KVGeometry(2, 2, 64, 16, 8, 4, kind or FullPages())


@pytest.fixture(params=PART_KINDS)
def option(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class TestTable:
    def test_every_option_that_names_a_part_is_in_it(self) -> None:
        options = {field.name for field in fields(Config) if field.type == "PartSpec"}
        assert options == set(PART_KINDS)
        assert all(kind.option == option for option, kind in PART_KINDS.items())

    def test_policies_are_those_of_the_scheduler(self) -> None:
        assert set(POLICIES) == {
            name for name in PART_KINDS if issubclass(PART_KINDS[name].base, Policy)
        }

    def test_it_cannot_be_changed(self) -> None:
        with pytest.raises(TypeError):
            PART_KINDS["another"] = PartKind("another", "a:B", ())  # type: ignore[index]

    def test_a_default_is_auto_or_can_be_found(self, option: str) -> None:
        if getattr(Config, option) == "auto":
            assert PART_KINDS[option].auto
        else:
            assert find(option, _config()) is PART_KINDS[option].known()[getattr(Config, option)]

    def test_every_name_exists_and_is_the_parts_own(self, option: str) -> None:
        known = PART_KINDS[option].known()
        assert known
        assert set(PART_KINDS[option].auto) <= set(known)
        assert all(vars(part)["name"] == name for name, part in known.items())

    def test_every_name_is_in_one_package_only(self, option: str) -> None:
        kind = PART_KINDS[option]
        counts = [len(replace(kind, packages=(one,)).known()) for one in kind.packages]
        assert sum(counts) == len(kind.known())

    @pytest.mark.parametrize(
        ("value", "problem", "fix"),
        [
            ("no-such-part", "of that name in", "Known: "),
            ("nowhere.at.all:Part", "cannot be imported", "Check the module path"),
            (dict, "is no", "Subclass "),
            ("tests.custom_parts:NOT_A_PART", "cannot be constructed", "Name a class"),
        ],
    )
    def test_a_bad_choice_is_named_with_its_value_and_a_fix(
        self, option: str, value: Any, problem: str, fix: str
    ) -> None:
        with pytest.raises(ConfigError, match=problem) as caught:
            find(option, _config(**{option: value}))
        assert (caught.value.field, fix in caught.value.fix) == (option, True)
        named = 3 if value == "tests.custom_parts:NOT_A_PART" else value
        assert caught.value.value == named

    def test_schedulers_find_their_policies_without_torch(self) -> None:
        code = "import sys, engine.parts; assert not {'torch', 'transformers'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


class TestResolve:
    @pytest.mark.parametrize("cuda", [False, True])
    @pytest.mark.parametrize("size", [1, 2])
    def test_nothing_is_left_open_but_what_only_a_runner_knows(self, cuda: bool, size: int) -> None:
        config = _resolved(cuda=cuda, device="auto", tensor_parallel_size=size)
        values = {field.name: getattr(config, field.name) for field in fields(Config)}
        left = {name for name, value in values.items() if value is None or value == "auto"}
        assert left == LEFT_TO_THE_RUNNER | ({"enable_cuda_graphs"} if cuda else set())

    @pytest.mark.parametrize("cuda", [False, True])
    def test_what_is_resolved_stays_as_it_is(self, cuda: bool) -> None:
        config = _resolved(cuda=cuda, device="auto")
        options = {f.name: getattr(config, f.name) for f in fields(Config) if f.name != "model"}
        assert _resolved(cuda=cuda, **options) == config

    def test_on_a_cpu(self) -> None:
        config = _resolved(device="auto")
        assert (config.device, config.dtype, config.pipeline_depth) == ("cpu", "float32", 0)

    def test_on_cuda(self) -> None:
        config = _resolved(cuda=True, device="auto")
        assert (config.device, config.dtype, config.pipeline_depth) == ("cuda", "bfloat16", 1)

    def test_a_cpu_may_be_asked_for_beside_cuda(self) -> None:
        assert _resolved(cuda=True, device="cpu").dtype == "float32"

    def test_what_was_given_stays(self) -> None:
        config = _resolved(dtype="bfloat16", pipeline_depth=1, max_model_len=17)
        assert (config.dtype, config.pipeline_depth, config.max_model_len) == ("bfloat16", 1, 17)

    @pytest.mark.parametrize(("limit", "length"), [(1000, 1000), (4096, 4096), (32768, 4096)])
    def test_the_context(self, limit: int, length: int) -> None:
        assert _resolved(limit=limit).max_model_len == length

    def test_a_context_beyond_the_checkpoints_is_refused(self) -> None:
        assert _resolved(limit=1000, max_model_len=1000).max_model_len == 1000
        with pytest.raises(ConfigError, match="1000 positions"):
            _resolved(limit=1000, max_model_len=1001)

    def test_cuda_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no usable CUDA device"):
            _resolved(device="cuda")

    def test_graphs_without_cuda_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="enable_cuda_graphs"):
            _resolved(device="auto", enable_cuda_graphs=True)

    @pytest.mark.parametrize(
        ("size", "asked", "runner"),
        [
            (1, "local", "local"),
            (2, "local", "tensor_parallel"),
            (1, "tensor_parallel", "tensor_parallel"),
            (2, "fake", "fake"),
            (2, FakeRunner, FakeRunner),
        ],
    )
    def test_several_devices_have_another_runner(self, size: int, asked: Any, runner: Any) -> None:
        config = _resolved(tensor_parallel_size=size, model_runner=asked)
        assert config.model_runner == runner

    @pytest.mark.parametrize(
        ("asked", "wanted", "name", "caches"),
        [
            ("auto", None, "prefix", True),
            ("auto", True, "prefix", True),
            ("auto", False, "paged", False),
            ("radix", None, "radix", True),
            ("paged", None, "paged", False),
            (PagedBlockManager, None, PagedBlockManager, False),
        ],
    )
    def test_blocks(self, asked: Any, wanted: bool | None, name: Any, caches: bool) -> None:
        config = _resolved(block_manager=asked, enable_prefix_caching=wanted)
        assert (config.block_manager, config.enable_prefix_caching) == (name, caches)

    @pytest.mark.parametrize(
        ("options", "captures"),
        [
            ({}, None),
            ({"device": "cpu"}, False),
            ({"enforce_eager": True}, False),
            ({"enable_cuda_graphs": False}, False),
            ({"enable_cuda_graphs": True}, True),
        ],
    )
    def test_graphs(self, options: dict[str, Any], captures: bool | None) -> None:
        config = _resolved(cuda=True, **{"device": "cuda", **options})
        assert config.enable_cuda_graphs is captures

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"scheduler": "no-such-part"}, "scheduler"),
            ({"model_runner": "no-such-part"}, "model_runner"),
            ({"block_manager": "no-such-part"}, "block_manager"),
            ({"eviction_policy": "no-such-part"}, "eviction_policy"),
            ({"queue_policy": "no-such-part"}, "queue_policy"),
            ({"step_policy": "prefill_first", "scheduler": "static"}, "step_policy"),
            ({"eviction_policy": "lfu", "block_manager": "paged"}, "eviction_policy"),
            ({"enable_prefix_caching": False, "block_manager": "radix"}, "enable_prefix_caching"),
        ],
        ids=str,
    )
    def test_a_bad_choice_is_found_before_anything_is_loaded(
        self, options: dict[str, Any], field: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            _resolved(**options)
        assert (caught.value.field, caught.value.value) == (field, options[field])
        assert caught.value.fix


class TestBlockManagers:
    def _made(self, groups: tuple[KVGeometry, ...], **options: Any) -> tuple[Config, list[type]]:
        asked = _config(**options)
        config, managers = make_block_managers(asked, resolve(asked, _checkpoint()), groups)
        # The engine makes them anew after an exception.
        again = make_block_managers(asked, config, groups)
        assert (again[0], [type(one) for one in again[1]]) == (config, [type(m) for m in managers])
        return config, [type(manager) for manager in managers]

    def test_one_group(self) -> None:
        assert self._made((_group(),))[1] == [PrefixCacheManager]

    @pytest.mark.parametrize("kinds", [(WindowPages(32),), (FullPages(), WindowPages(32))], ids=str)
    @pytest.mark.parametrize("caching", [None, True, False])
    def test_windows(self, kinds: tuple[CacheKind, ...], caching: bool | None) -> None:
        groups = tuple(_group(kind) for kind in kinds)
        config, made = self._made(groups, enable_prefix_caching=caching)
        caches = caching is not False
        assert (config.block_manager, config.enable_prefix_caching) == (
            "prefix" if caches else "paged",
            caches,
        )
        of_windows = CachingWindowManager if caches else WindowBlockManager
        full = PrefixCacheManager if caches else PagedBlockManager
        windows = [isinstance(kind, WindowPages) for kind in kinds]
        assert made == [of_windows if window else full for window in windows]

    @pytest.mark.parametrize("caching", [True, False])
    def test_a_factory_with_windows(self, caching: bool) -> None:
        part = PrefixCacheManager if caching else PagedBlockManager
        for kinds in ((0, 32), (32, 0), (0, 0)):
            groups = tuple(_group(WindowPages(w) if w else FullPages()) for w in kinds)
            config, made = self._made(groups, block_manager=lambda *args: part(*args))
            assert config.enable_prefix_caching is caching
            of_windows = CachingWindowManager if caching else WindowBlockManager
            assert made == [of_windows if window else part for window in kinds]

    def test_what_a_factory_makes_tells_whether_prefixes_are_cached(self) -> None:
        for part in (PrefixCacheManager, PagedBlockManager):
            config, made = self._made((_group(),), block_manager=lambda *args, p=part: p(*args))
            assert made == [part]
            assert config.enable_prefix_caching is part.caches_prefixes

    def test_what_a_factory_makes_is_checked(self) -> None:
        with pytest.raises(ConfigError, match="does not cache prefixes"):
            self._made(
                (_group(),),
                block_manager=lambda *args: PagedBlockManager(*args),
                enable_prefix_caching=True,
            )
        with pytest.raises(ConfigError, match="no BlockManager"):
            self._made((_group(),), block_manager=lambda *args: None)


class _CachesAlone(PagedBlockManager):
    """Caches prefixes, it says, and cannot tell how long they are."""

    caches_prefixes = True


@pytest.mark.parametrize("kinds", [(0, 32), (32, 0), (0, 0)])
@pytest.mark.parametrize("is_class", [True, False])
def test_a_manager_that_cannot_agree_with_others_is_refused(
    kinds: tuple[int, ...], is_class: bool
) -> None:
    """Whichever group comes first."""
    part = _CachesAlone if is_class else lambda *args: _CachesAlone(*args)
    asked = _config(block_manager=part)
    groups = tuple(_group(WindowPages(window) if window else FullPages()) for window in kinds)
    with pytest.raises(ConfigError, match=r"block_manager=.*several cache groups"):
        make_block_managers(asked, resolve(asked, _checkpoint()), groups)


def test_a_runner_without_a_cache_group() -> None:
    asked = _config()
    with pytest.raises(ContractError, match="no cache group"):
        make_block_managers(asked, resolve(asked, _checkpoint()), ())


def test_a_scheduler_is_checked_when_a_factory_has_made_it() -> None:
    config = _config(scheduler=lambda *args: StaticScheduler(*args), step_policy="prefill_first")
    blocks = PagedBlockManager(config, _group())
    with pytest.raises(ConfigError, match="does not use it"):
        make_scheduler(config, blocks, time.perf_counter)
    made = make_scheduler(replace(config, step_policy="decode_first"), blocks, time.perf_counter)
    assert isinstance(made, StaticScheduler)


@contextmanager
def _engine(model: Path, **options: Any) -> Iterator[LLMEngine]:
    limits: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 64, "kvcache_block_size": 16}
    config = Config(
        model=str(model),
        device="cpu",
        num_kvcache_blocks=8,
        model_runner="fake",
        **limits,
        **options,
    )
    engine = LLMEngine(config)
    yield engine
    engine.close()


def test_engines_of_one_process_do_not_influence_each_other(checkpoints: Checkpoints) -> None:
    model = checkpoints["qwen2-square"]
    lfu: list[LFUPolicy] = []
    lru: list[LRUPolicy] = []

    def make_lfu(config: Config, geometry: KVGeometry) -> LFUPolicy:
        lfu.append(LFUPolicy(config, geometry))
        return lfu[-1]

    def make_lru(config: Config, geometry: KVGeometry) -> LRUPolicy:
        lru.append(LRUPolicy(config, geometry))
        return lru[-1]

    with (
        _engine(model, block_manager="radix", eviction_policy=make_lfu) as first,
        _engine(model, scheduler="static", block_manager="paged") as second,
        _engine(model, eviction_policy=make_lru) as third,
    ):
        engines = first, second, third
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        seqs = [engine.add_request(list(range(40)), params) for engine in engines]
        while any(engine.has_unfinished for engine in engines):
            for engine in engines:
                engine.step()
        assert len({tuple(seq.output_token_ids) for seq in seqs}) == 1
        for engine in engines:
            engine.reset()
        parts = [(type(engine.scheduler), type(engine.blocks)) for engine in engines]
        assert parts == [
            (ContinuousScheduler, RadixCacheManager),
            (StaticScheduler, PagedBlockManager),
            (ContinuousScheduler, PrefixCacheManager),
        ]
        # Each cache was made twice, the second time by `reset`.
        assert [type(one) for one in lfu] == [LFUPolicy] * 2
        assert [type(one) for one in lru] == [LRUPolicy] * 2
