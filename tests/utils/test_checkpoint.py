from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from layers.rotary import rotary_table
from models import find_architecture
from tests.checkpoints import VARIANTS, Checkpoints
from utils.checkpoint import Checkpoint, open_checkpoint
from utils.errors import CheckpointError, CheckpointNotFoundError, UnsupportedModelError
from utils.prompts import TOKENIZER_FILES, load_tokenizer

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1000,
}


def _folder(path: Path, generation: Any = None, **fields: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**QWEN3, **fields}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def _open(path: Path, generation: Any = None, **fields: Any) -> Checkpoint:
    return open_checkpoint(str(_folder(path, generation, **fields)))


def test_a_folder_is_opened(tmp_path: Path) -> None:
    checkpoint = _open(tmp_path)
    assert checkpoint.path == tmp_path
    assert checkpoint.hf_config.vocab_size == 100


@pytest.mark.parametrize("name", VARIANTS)
def test_in_another_process_it_describes_the_same_model(
    checkpoints: Checkpoints, name: str
) -> None:
    ours = open_checkpoint(str(checkpoints[name]))
    theirs = pickle.loads(pickle.dumps(ours))
    assert (theirs.path, theirs.eos_token_ids) == (ours.path, ours.eos_token_ids)
    assert theirs.max_position == ours.max_position
    architecture = find_architecture(ours)
    assert find_architecture(theirs) is architecture
    shape = architecture.model_shape(ours.hf_config)
    assert architecture.model_shape(theirs.hf_config) == shape
    cpu = torch.device("cpu")
    for length, kind in product((16, ours.max_position), {*shape.ropes} or {""}):
        tables = [
            rotary_table(one.hf_config, shape.head_dim, length, cpu, kind) for one in (ours, theirs)
        ]
        assert torch.equal(*tables)


def test_another_process_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """What a rank of several imports: seconds of its start."""
    code = (
        "import pickle, sys, engine.ranks.collectives; pickle.load(sys.stdin.buffer);"
        "print({'torch._dynamo', 'sympy', 'transformers.generation.utils'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(_open(tmp_path)),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"set()\n"


def test_opening_imports_no_model_of_transformers(tmp_path: Path) -> None:
    """The models take seconds to import. They can still be imported later."""
    code = (
        "import sys; from utils.checkpoint import open_checkpoint; name = sys.argv[2];"
        "open_checkpoint(sys.argv[1]); print(name in sys.modules);"
        "from transformers.models.auto.modeling_auto import AutoModelForCausalLM;"
        "table = sys.modules[name]; open_checkpoint(sys.argv[1]); print(sys.modules[name] is table)"
    )
    table = "transformers.models.auto.modeling_auto"
    done = subprocess.run(
        [sys.executable, "-c", code, str(_folder(tmp_path, None)), table],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == [b"False", b"True"]


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_the_home_folder_may_be_abbreviated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    _folder(tmp_path / "model")
    assert open_checkpoint("~/model").path == tmp_path / "model"


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        open_checkpoint(str(tmp_path / "nothing"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(_folder(tmp_path) / "config.json"))


@pytest.mark.parametrize(
    "name", ["x" * 5000, "/" + "x" * 5000, "~no-such-user/x", "a\0b", "\ud800"]
)
def test_odd_names_are_not_found(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        open_checkpoint(name)


def test_the_hub_is_asked_for_the_files_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        *TOKENIZER_FILES,
    }
    others = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "onnx/config.json",
        "original/model.safetensors",
        "original/tokenizer.model",
        "pytorch_model.bin",
    }
    asked: set[str] = set()

    def download(model: str, **patterns: Any) -> str:
        asked.update(filter_repo_objects(sorted(read | others), **patterns))
        return str(_folder(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_checkpoint("organisation/model").path == tmp_path
    assert asked == read


def test_a_hub_name_that_cannot_be_had_is_not_found() -> None:
    """Offline, as the tests run, the hub gives nothing."""
    with pytest.raises(CheckpointNotFoundError, match="no-such-organisation/no-such-model"):
        open_checkpoint("no-such-organisation/no-such-model")


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"qwen3"', '{"model_type": 3}'])
def test_a_broken_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


# Contents in place of a JSON object, and what the error says about them.
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
NO_OBJECTS = [
    (POINTER.encode(), "is a Git LFS pointer, not the file itself. Run `git lfs pull`"),
    (b"<!DOCTYPE html>", "is unusable: no JSON text in UTF-8"),
    (b'\xef\xbb\xbf{"model_type": "qwen3"}', "is unusable: no JSON text in UTF-8"),
    ('{"model_type": "qwen3"}'.encode("utf-16"), "is unusable: no JSON text in UTF-8"),
    ('{"model_type": "qwen3", "é": 1}'.encode("latin-1"), "is unusable: no JSON text in UTF-8"),
    (b"[" * 100_000, "is unusable: no JSON text in UTF-8"),
    (b"[1]", "is unusable: a list, not a JSON object"),
]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("content", "problem"), NO_OBJECTS)
def test_what_is_no_json_object_is_named(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (_folder(tmp_path) / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"/{name} {problem}"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    """It is not as if there were no such file: a lost generation_config.json has end tokens."""
    (_folder(tmp_path) / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=f"{name} cannot be opened"):
        open_checkpoint(str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} cannot be opened"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("fields", [{"model_type": "no_such_type"}, {"model_type": None}])
def test_a_model_type_that_nobody_knows_is_refused(tmp_path: Path, fields: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _open(tmp_path, **fields)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, set()),
        (5, None, {5}),
        ([5, 6], None, {5, 6}),
        (None, {"eos_token_id": 7}, {7}),
        (5, {"eos_token_id": [7, 8, 9]}, {5, 7, 8, 9}),
        (5, {"eos_token_id": None}, {5}),
        (5, {}, {5}),
        (0, {"eos_token_id": 0}, {0}),
        # Never sampled, whatever the vocabulary.
        (5, {"eos_token_id": [7, 10**7]}, {5, 7}),
    ],
)
def test_all_end_tokens_are_honoured(
    tmp_path: Path, config: Any, generation: Any, expected: set[int]
) -> None:
    assert _open(tmp_path, generation, eos_token_id=config).eos_token_ids == expected


def test_the_last_token_of_the_vocabulary_may_end_a_text_and_none_behind_it(tmp_path: Path) -> None:
    ends = _open(tmp_path, {"eos_token_id": [99, 100]}, vocab_size=100, eos_token_id=None)
    assert ends.eos_token_ids == {99}


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_broken_generation_config_is_named(tmp_path: Path, text: str) -> None:
    _folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        open_checkpoint(str(tmp_path))


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 1000),
        ({"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}, 3000),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 2000),
        # The way Qwen's documentation extends its models.
        ({**YARN, "original_max_position_embeddings": 1000}, 4000),
        # The way checkpoints whose config counts the extension already say so.
        ({**YARN, "original_max_position_embeddings": 250}, 1000),
        ({"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": None}, 2000),
    ],
)
def test_the_context_counts_rope_scaling(tmp_path: Path, rope: dict[str, Any], limit: int) -> None:
    assert _open(tmp_path, rope_parameters=rope).max_position == limit


def test_the_context_counts_the_scaling_of_each_kind_of_layer(tmp_path: Path) -> None:
    """Layers with a window need no scaling."""
    plain = {"rope_type": "default", "rope_theta": 1e4}
    kinds = {"full_attention": {**YARN, "factor": 8.0}, "sliding_attention": plain}
    assert _open(tmp_path, rope_parameters=kinds).max_position == 8000
    kinds["full_attention"] = plain
    assert _open(tmp_path, rope_parameters=kinds).max_position == 1000


def test_layers_of_different_sizes(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="per_layer_config"):
        _open(tmp_path, per_layer_config={"1": {"intermediate_size": 120}})


def test_models_with_other_parts_than_text(tmp_path: Path) -> None:
    _folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(UnsupportedModelError, match="other parts beside text"):
        _ = open_checkpoint(str(tmp_path)).max_position


def test_the_older_names_of_rope_fields_are_understood(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    checkpoint = _open(tmp_path, rope_theta=5e5, rope_scaling=scaling)
    assert checkpoint.max_position == 4000
    assert checkpoint.hf_config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "abc"},
        {"head_dim": None, "hidden_size": None},
        {"layer_types": ["full_attention"]},
        {"num_hidden_layers": [2]},
        {"eos_token_id": -1},
        {"eos_token_id": "x"},
        {"eos_token_id": [[1]]},
        {"eos_token_id": True},
    ],
)
def test_fields_that_make_no_sense_are_an_error_of_the_checkpoint(
    tmp_path: Path, fields: Any
) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        _open(tmp_path, **fields)


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
TEXTS_AND_SIGNS = ("1", "", 0, -4, 10**30, math.nan, math.inf, True)
YARN_WITH = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in SIZES for value in (*TEXTS_AND_SIGNS, 1.5)),
        *(("rms_norm_eps", value) for value in ("1e-6", -1e-6, 1.5, math.nan, math.inf, True)),
        *(("rope_theta", value) for value in TEXTS_AND_SIGNS),
        *(("logits_scaling", value) for value in TEXTS_AND_SIGNS),
        *(("residual_multiplier", value) for value in (*TEXTS_AND_SIGNS, 1e-30)),
        *(("embedding_multiplier", value) for value in TEXTS_AND_SIGNS),
        *(("attention_multiplier", value) for value in TEXTS_AND_SIGNS),
        *(("query_pre_attn_scalar", value) for value in TEXTS_AND_SIGNS),
        *(("llama_4_scaling_beta", value) for value in ("0.1", -1.0, math.nan, math.inf, True)),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 0),
        ("attention_bias", "false"),
        ("rope_scaling", "yarn"),
        ("rope_parameters", [YARN]),
        ("dtype", 1.5),
        ("transformers_weights", "other.safetensors"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, model_type: str, name: str, value: Any) -> None:
    problem = re.escape(f"{name}={value[0] if isinstance(value, list) else value!r} must be ")
    with pytest.raises(CheckpointError, match=rf"config\.json is unusable: {problem}"):
        _open(tmp_path, **{"model_type": model_type, name: value})


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling", "by kind of layer"])
@pytest.mark.parametrize("name", YARN_WITH)
@pytest.mark.parametrize("value", TEXTS_AND_SIGNS)
def test_wrong_rope_parameters_are_named(tmp_path: Path, place: str, name: str, value: Any) -> None:
    rope: dict[str, Any] = {**YARN, name: value}
    fields = {place: rope}
    if place == "by kind of layer":
        fields = {"rope_parameters": {"full_attention": rope}}
    with pytest.raises(CheckpointError, match=re.escape(f"{name}={value!r} must be a number")):
        _open(tmp_path, **fields)


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
def test_wrong_factors_of_single_frequencies_are_named(tmp_path: Path, name: str) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0] * 32}
    _open(tmp_path, rope_parameters=rope)
    for value in ("1.0", -1.0, math.nan):
        wrong = {**rope, name: [1.0] * 31 + [value]}
        with pytest.raises(CheckpointError, match=re.escape(f"{name}={value!r} must be a number")):
            _open(tmp_path, rope_parameters=wrong)


def test_null_stands_for_the_default(tmp_path: Path) -> None:
    fields = dict.fromkeys(("num_key_value_heads", "rope_scaling", "rope_parameters"))
    assert _open(tmp_path, **fields).hf_config.num_key_value_heads == 1
    unset = dict.fromkeys(("beta_fast", "attention_factor"))
    assert _open(tmp_path, rope_parameters={**YARN, **unset}).max_position == 4000


def test_a_factor_that_is_no_number(tmp_path: Path) -> None:
    checkpoint = _open(tmp_path)
    checkpoint.hf_config.rope_parameters = {"rope_type": "yarn", "factor": None}
    with pytest.raises(CheckpointError, match="factor=None"):
        _ = checkpoint.max_position


def test_an_original_length_that_is_no_number(tmp_path: Path) -> None:
    rope = {**YARN, "rope_type": "linear", "original_max_position_embeddings": [64]}
    checkpoint = _open(tmp_path, rope_parameters=rope)
    with pytest.raises(CheckpointError, match=re.escape("embeddings=[64]")):
        _ = checkpoint.max_position


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[]"),
        (
            "tokenizer.json",
            '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, '
            '"merges": ["b c"]}}',
        ),
    ],
)
def test_an_unusable_tokenizer_is_named(tmp_path: Path, name: str, text: str) -> None:
    checkpoint = _open(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer in .* is unusable"):
        load_tokenizer(checkpoint.path)


@pytest.mark.parametrize("name", [*TOKENIZER_FILES, "merges.txt", "chat_template.jinja"])
def test_a_git_lfs_pointer_of_a_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"/{name} is a Git LFS pointer.*`git lfs pull`"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_has_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be opened"):
        load_tokenizer(tmp_path)


def test_a_model_of_several_parts_is_left_to_the_models(tmp_path: Path) -> None:
    """Its config may have no vocabulary of its own; that it is not supported is told later."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert open_checkpoint(str(tmp_path)).eos_token_ids == {7, 8}


@pytest.mark.parametrize("token", [True, "7", 7.0, [True]])
def test_an_end_token_of_the_generation_config_is_an_integer(tmp_path: Path, token: Any) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id"):
        _open(tmp_path, {"eos_token_id": token})
