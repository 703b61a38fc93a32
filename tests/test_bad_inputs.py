"""Everything that can be given wrongly, and the error that says so.

After each refusal the same engine serves a normal request with the same tokens as before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import Config
from engine.request_checks import check_request
from engine.scheduler import StaticScheduler
from llm import LLM, SamplingParams
from tests.custom_parts import OneAtATime
from utils.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    FieldError,
    LogitsError,
    OutOfMemoryError,
    RequestError,
    RequestTooLongError,
    UnsupportedModelError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
MAX_MODEL_LEN = 64
# A checkpoint's own vocabulary.
VOCAB_SIZE = 4096


@pytest.fixture(scope="module")
def llm(shipped: Path) -> Iterator[LLM]:
    with LLM(
        shipped,
        device="cpu",
        max_num_seqs=4,
        max_model_len=MAX_MODEL_LEN,
        kvcache_block_size=16,
        num_kvcache_blocks=3,
    ) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _serves_afterwards(llm: LLM) -> Iterator[None]:
    def serve() -> list[int]:
        (out,) = llm.generate(["import"], GREEDY, use_tqdm=False)
        tokens: list[int] = out["token_ids"]
        return tokens

    before = serve()
    yield
    assert not llm.has_unfinished
    assert llm.stats().num_free_blocks == 3
    assert serve() == before


def _check_field(error: FieldError, field: str, value: object) -> None:
    assert error.field == field
    assert repr(error.value) == repr(value)
    shown = repr(value)
    assert f"{field}={shown if len(shown) <= 80 else shown[:77] + '...'}: " in str(error)
    assert error.fix
    assert error.fix in str(error)


BAD_OPTIONS: list[tuple[dict[str, Any], str, str]] = [
    # Options, the field that is named, and a part of the message.
    ({"max_num_seq": 3}, "max_num_seq", "Did you mean 'max_num_seqs'?"),
    ({"tensor_parallel": 2}, "tensor_parallel", "Did you mean 'tensor_parallel_size'?"),
    ({"xyzzy": 1}, "xyzzy", "unknown option. Known: admission_policy, attention_backend"),
    ({"dtype": "bf16"}, "dtype", "Did you mean 'bfloat16'?"),
    ({"dtype": None}, "dtype", "Known: auto, bfloat16, float16, float32"),
    ({"dtype": "float64"}, "dtype", "Did you mean 'float16'?"),
    ({"tokenizer": ""}, "tokenizer", "a folder"),
    ({"tokenizer": 5}, "tokenizer", "a folder"),
    ({"device": "gpu"}, "device", "unknown choice"),
    ({"device": "cuda:0"}, "device", "Did you mean 'cuda'?"),
    ({"max_model_len": 1}, "max_model_len", ">= 2"),
    ({"max_model_len": 2049}, "max_model_len", "2048 positions"),
    ({"max_model_len": 64.0}, "max_model_len", "integer"),
    ({"max_model_len": "64"}, "max_model_len", "integer"),
    ({"max_num_seqs": 0}, "max_num_seqs", ">= 1"),
    ({"max_num_seqs": True}, "max_num_seqs", "integer"),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens", ">= 1"),
    ({"max_num_batched_tokens": 3}, "max_num_batched_tokens", "below max_num_seqs=4"),
    ({"gpu_memory_utilization": 0}, "gpu_memory_utilization", "(0, 1]"),
    ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization", "(0, 1]"),
    ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization", "(0, 1]"),
    ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization", "(0, 1]"),
    ({"kvcache_block_size": 8}, "kvcache_block_size", ">= 16"),
    ({"kvcache_block_size": 20}, "kvcache_block_size", "multiple of 16. Use 32."),
    ({"num_kvcache_blocks": 0}, "num_kvcache_blocks", ">= 1"),
    ({"kvcache_memory_bytes": 0}, "kvcache_memory_bytes", ">= 1"),
    (
        {"num_kvcache_blocks": 4, "kvcache_memory_bytes": 10**7},
        "num_kvcache_blocks",
        "contradicts kvcache_memory_bytes=10000000",
    ),
    ({"enforce_eager": True, "enable_cuda_graphs": True}, "enforce_eager", "contradicts"),
    ({"enforce_eager": 1}, "enforce_eager", "bool"),
    ({"enable_cuda_graphs": True}, "enable_cuda_graphs", "no CUDA device"),
    ({"enable_prefix_caching": "yes"}, "enable_prefix_caching", "bool"),
    (
        {"enable_prefix_caching": True, "block_manager": "paged"},
        "enable_prefix_caching",
        "does not cache prefixes",
    ),
    ({"check_exact": "yes"}, "check_exact", "must be a bool. Use True or False."),
    ({"check_exact": 1}, "check_exact", "must be a bool. Use True or False."),
    ({"check_exact": None}, "check_exact", "must be a bool. Use True or False."),
    ({"check_exact": True}, "check_exact", "changes the bits of output token"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size", "from 1 to 8"),
    ({"tensor_parallel_size": 9}, "tensor_parallel_size", "from 1 to 8"),
    ({"pipeline_depth": 2}, "pipeline_depth", "from 0 to 1"),
    ({"pipeline_depth": -1}, "pipeline_depth", "from 0 to 1"),
    ({"seed": -1}, "seed", ">= 0"),
    ({"seed": None}, "seed", "integer"),
    ({"attention_backend": "torsch"}, "attention_backend", "Did you mean 'torch'?"),
    ({"attention_backend": None}, "attention_backend", "neither a name"),
    ({"attention_backend": "triton"}, "attention_backend", "CUDA"),
    ({"attention_backend": "flash_attn"}, "attention_backend", "CUDA"),
    ({"scheduler": "continous"}, "scheduler", "Did you mean 'continuous'?"),
    ({"scheduler": ""}, "scheduler", "neither a name"),
    ({"scheduler": dict}, "scheduler", "is no Scheduler"),
    ({"scheduler": "nowhere:Scheduler"}, "scheduler", "cannot be imported"),
    ({"scheduler": "json:nothing"}, "scheduler", "cannot be imported"),
    ({"scheduler": ":Scheduler"}, "scheduler", "cannot be imported"),
    ({"queue_policy": "fairshare"}, "queue_policy", "Did you mean 'fair_share'?"),
    ({"queue_policy": "latest"}, "queue_policy", "no QueuePolicy of that name"),
    ({"queue_policy": None}, "queue_policy", "neither a name"),
    ({"admission_policy": "optimist"}, "admission_policy", "Did you mean 'optimistic'?"),
    ({"preemption_policy": dict}, "preemption_policy", "is no PreemptionPolicy"),
    ({"step_policy": "json:nothing"}, "step_policy", "cannot be imported"),
    (
        {"step_policy": "prefill_first", "scheduler": "static"},
        "step_policy",
        "scheduler='static' does not use it",
    ),
    (
        {"step_policy": "prefill_first", "scheduler": lambda c, b, t: StaticScheduler(c, b, t)},
        "step_policy",
        "does not use it",
    ),
    ({"block_manager": "page"}, "block_manager", "Did you mean 'paged'?"),
    ({"block_manager": OneAtATime}, "block_manager", "is no BlockManager"),
    ({"model_runner": "remote"}, "model_runner", "no ModelRunner of that name"),
]


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [pytest.param(*case, id=f"{case[1]}-{i}") for i, case in enumerate(BAD_OPTIONS)],
)
def test_bad_options(shipped: Path, options: dict[str, Any], field: str, message: str) -> None:
    defaults = {"device": "cpu", "max_num_seqs": 4, "max_model_len": MAX_MODEL_LEN}
    with pytest.raises(ConfigError) as caught:
        LLM(shipped, **{**defaults, **options})
    _check_field(caught.value, field, options[field])
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(shipped: Path) -> None:
    with pytest.raises(ConfigError, match="no usable CUDA device") as caught:
        LLM(shipped, device="cuda")
    _check_field(caught.value, "device", "cuda")


@pytest.mark.parametrize(
    "options", [{"kvcache_memory_bytes": 100}, {"num_kvcache_blocks": 10**12}], ids=str
)
def test_kv_caches_that_cannot_be_had(shipped: Path, options: dict[str, int]) -> None:
    with pytest.raises(OutOfMemoryError, match=next(iter(options))) as caught:
        LLM(shipped, device="cpu", max_model_len=MAX_MODEL_LEN, **options)
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize(
    "model", ["/nowhere/at/all", "no-such-model", "a/b/c", "./here", "~/nothing-there"]
)
def test_folders_that_do_not_exist(model: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no such folder") as caught:
        LLM(model)
    assert repr(model) in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


def test_an_empty_model_name() -> None:
    with pytest.raises(ConfigError) as caught:
        LLM("")
    _check_field(caught.value, "model", "")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        LLM(tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "cohere", "qwen3_moe", "t5", "mamba", "qwen2_vl"])
def test_architectures_without_an_implementation(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match=model_type):
        LLM(tmp_path, device="cpu")


def test_a_checkpoint_without_weights(shipped: Path, tmp_path: Path) -> None:
    shutil.copy(shipped / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="safetensors"):
        LLM(tmp_path, device="cpu")


# Prompts, and the value that is named where it is not the whole.
BAD_PROMPTS: list[tuple[str, Any]] = [
    ("empty-text", ""),
    ("empty-text-in-list", ["import", ""]),
    ("empty-tokens", [[]]),
    ("empty-tokens-after-good", [[1, 2], []]),
    ("token-out-of-range", [[1, VOCAB_SIZE]]),
    ("token-negative", [[-1]]),
    ("token-huge", [[2**70]]),
    ("token-bool", [[True]]),
    ("token-bool-flat", [True, 2]),
    ("token-float", [[1.0]]),
    ("token-float-flat", [1.0, 2]),
    ("token-text", [["a"]]),
    ("token-text-flat", [1, "a"]),
    ("token-numpy-float", [[np.float32(3)]]),
    ("token-numpy-bool", [[np.bool_(True)]]),
    ("rows-in-list", [[[1], [2]]]),
    ("none-in-list", [None]),
    ("bytes", b"import"),
    ("bytes-in-list", [b"import"]),
    ("int-after-text", ["import", 5]),
    ("range", range(3)),
    ("int", 5),
    ("float", 1.5),
    ("bool", True),
    ("none", None),
    ("set", {"import"}),
    ("iterator", iter(["import"])),
    ("dict-empty", {}),
    ("dict-with-other-key", {"prompt": "import", "multi_modal_data": None}),
    ("dict-with-salt", [{"prompt": "import", "cache_salt": "a"}]),
    ("dict-with-a-number-as-key", {5: "import"}),
    ("dict-with-none", {"prompt": None}),
    ("dict-with-list-of-texts", {"prompt": ["import"]}),
    ("dict-with-texts-as-ids", {"prompt_token_ids": ["import"]}),
    ("dict-with-text-as-ids", {"prompt_token_ids": "import"}),
    ("dict-with-ids-twice", {"prompt_token_ids": [1], "input_ids": [1]}),
    ("dict-with-rows-in-list", [{"input_ids": [[1], [2]]}]),
    ("dict-with-text-of-rows", {"prompt": "import", "prompt_token_ids": [[1], [2]]}),
    ("dict-with-number", {"input_ids": 5}),
    ("dict-with-empty-ids", {"prompt_token_ids": []}),
    ("array-empty", np.array([], dtype=np.int64)),
    ("array-of-floats", np.array([1.0, 2.0])),
    ("array-of-bools", np.array([True])),
    ("array-scalar", np.array(5)),
    ("array-cube-in-list", [np.zeros((1, 2, 2), dtype=int)]),
    ("array-rows-in-list", [np.ones((2, 3), dtype=int)]),
    ("tensor-of-halves", torch.ones(2, dtype=torch.float16)),
    ("tensor-scalar", torch.tensor(5)),
    ("tensor-without-data", torch.ones(2, dtype=torch.int64, device="meta")),
    ("lone-surrogate", "\ud800"),
]


@pytest.mark.parametrize(
    "prompts", [pytest.param(prompts, id=name) for name, prompts in BAD_PROMPTS]
)
def test_bad_prompts(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    error = caught.value
    assert error.field in ("prompt", "prompts")
    assert not isinstance(error, RequestTooLongError)
    assert isinstance(error, ValueError)
    assert error.fix


@pytest.mark.parametrize("token", [VOCAB_SIZE, -1, 2**70, 1.0, "a"])
def test_the_offending_token_is_named(llm: LLM, token: Any) -> None:
    with pytest.raises(RequestError, match=f"from 0 to {VOCAB_SIZE - 1}") as caught:
        llm.generate([[1, 2, token, 3]], GREEDY, use_tqdm=False)
    _check_field(caught.value, "prompt", token)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "limit"),
    [
        pytest.param(MAX_MODEL_LEN + 1, 1, "max_model_len=64", id="prompt"),
        pytest.param(MAX_MODEL_LEN, 1, "max_model_len=64", id="prompt-and-one"),
        pytest.param(MAX_MODEL_LEN, None, "max_model_len=64", id="prompt-and-none"),
        pytest.param(40, 25, "max_model_len=64", id="prompt-and-output"),
        pytest.param(1, MAX_MODEL_LEN, "max_model_len=64", id="output"),
        pytest.param(1000, 1, "max_model_len=64", id="long-prompt"),
        pytest.param(40, 10, "KV blocks", id="cache"),
    ],
)
def test_requests_that_never_fit(
    llm: LLM, num_prompt: int, max_tokens: int | None, limit: str
) -> None:
    params = [GREEDY, SamplingParams(temperature=0, max_tokens=max_tokens)]
    with pytest.raises(RequestTooLongError, match=limit) as caught:
        llm.generate([[1, 2], [1] * num_prompt], params, use_tqdm=False)
    assert caught.value.field == "prompt"
    assert f"{num_prompt} tokens" in str(caught.value)


def test_a_bad_prompt_at_the_end_starts_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.engine, "step", lambda: pytest.fail("a step was made"))
    with pytest.raises(RequestError):
        llm.generate([[1, 2], [3, 4], [VOCAB_SIZE]], GREEDY, use_tqdm=False)


NUMBERS = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "number from 0 to 10000"),
    ({"temperature": -1e-9}, "number from 0 to 10000"),
    ({"temperature": float("nan")}, "number from 0 to 10000"),
    ({"temperature": float("inf")}, "number from 0 to 10000"),
    ({"temperature": "1"}, "number from 0 to 10000"),
    ({"temperature": True}, "number from 0 to 10000"),
    ({"temperature": 1j}, "number from 0 to 10000"),
    ({"temperature": 10**400}, "number from 0 to 10000"),
    ({"temperature": 10001}, "number from 0 to 10000"),
    ({"temperature": 1e39}, "number from 0 to 10000"),
    ({"max_tokens": -3}, "integer >= 0"),
    ({"max_tokens": 1.5}, "integer >= 0"),
    ({"max_tokens": True}, "integer >= 0"),
    ({"max_tokens": "3"}, "integer >= 0"),
    ({"ignore_eos": 1}, "bool"),
    ({"ignore_eos": None}, "bool"),
    ({"seed": -1}, "[0, 2**63)"),
    ({"seed": 2**63}, "[0, 2**63)"),
    ({"seed": 1.0}, "[0, 2**63)"),
    ({"seed": True}, "[0, 2**63)"),
    ({"seed": "7"}, "[0, 2**63)"),
    *(({name: value}, "number") for name in NUMBERS for value in ("1", True, float("nan"))),
    ({"top_p": 0}, "(0, 1]"),
    ({"top_p": -0.5}, "(0, 1]"),
    ({"top_p": 1.01}, "(0, 1]"),
    ({"top_k": -2}, "integer >= -1"),
    ({"top_k": 1.0}, "integer >= -1"),
    ({"top_k": True}, "integer >= -1"),
    ({"min_p": -0.1}, "from 0 to 1"),
    ({"min_p": 1.1}, "from 0 to 1"),
    ({"repetition_penalty": 0}, "from 1e-06 to 1e+06"),
    ({"repetition_penalty": -1.0}, "from 1e-06 to 1e+06"),
    ({"repetition_penalty": float("inf")}, "from 1e-06 to 1e+06"),
    ({"presence_penalty": 2.1}, "from -2 to 2"),
    ({"presence_penalty": -2.1}, "from -2 to 2"),
    ({"frequency_penalty": 3}, "from -2 to 2"),
    ({"frequency_penalty": float("-inf")}, "from -2 to 2"),
    ({"min_tokens": -1}, "integer from 0"),
    ({"min_tokens": 1.0}, "integer from 0"),
    ({"min_tokens": 2**63}, "integer from 0 to 2147483648"),
    ({"min_tokens": 65}, "exceeds max_tokens=64"),
    ({"stop": ""}, "none of them empty"),
    ({"stop": ["a", ""]}, "none of them empty"),
    ({"stop": [1]}, "list of str"),
    ({"stop": 5}, "list of str"),
    ({"stop": b"x"}, "list of str"),
    ({"stop": {"x"}}, "list of str"),
    ({"stop_token_ids": 2}, "list of token ids"),
    ({"stop_token_ids": [-1]}, "list of token ids"),
    ({"stop_token_ids": ["2"]}, "list of token ids"),
    ({"stop_token_ids": [True]}, "list of token ids"),
    ({"logprobs": -1}, "integer from 0 to 1024 or None"),
    ({"logprobs": True}, "integer from 0 to 1024 or None"),
    ({"logprobs": 1.0}, "integer from 0 to 1024 or None"),
    ({"logprobs": 1025}, "integer from 0 to 1024 or None"),
    ({"prompt_logprobs": -1}, "integer from 0 to 1024 or None"),
    ({"prompt_logprobs": "all"}, "integer from 0 to 1024 or None"),
    ({"prompt_logprobs": 1025}, "integer from 0 to 1024 or None"),
    ({"prompt_logprobs_start": -1}, "integer >= 0"),
    ({"n": 0}, "integer from 1 to 16384"),
    ({"n": 2.0}, "integer from 1 to 16384"),
    ({"n": 16385}, "integer from 1 to 16384"),
    ({"logit_bias": {5: 101}}, "numbers from -100 to 100"),
    ({"logit_bias": {5: float("nan")}}, "numbers from -100 to 100"),
    ({"logit_bias": {5: "1"}}, "numbers from -100 to 100"),
    ({"logit_bias": {"5": 1}}, "dict of at most 1024 token ids"),
    ({"logit_bias": {-1: 1}}, "dict of at most 1024 token ids"),
    ({"logit_bias": {True: 1}}, "dict of at most 1024 token ids"),
    ({"logit_bias": [5]}, "dict of at most 1024 token ids"),
    ({"logit_bias": 5}, "dict of at most 1024 token ids"),
    ({"logit_bias": dict.fromkeys(range(1025), 1)}, "dict of at most 1024 token ids"),
    ({"allowed_token_ids": []}, "not empty"),
    ({"allowed_token_ids": 5}, "list of token ids"),
    ({"allowed_token_ids": [-1]}, "list of token ids"),
    ({"allowed_token_ids": ["a"]}, "list of token ids"),
    ({"bad_words": "word"}, "list of str"),
    ({"bad_words": [5]}, "list of str"),
    ({"bad_words": [""]}, "none of them blank"),
    ({"bad_words": [" "]}, "none of them blank"),
    ({"bad_words_ids": [5]}, "lists of 1 to 32 token ids"),
    ({"bad_words_ids": [[]]}, "lists of 1 to 32 token ids"),
    ({"bad_words_ids": [[-5]]}, "lists of 1 to 32 token ids"),
    ({"bad_words_ids": [[5] * 33]}, "lists of 1 to 32 token ids"),
    ({"bad_words_ids": [[5]] * 513}, "list of at most 512 lists"),
    ({"logits_processors": len}, "list of callables"),
    ({"logits_processors": [5]}, "list of callables"),
    ({"priority": 1.5}, "integer"),
    ({"priority": True}, "integer"),
    ({"cache_salt": b"x"}, "str"),
    ({"cache_salt": "a\0b"}, "without"),
    ({"predicted_tokens": 0}, "integer >= 1"),
    ({"predicted_tokens": 2.0}, "integer >= 1"),
]


@pytest.mark.parametrize(
    ("values", "message"),
    [pytest.param(*case, id=f"{next(iter(case[0]))}-{i}") for i, case in enumerate(BAD_SAMPLING)],
)
def test_bad_sampling_parameters(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    ((field, value),) = values.items()
    _check_field(caught.value, field, value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"stop_token_ids": [2, VOCAB_SIZE]},
        {"stop_token_ids": [2**70]},
        {"logit_bias": {VOCAB_SIZE: 1.0}},
        {"allowed_token_ids": [1, VOCAB_SIZE]},
        {"bad_words_ids": [[1], [2, VOCAB_SIZE]]},
    ],
    ids=str,
)
def test_sampling_parameters_that_this_model_cannot_serve(llm: LLM, values: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate([[1], [2]], [GREEDY, SamplingParams(max_tokens=4, **values)], use_tqdm=False)
    assert caught.value.field in values
    assert str(VOCAB_SIZE - 1) in str(caught.value) or str(VOCAB_SIZE) in str(caught.value)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_no_more_log_probabilities_than_the_vocabulary_has_tokens(name: str) -> None:
    config = Config(model="none", max_model_len=100)
    for count in (30, 31):
        with nullcontext() if count == 30 else pytest.raises(RequestError, match="30 tokens"):
            wanted: dict[str, Any] = {name: count}
            check_request([1], SamplingParams(**wanted), config, 30, 0)


@pytest.mark.parametrize(
    "processor",
    [lambda ids, logits: None, lambda ids, logits: logits[:5], lambda ids: ids],
    ids=["none", "short", "arguments"],
)
def test_logits_processors_that_fail(llm: LLM, processor: Any) -> None:
    params = SamplingParams(max_tokens=4, logits_processors=[processor])
    good, failed = llm.generate([[1], [2]], [GREEDY, params], use_tqdm=False)
    (alone,) = llm.generate([1], GREEDY, use_tqdm=False)
    keys = ("text", "token_ids", "finish_reason", "error", "prompt_token_ids")
    assert [good[key] for key in keys] == [alone[key] for key in keys]
    assert (failed["finish_reason"], failed["token_ids"], failed["text"]) == ("error", [], "")
    assert isinstance(failed["error"], LogitsError)
    with pytest.raises(LogitsError, match="logits processor"):
        llm.generate([[1], [2]], [GREEDY, params], use_tqdm=False, raise_errors=True)
    assert not llm.has_unfinished


@pytest.mark.parametrize(
    "params",
    [
        pytest.param([GREEDY], id="too-few"),
        pytest.param([GREEDY] * 3, id="too-many"),
        pytest.param([], id="none-of-them"),
        pytest.param(5, id="int"),
        pytest.param("greedy", id="text"),
        pytest.param({"temperature": 0}, id="dict"),
        pytest.param({}, id="empty-dict"),
        pytest.param([GREEDY, None], id="none-in-list"),
        pytest.param([GREEDY, {}], id="dict-in-list"),
        pytest.param(SamplingParams, id="class"),
    ],
)
def test_bad_lists_of_sampling_parameters(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate([[1], [2]], params, use_tqdm=False)
    assert caught.value.field == "sampling_params"


def test_text_for_a_checkpoint_without_a_tokenizer(shipped: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(shipped / name, tmp_path)
    with LLM(tmp_path, device="cpu", max_num_seqs=1, max_model_len=MAX_MODEL_LEN) as llm:
        with pytest.raises(RequestError, match="no tokenizer") as caught:
            llm.generate(["import"], GREEDY, use_tqdm=False)
        _check_field(caught.value, "prompt", "import")
        assert len(llm.generate([[5]], GREEDY, use_tqdm=False)[0]["token_ids"]) == 4
