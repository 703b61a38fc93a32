"""transformers as the judge of greedy outputs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines import Setting, Tokens
from benchmarks.workloads import Workload

# A greedy token may miss the reference's largest logit by rounding, in units of the logits'
# standard deviation. bfloat16 keeps 8 bits: a logit of 4 deviations is off by up to 0.016 from its
# own rounding alone, in both engines, and the layers before add theirs. On an H200 (Qwen3-0.6B
# shape, random weights) the farthest of 8,192 greedy tokens missed bfloat16's largest logit by
# 0.125 and float32's by 0.089; transformers' own bfloat16 misses float32's by 0.082.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


@dataclass(frozen=True)
class Agreement:
    """How many greedy tokens are the reference's own; all others are ties up to rounding."""

    exact: int
    total: int

    def __str__(self) -> str:
        return f"{self.exact} of {self.total}"


class WrongOutputError(Exception):
    """An output is not what the reference would generate."""


class Reference:
    """transformers' forward pass over the same weights.

    In the engines' dtype, which takes no more memory than they do; an output that seems wrong is
    judged again in float32, without the reference's own rounding.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.model = self._load(setting.dtype)
        self._exact: Any = None
        self._tolerance = TOLERANCE[setting.dtype]

    def _load(self, dtype: str) -> Any:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model: Any = transformers.AutoModelForCausalLM
        model = model.from_pretrained(self._setting.model, dtype=getattr(torch, dtype))
        return model.eval().to(self._setting.device)

    @torch.inference_mode()
    def judge(self, work: Workload, outputs: Tokens) -> Agreement:
        """Compare greedy outputs with the reference's logits after the same tokens.

        Raises:
            WrongOutputError: a token is not the most likely one, up to rounding.
        """
        exact = total = 0
        for i, (prompt, output) in enumerate(zip(work.prompts, outputs, strict=True)):
            if not output:
                continue
            gaps = self._gaps(self.model, prompt, output)
            if not gaps.max() <= self._tolerance and self._setting.dtype != "float32":
                # Without the memory for it the first judgement stands.
                with suppress(torch.OutOfMemoryError):
                    self._exact = self._exact or self._load("float32")
                    gaps = self._gaps(self._exact, prompt, output)
            # Of NaN, which is what broken weights give, neither is true.
            if not gaps.max() <= self._tolerance:
                at = int(gaps.argmax())
                raise WrongOutputError(
                    f"wrong outputs, so no rate: token {at} of request {i} of {work.name!r} misses "
                    f"the reference's largest logit by {float(gaps[at]):.3g} standard deviations"
                )
            exact += int((gaps == 0).sum())
            total += len(output)
        return Agreement(exact, total)

    @staticmethod
    def _gaps(model: Any, prompt: list[int], output: list[int]) -> Tensor:
        """[len(output)] by how much each token misses the largest logit, in standard deviations."""
        ids = torch.tensor([prompt + output[:-1]], device=model.device)
        logits = model(ids, logits_to_keep=len(output)).logits[0].float()
        chosen = torch.tensor(output, device=ids.device).unsqueeze(1)
        gaps: Tensor = (logits.amax(1) - logits.gather(1, chosen)[:, 0]) / logits.std(1)
        return gaps
