"""Names of options and sampling parameters in other engines, and what to use here instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar

from utils.errors import FieldError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Foreign:
    """A name that this engine does not have.

    Attributes:
        fix: what to do instead.
        same: values that ask for what this engine does anyway. They are accepted, with no effect.
    """

    fix: str
    same: tuple[Any, ...] = ()


def known_names(
    given: Mapping[str, Any],
    known: Iterable[str],
    foreign: Mapping[str, Foreign],
    error: type[FieldError],
    what: str,
) -> dict[str, Any]:
    """Return the entries of `given` whose names are in `known`.

    Raises `error` for a name that is not known, unless its value changes nothing (`Foreign.same`).
    `what` says what the names are names of, such as "option".
    """
    known, kept = set(known), {}
    for name, value in given.items():
        other = foreign.get(name)
        if name in known:
            kept[name] = value
        elif other is None:
            raise error(name, value, f"unknown {what}", did_you_mean(name, known))
        # The types are compared as well, because 1 == True.
        elif not any(type(value) is type(one) and value == one for one in other.same):
            raise error(name, value, f"unknown {what}", other.fix)
    return kept


def names_checked(
    foreign: Mapping[str, Foreign], error: type[FieldError], what: str
) -> Callable[[type[T]], type[T]]:
    """Return a decorator of a dataclass: an unknown argument raises `error`, not a TypeError."""

    def decorated(kind: type[T]) -> type[T]:
        known = [one.name for one in fields(kind) if one.init]  # type: ignore[arg-type]
        init: Callable[..., None] = kind.__init__

        @wraps(init)
        def checked(self: T, *values: Any, **named: Any) -> None:
            try:
                init(self, *values, **named)
                return
            except TypeError as wrong:
                failure = wrong
            # Raised here, the error of `known_names` does not have the TypeError as its context.
            known_names(named, known, foreign, error, what)
            raise failure

        # Not an assignment, which mypy refuses for a method.
        setattr(kind, "__init__", checked)  # noqa: B010
        return kind

    return decorated


def _meant(name: str) -> Foreign:
    return Foreign(f"Did you mean {name!r}?")


_NO_CODE = "This engine runs no code of a checkpoint. Leave it out."
_ONE_HOST = "This engine splits a model by tensor_parallel_size alone. Leave it out."
_DENSE = "This engine reads unquantized weights and caches alone (docs/models.md). Leave it out."
_FOLDER = "Download the model, and give its folder as the model."
_TEXT = "This engine runs models of text alone, with the outputs of generate. Leave it out."
_SCHEMA = "Use json_schema, or logits_processors for other grammars (docs/structured-output.md)."
_BEAMS = "This engine has no beam search. Use n for several outputs."

# Options of vLLM's `LLM`, and of `from_pretrained` in transformers.
OPTIONS: Mapping[str, Foreign] = {
    "trust_remote_code": Foreign(_NO_CODE, (False, None)),
    "code_revision": Foreign(_NO_CODE, (None,)),
    "revision": Foreign(_FOLDER, (None,)),
    "tokenizer_revision": Foreign(_FOLDER, (None,)),
    "download_dir": Foreign(_FOLDER, (None,)),
    "cache_dir": Foreign(_FOLDER, (None,)),
    "hf_token": Foreign(f"{_FOLDER} The variable HF_TOKEN holds a token too.", (None,)),
    "torch_dtype": _meant("dtype"),
    "device_map": _meant("device"),
    "attn_implementation": _meant("attention_backend"),
    "block_size": _meant("kvcache_block_size"),
    "num_gpu_blocks_override": _meant("num_kvcache_blocks"),
    "kv_cache_memory_bytes": _meant("kvcache_memory_bytes"),
    "max_seq_len_to_capture": Foreign("Use enable_cuda_graphs or enforce_eager. Leave it out."),
    "scheduling_policy": _meant("queue_policy"),
    "scheduler_cls": _meant("scheduler"),
    "worker_cls": _meant("model_runner"),
    "async_scheduling": _meant("pipeline_depth"),
    "enable_chunked_prefill": Foreign(
        "Long prompts are always computed in chunks. max_num_batched_tokens limits a chunk.",
        (True, None),
    ),
    "num_scheduler_steps": Foreign("Use pipeline_depth. Leave it out.", (1,)),
    "speculative_config": Foreign("Use num_speculative_tokens.", (None,)),
    "compilation_config": Foreign("Use enable_cuda_graphs or enforce_eager.", (None,)),
    "pipeline_parallel_size": Foreign(_ONE_HOST, (1, None)),
    "data_parallel_size": Foreign(_ONE_HOST, (1, None)),
    "enable_expert_parallel": Foreign(_ONE_HOST, (False, None)),
    "distributed_executor_backend": Foreign(_ONE_HOST, (None, "mp")),
    "disable_custom_all_reduce": Foreign(_ONE_HOST, (False, None)),
    "quantization": Foreign(_DENSE, (None,)),
    "load_format": Foreign(_DENSE, ("auto", "safetensors", None)),
    "kv_cache_dtype": Foreign(_DENSE, ("auto", None)),
    "swap_space": Foreign("Preempted requests are recomputed. Leave it out.", (0, 0.0, None)),
    "cpu_offload_gb": Foreign("Weights stay on the device. Leave it out.", (0, 0.0, None)),
    "enable_lora": Foreign(f"Merge adapters into the weights. {_FOLDER}", (False, None)),
    "limit_mm_per_prompt": Foreign(_TEXT, (None,)),
    "mm_processor_kwargs": Foreign(_TEXT, (None,)),
    "task": Foreign(_TEXT, ("auto", "generate", None)),
    "runner": Foreign(_TEXT, ("auto", "generate", None)),
    "tokenizer_mode": Foreign("transformers chooses the tokenizer. Leave it out.", ("auto", None)),
    "skip_tokenizer_init": Foreign("Use SamplingParams(detokenize=False).", (False, None)),
    "generation_config": Foreign(
        "The file is used if generate gets no SamplingParams. Give SamplingParams().",
        ("auto", None),
    ),
    "override_generation_config": Foreign("Use llm.default_sampling_params(name=value).", (None,)),
    "hf_overrides": Foreign("Change config.json in the model's folder.", (None,)),
    "max_logprobs": Foreign("Requests may ask for up to 1,024 logprobs. Leave it out."),
    "logprobs_mode": Foreign(
        "Log-probabilities are those of the model's logits. Leave it out.", ("raw_logprobs", None)
    ),
    "logits_processors": Foreign("Give them to SamplingParams."),
    "disable_log_stats": Foreign("The engine logs nothing. Use llm.stats().", (True, None)),
    "guided_decoding_backend": Foreign(_SCHEMA, ("auto", None)),
    "structured_outputs_config": Foreign(_SCHEMA, (None,)),
}

# Parameters of vLLM's `SamplingParams`, of OpenAI's API, and of `generate` in transformers.
PARAMETERS: Mapping[str, Foreign] = {
    "max_new_tokens": _meant("max_tokens"),
    "max_completion_tokens": _meant("max_tokens"),
    "max_length": Foreign("Use max_tokens, which counts the tokens of the output alone."),
    "min_new_tokens": _meant("min_tokens"),
    "min_length": Foreign("Use min_tokens, which counts the tokens of the output alone."),
    "num_return_sequences": _meant("n"),
    "best_of": Foreign("Use n, and choose among the outputs."),
    "do_sample": Foreign("Use temperature=0 instead of do_sample=False, and nothing for True."),
    "stop_strings": _meant("stop"),
    "eos_token_id": Foreign("Use stop_token_ids."),
    "suppress_tokens": Foreign("Use logit_bias={token: -100} or bad_words_ids=[[token]]."),
    "pad_token_id": Foreign("This engine pads nothing. Leave it out."),
    "top_logprobs": _meant("logprobs"),
    "random_seed": _meant("seed"),
    "use_beam_search": Foreign(_BEAMS),
    "num_beams": Foreign(_BEAMS),
    "length_penalty": Foreign(_BEAMS),
    "early_stopping": Foreign(_BEAMS),
    "structured_outputs": Foreign(_SCHEMA),
    "guided_decoding": Foreign(_SCHEMA),
    "guided_json": Foreign(_SCHEMA),
    "response_format": Foreign(_SCHEMA),
    "regex": Foreign(_SCHEMA),
    "grammar": Foreign(_SCHEMA),
    "logits_processor": _meant("logits_processors"),
    "no_repeat_ngram_size": Foreign("Use logits_processors (docs/options.md)."),
    "extra_args": Foreign("Use logits_processors: an object with for_request has its own values."),
    "output_kind": Foreign("Use llm.stream for outputs in parts."),
    "stream": Foreign("Use llm.stream for outputs in parts."),
    "truncate_prompt_tokens": Foreign("Cut the prompt's token ids."),
    "spaces_between_special_tokens": Foreign("The tokenizer decides. Leave it out."),
    "lora_request": Foreign("Merge adapters into the weights."),
}
