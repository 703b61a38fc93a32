"""The caller's torch state changes no output, and is the caller's again after each call."""

from __future__ import annotations

import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.torch_state import Pending, TorchState
from llm import LLM, SamplingParams
from utils.errors import LogitsError

State = Callable[[], AbstractContextManager[Any]]


class _Wrong(TorchFunctionMode):
    """Doubles what torch's functions return."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if isinstance(out, Tensor) and out.is_floating_point() else out


class _WrongKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out + 1 if isinstance(out, Tensor) and out.is_floating_point() else out


@contextmanager
def _set(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """Set a value; at the end it has to be there still."""
    before = read()
    write(value)
    try:
        yield
        assert read() == value
    finally:
        write(before)


def _attribute(owner: Any, name: str, value: Any) -> State:
    return partial(_set, partial(getattr, owner, name), partial(setattr, owner, name), value)


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device().type == device
    finally:
        torch.set_default_device(None)


@contextmanager
def _inside_grad() -> Iterator[None]:
    """As within a function that torch.func.grad differentiates."""
    from torch._C import _functorch

    _functorch._grad_increment_nesting()
    try:
        yield
    finally:
        _functorch._grad_decrement_nesting()


_BACKENDS: Any = torch.backends
_FLASH = (_BACKENDS.cuda.flash_sdp_enabled, _BACKENDS.cuda.enable_flash_sdp)
_DETERMINISTIC = (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode)
_PRECISION = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
_DTYPE = (torch.get_default_dtype, torch.set_default_dtype)
_MATMUL = _BACKENDS.cuda.matmul
STATES: dict[str, State] = {
    "device": partial(_default_device, "meta"),
    "device of a context": partial(torch.device, "cuda"),
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "float64": partial(_set, *_DTYPE, torch.float64),
    "bfloat16": partial(_set, *_DTYPE, torch.bfloat16),
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "anomaly": partial(torch.autograd.set_detect_anomaly, True),
    "deterministic": partial(_set, *_DETERMINISTIC, 2),
    "deterministic, warns": partial(_set, *_DETERMINISTIC, 1),
    "medium precision": partial(_set, *_PRECISION, "medium"),
    "tf32": _attribute(_MATMUL, "allow_tf32", True),
    "tf32 of all": _attribute(_BACKENDS, "fp32_precision", "tf32"),
    "reduction": _attribute(_MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "no oneDNN": _attribute(torch.backends.mkldnn, "enabled", False),
    "no flash": partial(_set, *_FLASH, False),
    "math": partial(sdpa_kernel, SDPBackend.MATH),
    "oneDNN quantizes": _attribute(torch.backends.quantized, "engine", "onednn"),
    "function mode": _Wrong,
    "dispatch mode": _WrongKernels,
    "fake tensors": FakeTensorMode,
    "func.grad": _inside_grad,
}
OPTIONS: dict[str, Any] = {"device": "cpu", "max_model_len": 128, "num_kvcache_blocks": 16}


def _halved(ids: list[int], logits: Tensor) -> Tensor:
    return logits * 0.5 + torch.arange(len(logits)).to(logits.dtype) * 1e-3


PROMPTS = [[5 + 7 * i % 300 for i in range(n)] for n in (3, 40, 17, 20)]
PARAMS = [
    SamplingParams(max_tokens=4, ignore_eos=True, **kind)
    for kind in (
        {"temperature": 0, "logprobs": 2},
        {"seed": 3, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "logprobs": 1},
        {"seed": 4, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "prompt_logprobs": 1},
        {"seed": 5, "logprobs": 0, "logits_processors": [_halved]},
    )
]
_KEYS = ("token_ids", "logprobs", "prompt_logprobs")


def _generated(llm: LLM) -> list[Any]:
    outs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [[out.get(key) for key in _KEYS] for out in outs]


def _stepped(llm: LLM, state: State) -> list[Any]:
    """Each step in the state, and nothing else in it."""
    ids = [llm.add_request(*one) for one in zip(PROMPTS, PARAMS, strict=True)]
    ended: dict[int, Any] = {}
    while llm.has_unfinished:
        with state():
            ended |= {out["request_id"]: out for out in llm.step()}
    return [[ended[one].get(key) for key in _KEYS] for one in ids]


@pytest.fixture(scope="module", params=[0, 1], ids=["same thread", "other thread"])
def llm(request: pytest.FixtureRequest, shipped: Path) -> Iterator[LLM]:
    with LLM(shipped, pipeline_depth=request.param, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(shipped: Path) -> list[Any]:
    with LLM(shipped, **OPTIONS) as llm:
        return _generated(llm)


@pytest.fixture(scope="module")
def plain(llm: LLM, shipped: Path) -> list[Any]:
    """What an engine of the same depth generates in torch's initial state.

    With depth 1 a request with logits processors sits out every second step. So products have other
    numbers of rows than with depth 0, and on a CPU their last bits differ.
    """
    with LLM(shipped, pipeline_depth=llm.config.pipeline_depth, **OPTIONS) as other:
        return _generated(other)


@pytest.mark.parametrize("name", STATES)
def test_generate_in_any_state(llm: LLM, plain: list[Any], name: str) -> None:
    with STATES[name]():
        outs = _generated(llm)
    assert outs == plain


@pytest.mark.parametrize("name", STATES)
def test_steps_in_any_state(llm: LLM, plain: list[Any], name: str) -> None:
    if llm.config.pipeline_depth and name in ("no flash", "math"):
        pytest.skip("a setting of the process must not change while a step runs (docs/options.md)")
    assert _stepped(llm, STATES[name]) == plain


@pytest.mark.parametrize("name", STATES)
def test_an_engine_made_in_any_state(shipped: Path, expected: list[Any], name: str) -> None:
    with STATES[name]():
        llm = LLM(shipped, **OPTIONS)
    with llm:
        assert _generated(llm) == expected


@pytest.mark.parametrize("name", STATES)
def test_a_failed_request_leaves_the_state(llm: LLM, plain: list[Any], name: str) -> None:
    def fails(ids: list[int], logits: Tensor) -> Tensor:
        raise ValueError("planted")

    params = SamplingParams(max_tokens=2, logits_processors=[fails])
    # The state's context checks at its end that the state is there still.
    with STATES[name](), pytest.raises(LogitsError, match="planted"):
        llm.generate(PROMPTS[0], params, use_tqdm=False, raise_errors=True)
    assert _generated(llm) == plain


def test_random_numbers_are_the_callers(shipped: Path, expected: list[Any]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with LLM(shipped, **OPTIONS) as llm:
        assert _generated(llm) == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def state() -> Iterator[TorchState]:
    state = TorchState()
    yield state
    state.close()


def test_a_function_runs_in_the_callers_thread_if_it_can(state: TorchState) -> None:
    here = threading.get_ident()
    for context in (nullcontext, torch.no_grad, torch.inference_mode, STATES["no flash"]):
        with context():
            assert state.run(threading.get_ident) == here
    with torch.device("meta"):
        assert state.run(threading.get_ident) != here
        assert state.run(lambda: state.run(lambda: torch.zeros(1)).device.type) == "cpu"


def test_settings_come_back_after_whatever_a_function_raises(state: TorchState) -> None:
    def leaves() -> None:
        assert _FLASH[0]()
        assert torch.is_inference_mode_enabled()
        raise SystemExit(3)

    for context in (nullcontext, partial(torch.device, "meta")):
        with STATES["no flash"](), context(), pytest.raises(SystemExit):
            state.run(leaves)


def test_an_interrupt_waits_for_the_function(state: TorchState) -> None:
    """Else the function would go on with the caller's settings."""
    seen: list[bool] = []

    def work() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.1)
        seen.append(_FLASH[0]())

    # A shell starts background jobs with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with STATES["no flash"](), torch.device("meta"), pytest.raises(KeyboardInterrupt):
            state.run(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [True]


@pytest.mark.parametrize("name", ["tf32", "tf32 of all", "medium precision"])
def test_precisions_come_back_as_they_were(state: TorchState, name: str) -> None:
    """A precision that is inherited stays inherited: the caller may change its origin."""
    read = torch._C._get_fp32_precision_getter
    pairs = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")]
    _MATMUL.fp32_precision = _BACKENDS.mkldnn.matmul.fp32_precision = "none"
    with STATES[name]():
        before = [read(*pair) for pair in pairs]
        assert {"ieee", "none"}.issuperset(state.run(lambda: [read(*p) for p in pairs[2:]]))
        assert [read(*pair) for pair in pairs] == before
        if name == "tf32 of all":
            _BACKENDS.fp32_precision = "ieee"
            assert read("cuda", "matmul") == "ieee"
            _BACKENDS.fp32_precision = "tf32"


def test_what_needs_other_settings_has_ended_when_it_is_started(state: TorchState) -> None:
    gate = threading.Event()
    started = state.submit(partial(gate.wait, 10))
    assert not started.done()
    gate.set()
    with STATES["no flash"]():
        assert state.submit(torch.backends.cuda.flash_sdp_enabled).done()
    assert started.result()


def test_a_function_is_freed_when_it_has_ended(state: TorchState) -> None:
    class Work:
        def __call__(self) -> int:
            return 5

    work = Work()
    freed = weakref.ref(work)
    assert state.submit(work).result() == 5
    del work
    deadline = time.monotonic() + 30
    while freed() is not None and time.monotonic() < deadline:
        time.sleep(1e-3)
    assert freed() is None


def test_a_closed_thread_takes_no_function(state: TorchState) -> None:
    state.close()
    with pytest.raises(RuntimeError, match="after close"):
        state.submit(lambda: 5)


def test_a_pending_result_is_the_value_or_the_exception() -> None:
    pending: Pending[int] = Pending()
    assert not pending.done()
    pending.run(lambda: 3)
    for ended in (pending, Pending.of(3)):
        assert ended.done()
        assert [ended.result(), ended.result()] == [3, 3]
    failed = Pending.failed(KeyError("x"))
    assert failed.done()
    for _ in range(2):
        with pytest.raises(KeyError):
            failed.result()


_CUDA = torch.backends.cuda
FOREIGN: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {
    "flash": (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp, False),
    "efficient": (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp, False),
    "math": (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp, False),
    "cudnn": (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp, False),
    "deterministic": (*_DETERMINISTIC, 1),
    **{
        name: (partial(getattr, _MATMUL, name), partial(setattr, _MATMUL, name), foreign)
        for name, foreign in (
            ("allow_bf16_reduced_precision_reduction", False),
            ("allow_fp16_reduced_precision_reduction", False),
            ("allow_fp16_accumulation", True),
        )
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_function_runs_with_the_settings_with_which_torch_starts(
    state: TorchState, name: str
) -> None:
    read, write, foreign = FOREIGN[name]
    initial = read()
    assert initial != foreign
    write(foreign)
    try:
        assert state.run(read) == initial
        assert state.submit(read).result() == initial
        assert read() == foreign
    finally:
        write(initial)


def test_inference_mode_has_no_code_that_ctrl_c_could_stop(
    state: TorchState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.inference_mode` is written in Python."""

    def used(*given: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(torch, "inference_mode", used)
    assert state.run(torch.is_inference_mode_enabled)
    assert state.submit(torch.is_inference_mode_enabled).result()
    assert not torch.is_inference_mode_enabled()
