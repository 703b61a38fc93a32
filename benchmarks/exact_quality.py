"""How far the engine's logits are from those of float32, beside transformers' own 16-bit logits.

All models read the same tokens (teacher forcing). After each token the engine's distribution of the
next one is compared with that of transformers in float32.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines import Setting, llm_options
from benchmarks.reference import Reference
from config import Config
from engine.model_runner import LocalRunner
from engine.ranks.collectives import local_rank
from engine.ranks.runner import TensorParallelRunner
from engine.ranks.worker import Rank
from engine.types import ModelRunner
from llm import LLM
from sampling_params import SamplingParams
from utils.checkpoint import open_checkpoint
from utils.prompts import load_tokenizer

Keep = Callable[[Tensor], object]

# As far from float32 as transformers' own 16-bit model may be, the engine may be by this factor.
_FACTOR = 1.1
_LENGTH = 1024
_ROWS = 128  # rows compared at once: in float64 those of a vocabulary of 151,936 take 156 MB
_BLOCK_SIZE = 256


@dataclass(frozen=True)
class Quality:
    """Means over all tokens, in nats.

    Attributes:
        kl, kl_16bit: KL(model || transformers in float32), of the engine and of transformers in
            16 bits. KL is the Kullback-Leibler divergence.
        nll, nll_16bit, nll_float32: negative log-likelihood of the tokens.
        error: standard error of the mean difference between `nll` and `nll_float32`.
    """

    dtype: str
    num_tokens: int
    kl: float
    kl_16bit: float
    nll: float
    nll_16bit: float
    nll_float32: float
    error: float

    def failures(self) -> list[str]:
        """What is too far from float32, in words."""
        found = []
        # Of NaN, no comparison is true.
        if not self.kl <= _FACTOR * self.kl_16bit:
            found.append(f"KL to float32 is {self.kl:.3g}, and transformers' {self.kl_16bit:.3g}")
        far, other = (abs(x - self.nll_float32) for x in (self.nll, self.nll_16bit))
        if not far <= max(_FACTOR * other, 2 * self.error):
            found.append(
                f"NLL is {far:.3g} from float32's, transformers' {other:.3g}, and two standard "
                f"errors are {2 * self.error:.3g}"
            )
        return found


def measure_quality(setting: Setting, num_tokens: int) -> Quality:
    """Compare the engine and transformers in 16 bits with transformers in float32."""
    dtype = "bfloat16" if setting.dtype == "float32" else setting.dtype
    with teacher_forced(setting) as logits_of:
        exact, rounded = (
            Reference(replace(setting, dtype=name)).model for name in ("float32", dtype)
        )
        found = [
            _compared(prompt, logits_of(prompt), exact, rounded)
            for prompt in teacher_prompts(setting, num_tokens)
        ]
    values = torch.cat(found, dim=1)
    kl, kl_16bit, nll, nll_16bit, nll_float32 = values.mean(1).tolist()
    differences = values[2] - values[4]
    error = float(differences.std()) / len(differences) ** 0.5
    return Quality(dtype, len(differences), kl, kl_16bit, nll, nll_16bit, nll_float32, error)


@contextmanager
def teacher_forced(setting: Setting) -> Iterator[Callable[[list[int]], Tensor]]:
    """A function that returns the engine's logits [n - 1, vocabulary] of a prompt of n tokens.

    Row i is computed after token i, in one step with all other rows. The request asks for
    log-probabilities of its prompt, so the engine computes and gathers the logits of all its
    tokens, block by block. They are kept on the way from there to the kernel of log-probabilities.
    """
    kept: list[Tensor] = []
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        ranks = setting.options.get("tensor_parallel_size", 1) > 1
        make = (
            partial(_keeping_ranks, folder=path) if ranks else partial(_keeping, keep=kept.append)
        )
        options = {
            **llm_options(setting),
            "model_runner": make,
            "enforce_eager": True,
            "max_num_seqs": 1,
            # The references need the rest of the memory.
            "kvcache_block_size": _BLOCK_SIZE,
            "num_kvcache_blocks": 1 + _LENGTH // _BLOCK_SIZE,
            "kvcache_memory_bytes": None,
        }
        with LLM(setting.model, **options) as llm:

            def logits_of(prompt: list[int]) -> Tensor:
                kept.clear()
                llm.generate([prompt], asked, use_tqdm=False)
                for file in sorted(path.iterdir()):
                    kept.append(torch.load(file))
                    file.unlink()
                # The first row is that after the last token, from which a token was drawn.
                return torch.cat(kept)[1:].to(setting.device)

            yield logits_of


def _keeping(config: Config, checkpoint: Any, *, keep: Keep) -> ModelRunner:
    return _kept(LocalRunner(config, checkpoint), keep)


def _keeping_ranks(config: Config, checkpoint: Any, *, folder: Path) -> ModelRunner:
    return TensorParallelRunner(config, checkpoint, partial(keeping_rank, folder=folder))


def keeping_rank(config: Config, checkpoint: Any, rank: Rank, *, folder: Path) -> ModelRunner:
    """A runner of a rank; the process of rank 0 writes each block of logits to a file."""
    runner, numbers = local_rank(config, checkpoint, rank), itertools.count()

    def keep(logits: Tensor) -> None:
        torch.save(logits, folder / f"{next(numbers):06}.pt")

    return runner if rank.index else _kept(runner, keep)


def _kept(runner: Any, keep: Keep) -> ModelRunner:
    gathered = runner._sampler.gathered

    def kept(logits: Tensor) -> Tensor:
        whole: Tensor = gathered(logits)
        keep(whole)
        return whole

    runner._sampler.gathered = kept
    made: ModelRunner = runner
    return made


def teacher_prompts(setting: Setting, num_tokens: int) -> list[list[int]]:
    """Prompts in which at least `num_tokens` tokens follow another.

    They are the source code of the engine in the tokens of the checkpoint's tokenizer. Random
    tokens take its place if there is no tokenizer or too little code.
    """
    length = min(_LENGTH, setting.max_model_len - 1)
    count = -(-num_tokens // (length - 1))
    checkpoint = open_checkpoint(setting.model)
    rng, tokens = random.Random(0), []
    if tokenizer := load_tokenizer(checkpoint.path):
        files = sorted((Path(__file__).parents[1] / "engine").glob("*.py"))
        tokens = tokenizer.encode("".join(file.read_text() for file in files), verbose=False)
    missing = count * length - len(tokens)
    tokens += [rng.randrange(checkpoint.hf_config.vocab_size) for _ in range(missing)]
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


@torch.inference_mode()
def _compared(prompt: list[int], logits: Tensor, exact: Any, rounded: Any) -> Tensor:
    """[5, n - 1] for a prompt of n tokens: the values that `Quality` has the means of."""
    ids = torch.tensor([prompt], device=logits.device)
    references = [model(ids, use_cache=False).logits[0, :-1] for model in (exact, rounded)]
    assert references[0].shape == logits.shape
    found = []
    for first in range(0, len(logits), _ROWS):
        part = slice(first, first + _ROWS)
        ours, float32, rough = (x[part].double().log_softmax(-1) for x in (logits, *references))
        targets = ids[0, 1:][part].unsqueeze(1)
        divergences = [(x.exp() * (x - float32)).sum(-1) for x in (ours, rough)]
        losses = [-x.gather(1, targets)[:, 0] for x in (ours, rough, float32)]
        found.append(torch.stack(divergences + losses))
    return torch.cat(found, dim=1).cpu()
