"""Weights are read strictly: nothing missing, nothing ignored, nothing misshapen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm import LLM, SamplingParams
from tests.checkpoints import VARIANTS, write_checkpoint
from utils.errors import WeightsError
from utils.loader import WeightTarget, load_weights


def _tensors() -> dict[str, Tensor]:
    return {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(4.0), "c": torch.ones(2, 2)}


def _slots(tensors: dict[str, Tensor]) -> dict[str, WeightTarget]:
    return {
        name: WeightTarget(torch.full_like(t, float("nan")), tuple(t.shape))
        for name, t in tensors.items()
    }


def _write_shards(path: Path, shards: dict[str, list[str]]) -> None:
    tensors = _tensors()
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_one_file(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    slots = _slots(_tensors())
    load_weights(tmp_path, slots, tied=False)
    for name, tensor in _tensors().items():
        assert torch.equal(slots[name].target, tensor)


def test_shards_with_an_index(tmp_path: Path) -> None:
    _write_shards(tmp_path, {"x-1.safetensors": ["a"], "x-2.safetensors": ["b", "c"]})
    slots = _slots(_tensors())
    load_weights(tmp_path, slots, tied=False)
    for name, tensor in _tensors().items():
        assert torch.equal(slots[name].target, tensor)


def test_files_outside_the_index_are_not_read(tmp_path: Path) -> None:
    _write_shards(tmp_path, {"x-1.safetensors": ["a"], "x-2.safetensors": ["b", "c"]})
    save_file({"stray": torch.ones(1)}, tmp_path / "stray.safetensors")
    load_weights(tmp_path, _slots(_tensors()), tied=False)


def test_a_part_of_a_tensor(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    slots = _slots(_tensors())
    rows, columns = torch.empty(2, 3), torch.empty(2, 1)
    slots["a"] = WeightTarget(rows, (4, 3), 0, 1, 2)
    slots["c"] = WeightTarget(columns, (2, 2), 1, 1, 1)
    load_weights(tmp_path, slots, tied=False)
    assert torch.equal(rows, _tensors()["a"][1:3])
    assert torch.equal(columns, _tensors()["c"][:, 1:])


def test_a_vector_for_every_row_of_a_target(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    slots = _slots(_tensors())
    target = torch.empty(3, 4)
    slots["b"] = WeightTarget(target, (4,))
    load_weights(tmp_path, slots, tied=False)
    assert torch.equal(target, torch.arange(4.0).expand(3, 4))


def test_the_stored_type_is_converted(tmp_path: Path) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in _tensors().items()}
    save_file(stored, tmp_path / "model.safetensors")
    slots = _slots(_tensors())
    load_weights(tmp_path, slots, tied=False)
    assert slots["a"].target.dtype == torch.float32
    assert torch.equal(slots["a"].target, stored["a"].float())


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    save_file(
        {"a": torch.ones(3, 4), "extra": torch.ones(1), "more": torch.ones(1)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(WeightsError) as caught:
        load_weights(tmp_path, _slots(_tensors()), tied=False)
    message = str(caught.value)
    assert "2 missing: b, c" in message
    assert "2 unexpected: extra, more" in message
    assert "1 misshapen: a is [3, 4], expected [4, 3]" in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    many = {f"t{i:02}": torch.ones(1) for i in range(20)}
    save_file({**_tensors(), **many}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"20 unexpected: t00, .*t07 and 12 more"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_damaged_file_is_named(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(_tensors(), file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors is not a readable"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    shards = {"x-1.safetensors": ["a"], "x-2.safetensors": ["b"], "x-3.safetensors": ["c"]}
    _write_shards(tmp_path, shards)
    (tmp_path / "x-1.safetensors").unlink()
    (tmp_path / "x-3.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"x-1\.safetensors, x-3\.safetensors"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"weight_map": []}', '{"weight_map": 3}', '{"weight_map": {"a": 5}}', "null"],
)
def test_an_unusable_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json is unusable"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "two.safetensors")
    with pytest.raises(WeightsError, match=r"b is stored twice.*two\.safetensors"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", None])
def test_other_formats_are_refused(tmp_path: Path, name: str | None) -> None:
    """Above all pickles, which run code when they are read."""
    if name is not None:
        torch.save(_tensors(), tmp_path / name)
    with pytest.raises(WeightsError, match=r"no \*\.safetensors file"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


def test_stored_rotary_frequencies_are_no_weights(tmp_path: Path) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file({**_tensors(), **frequencies}, tmp_path / "model.safetensors")
    load_weights(tmp_path, _slots(_tensors()), tied=False)


class TestTiedHeads:
    EMBEDDING = "model.embed_tokens.weight"

    def _load(self, path: Path, head: Tensor) -> None:
        tensors = {self.EMBEDDING: torch.arange(6.0).view(3, 2)}
        save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors")
        load_weights(path, _slots(tensors), tied=True)

    def test_an_equal_copy_is_accepted(self, tmp_path: Path) -> None:
        self._load(tmp_path, torch.arange(6.0).view(3, 2))

    @pytest.mark.parametrize("shape", [(3, 2), (3, 3)])
    def test_another_matrix_is_refused(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        with pytest.raises(WeightsError, match=r"lm_head\.weight.*differs"):
            self._load(tmp_path, torch.ones(shape))


class TestWholeCheckpoints:
    """The same through the engine, on a checkpoint that transformers wrote."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write_checkpoint(tmp_path / "model", VARIANTS["qwen3-mha-bias"])

    @staticmethod
    def _change(path: Path, **changes: Tensor | None) -> None:
        file = path / "model.safetensors"
        tensors = load_file(file)
        for name, tensor in changes.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        save_file(tensors, file, metadata={"format": "pt"})

    @pytest.mark.parametrize(
        "name",
        [
            "lm_head.weight",
            "model.norm.weight",
            "model.layers.1.self_attn.q_norm.weight",
            "model.layers.0.self_attn.k_proj.bias",
            "model.layers.0.self_attn.o_proj.bias",
        ],
    )
    def test_each_missing_tensor_is_noticed(self, path: Path, name: str) -> None:
        self._change(path, **{name: None})
        with pytest.raises(WeightsError, match=f"1 missing: {name}"):
            LLM(path, device="cpu")

    def test_an_unknown_tensor_is_noticed(self, path: Path) -> None:
        self._change(path, **{"model.layers.0.mlp.up_proj.bias": torch.ones(160)})
        with pytest.raises(WeightsError, match=r"1 unexpected: model\.layers\.0\.mlp\.up_proj"):
            LLM(path, device="cpu")

    def test_more_layers_than_the_config_says_are_noticed(self, path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match=r"unexpected: model\.layers\.1\."):
            LLM(path, device="cpu")

    def test_a_misshapen_tensor_is_noticed(self, path: Path) -> None:
        self._change(path, **{"model.layers.0.self_attn.q_norm.weight": torch.ones(1)})
        with pytest.raises(WeightsError, match=r"q_norm\.weight is \[1\], expected \[64\]"):
            LLM(path, device="cpu")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64])
    def test_tensors_that_are_no_floats_are_noticed(self, path: Path, dtype: torch.dtype) -> None:
        norm = load_file(path / "model.safetensors")["model.norm.weight"]
        self._change(path, **{"model.norm.weight": norm.to(dtype)})
        with pytest.raises(WeightsError, match=r"1 of another type .*: model\.norm\.weight is"):
            LLM(path, device="cpu")

    def test_a_failed_load_leaves_room_for_a_good_one(self, path: Path) -> None:
        good = load_file(path / "model.safetensors")["model.norm.weight"]
        self._change(path, **{"model.norm.weight": None})
        with pytest.raises(WeightsError):
            LLM(path, device="cpu")
        self._change(path, **{"model.norm.weight": good})
        with LLM(path, device="cpu", max_num_seqs=1) as llm:
            (out,) = llm.generate([[1, 2]], SamplingParams(max_tokens=3), use_tqdm=False)
        assert len(out["token_ids"]) == 3
