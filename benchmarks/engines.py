"""One adapter per engine that bench.py can compare: the same requests by each engine's own API.

The adapters of vLLM, nano-vLLM and mini-sglang are written against the interfaces those projects
publish and are tested here against stand-ins alone: they need a GPU and packages of their own.
Nothing heavy is imported before an engine is constructed, so that its start-up can be timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.latency import Latency
from benchmarks.spans import Span
from benchmarks.tokenizer import with_tokenizer
from benchmarks.workloads import Workload

if TYPE_CHECKING:
    from benchmarks.recording import Recorder

Tokens = list[list[int]]

# Of the device, for engines that size their own KV cache: the default of all of them.
_MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Setting:
    """What every engine is given alike.

    Attributes:
        dtype, device: resolved names, e.g. "bfloat16" and "cuda".
        kv_bytes: for the KV cache; None leaves every engine 0.9 of the device's memory.
        threads: of torch on a CPU; None is torch's own choice.
        options: of this engine's Config, on top.
    """

    model: str
    dtype: str
    device: str
    max_model_len: int
    kv_bytes: int | None = None
    threads: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def llm_options(setting: Setting) -> dict[str, Any]:
    """The same in the words of `Config`, but for the model."""
    return {
        "dtype": setting.dtype,
        "device": setting.device,
        "max_model_len": setting.max_model_len,
        "kvcache_memory_bytes": setting.kv_bytes,
        "seed": setting.seed,
        **setting.options,
    }


@dataclass(frozen=True)
class Trace:
    """A run whose steps were watched; it is slower than one that is timed.

    Attributes:
        token_times: of each request, when its tokens were there, in seconds from the start.
        spans: phases of the steps, in seconds from the start.
    """

    token_times: list[list[float]]
    spans: list[Span]

    @property
    def first_tokens(self) -> list[float]:
        """Seconds to the first token of each request, rising; all came at the start."""
        return sorted(times[0] for times in self.token_times if times)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens that follow each other in a request, rising."""
        return sorted(b - a for times in self.token_times for a, b in pairwise(times))


class Engine(ABC):
    """An engine with a model loaded."""

    name: ClassVar[str]
    module: ClassVar[str]
    # Tokens that `generate` leaves out at the end of an output although they were computed.
    unreturned: ClassVar[int] = 0

    @abstractmethod
    def __init__(self, setting: Setting) -> None: ...

    @abstractmethod
    def generate(self, work: Workload) -> Tokens:
        """The output tokens of every request, all of them served at once."""

    def latencies(self) -> list[Latency] | None:
        """Of the last run's requests; None if the engine does not tell."""
        return None

    def trace(self, work: Workload) -> Trace | None:
        """Run with every step watched, and from then on so; None if it cannot be."""
        del work
        return None

    @classmethod
    def missing(cls) -> str | None:
        """What has to be installed first, if anything."""
        return None if importlib.util.find_spec(cls.module) else cls.module


class Ours(Engine):
    """This engine."""

    name = "ours"
    module = "torch"

    def __init__(self, setting: Setting) -> None:
        from llm import LLM

        self._options = llm_options(setting)
        self._model = setting.model
        self._llm = LLM(setting.model, **self._options)
        self._recorder: Recorder | None = None
        self._metrics: list[dict[str, Any]] = []

    def generate(self, work: Workload) -> Tokens:
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate(work.prompts, work.sampling_params(), use_tqdm=False)
        self._metrics = [out["metrics"] for out in outputs]
        return [out["token_ids"] for out in outputs]

    def latencies(self) -> list[Latency]:
        names = ("time_to_first_token", "p99_inter_token_time", "longest_inter_token_time")
        return [Latency(*(metrics[name] for name in names)) for metrics in self._metrics]

    def trace(self, work: Workload) -> Trace | None:
        from benchmarks.recording import Recorder, recorded_llm

        if self._recorder is None:
            self._llm.close()
            self._recorder = Recorder()
            self._llm = recorded_llm(self._model, self._recorder, **self._options)
        recorder = self._recorder
        self.generate(work)
        recorder.clear()
        start = recorder.now()
        self.generate(work)
        recorder.resolve()
        times = [[t - start for t in ts] for _, ts in sorted(recorder.token_times.items())]
        return Trace(times, [span.shifted(-start) for span in recorder.spans])


class Transformers(Engine):
    """`generate` of transformers, on the left-padded batch."""

    name = "transformers"
    module = "transformers"

    def __init__(self, setting: Setting) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(setting.seed)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            setting.model, dtype=getattr(torch, setting.dtype)
        )
        self._model = self._model.eval().to(setting.device)

    def generate(self, work: Workload) -> Tokens:
        return self._batch(work.prompts, work.lengths, work.temperature)

    def trace(self, work: Workload) -> Trace | None:
        steps: list[float] = []
        start = time.perf_counter()
        self._batch(work.prompts, work.lengths, work.temperature, steps)
        steps = [t - start for t in steps]
        spans = [
            Span(i, "step", begin, end) for i, (begin, end) in enumerate(pairwise([0.0, *steps]))
        ]
        return Trace([steps[:n] for n in work.lengths], spans)

    def _batch(
        self,
        prompts: list[list[int]],
        lengths: list[int],
        temperature: float,
        steps: list[float] | None = None,
        **options: Any,
    ) -> Tokens:
        """One call of `generate`; the time at the end of each step is added to `steps`."""
        import torch

        def note(ids: Any, scores: Any, **kwargs: Any) -> Any:
            del scores, kwargs
            assert steps is not None
            steps.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        width, longest, device = max(map(len, prompts)), max(lengths), self._model.device
        if temperature:
            options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        else:
            options |= {"do_sample": False}
        if steps is not None:
            options["stopping_criteria"] = [note]
        out = self._model.generate(
            torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device),
            attention_mask=torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
            ),
            min_new_tokens=longest,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        return [row[:n] for row, n in zip(out[:, width:].tolist(), lengths, strict=True)]


class Sequential(Transformers):
    """transformers, one request after the other and without a KV cache: the slowest baseline."""

    name = "sequential"

    def generate(self, work: Workload) -> Tokens:
        return [
            self._batch([prompt], [n], work.temperature, use_cache=False)[0]
            for prompt, n in zip(work.prompts, work.lengths, strict=True)
        ]

    def trace(self, work: Workload) -> Trace | None:
        times: list[list[float]] = []
        start = time.perf_counter()
        for prompt, n in zip(work.prompts, work.lengths, strict=True):
            steps: list[float] = []
            self._batch([prompt], [n], work.temperature, steps, use_cache=False)
            times.append([t - start for t in steps])
        flat = [0.0, *(t for steps in times for t in steps)]
        spans = [Span(i, "step", a, b) for i, (a, b) in enumerate(pairwise(flat))]
        return Trace(times, spans)


class VLLM(Engine):
    """vLLM's offline `LLM`, with token ids in and out (`TokensPrompt`, no detokenizing)."""

    name = "vllm"
    module = "vllm"

    def __init__(self, setting: Setting) -> None:
        self._vllm = importlib.import_module(self.module)
        budget: dict[str, Any] = {"gpu_memory_utilization": _MEMORY_SHARE}
        if setting.kv_bytes is not None:
            budget["kv_cache_memory_bytes"] = setting.kv_bytes
        self._llm = self._vllm.LLM(
            model=setting.model,
            dtype=setting.dtype,
            max_model_len=setting.max_model_len,
            seed=setting.seed,
            skip_tokenizer_init=True,
            **budget,
        )

    def generate(self, work: Workload) -> Tokens:
        params = [
            self._vllm.SamplingParams(
                temperature=work.temperature, max_tokens=n, ignore_eos=True, detokenize=False
            )
            for n in work.lengths
        ]
        prompts = [self._vllm.TokensPrompt(prompt_token_ids=p) for p in work.prompts]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outputs]


class NanoVLLM(Engine):
    """nano-vLLM. It takes the checkpoint's dtype and always sizes its own KV cache."""

    name = "nano-vllm"
    module = "nanovllm"
    # It refuses a temperature of 0; dividing logits by this is as good as greedy.
    _LOWEST_TEMPERATURE = 1e-5

    def __init__(self, setting: Setting) -> None:
        self._nanovllm = importlib.import_module(self.module)
        self._folder = tempfile.TemporaryDirectory()
        self._llm = self._nanovllm.LLM(
            with_tokenizer(Path(setting.model), Path(self._folder.name)),
            max_model_len=setting.max_model_len,
            gpu_memory_utilization=_MEMORY_SHARE,
        )

    def generate(self, work: Workload) -> Tokens:
        temperature = max(work.temperature, self._LOWEST_TEMPERATURE)
        params = [
            self._nanovllm.SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True)
            for n in work.lengths
        ]
        outputs = self._llm.generate(work.prompts, params, use_tqdm=False)
        return [list(out["token_ids"]) for out in outputs]


class MiniSGLang(Engine):
    """mini-sglang's offline `LLM`. It computes an output's last token without returning it."""

    name = "mini-sglang"
    module = "minisgl"
    unreturned = 1

    def __init__(self, setting: Setting) -> None:
        torch = importlib.import_module("torch")
        self._params = importlib.import_module("minisgl.core").SamplingParams
        self._folder = tempfile.TemporaryDirectory()
        options: dict[str, Any] = {"memory_ratio": _MEMORY_SHARE}
        if setting.kv_bytes is not None:
            options["num_page_override"] = setting.kv_bytes // _kv_bytes_per_token(setting)
        self._llm = importlib.import_module("minisgl.llm").LLM(
            with_tokenizer(Path(setting.model), Path(self._folder.name)),
            dtype=getattr(torch, setting.dtype),
            max_seq_len_override=setting.max_model_len,
            max_extend_tokens=16384,
            cuda_graph_max_bs=256,
            page_size=1,
            **options,
        )

    def generate(self, work: Workload) -> Tokens:
        params = [
            self._params(temperature=work.temperature, max_tokens=n, ignore_eos=True)
            for n in work.lengths
        ]
        return [list(out["token_ids"]) for out in self._llm.generate(work.prompts, params)]


ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (Ours, Transformers, Sequential, VLLM, NanoVLLM, MiniSGLang)
}


def _kv_bytes_per_token(setting: Setting) -> int:
    import torch
    import transformers

    from benchmarks.roofline import ModelCosts

    config = transformers.AutoConfig.from_pretrained(setting.model)
    return ModelCosts.of(config, getattr(torch, setting.dtype).itemsize).kv_bytes
