"""transformers as the judge of greedy outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from utils.bench.engines import Setting, Tokens
from utils.bench.workloads import Workload

# A greedy token may miss the reference's largest logit by rounding, in units of the logits'
# standard deviation. bfloat16 keeps 8 bits: a logit of 4 deviations is off by up to 0.016 from its
# own rounding alone, in both engines, and the layers before add theirs.
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
    """transformers' forward pass over the same weights."""

    def __init__(self, setting: Setting) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model: Any = transformers.AutoModelForCausalLM
        self._model = model.from_pretrained(setting.model, dtype=getattr(torch, setting.dtype))
        self._model = self._model.eval().to(setting.device)
        self._tolerance = TOLERANCE[setting.dtype]

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
            ids = torch.tensor([prompt + output[:-1]], device=self._model.device)
            logits = self._model(ids, logits_to_keep=len(output)).logits[0].float()
            chosen = torch.tensor(output, device=ids.device).unsqueeze(1)
            gaps = (logits.amax(1) - logits.gather(1, chosen)[:, 0]) / logits.std(1)
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
