"""Weights are read strictly: nothing missing, nothing ignored, nothing misshapen."""

from __future__ import annotations

import json
import os
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


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "x-1"])
def test_git_lfs_pointers_are_named(tmp_path: Path, name: str) -> None:
    if name == "x-1":
        _write_shards(tmp_path, {"x-1": ["a"], "x-2": ["b", "c"]})
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(WeightsError, match=rf"/{name} is a Git LFS pointer.*`git lfs pull`"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


def test_a_web_page_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html>\n<html><body>404</body></html>")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_what_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=f"{name} cannot be opened"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(WeightsError, match=f"{name} cannot be opened"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


def test_a_folder_that_has_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere cannot be listed"):
        load_weights(tmp_path / "nowhere", _slots(_tensors()), tied=False)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    shards = {"x-1.safetensors": ["a"], "x-2.safetensors": ["b"], "x-3.safetensors": ["c"]}
    _write_shards(tmp_path, shards)
    (tmp_path / "x-1.safetensors").unlink()
    (tmp_path / "x-3.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"x-1\.safetensors, x-3\.safetensors"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        "null",
        *(f'{{"weight_map": {value}}}' for value in ("[]", "3", "{}", '{"a": 5}', '{"a": null}')),
        '{"weight_map": {"a": ["x.safetensors"]}}',
        '{"weight_map": {"a": "x.safetensors", "b": {"c": 1}}}',
    ],
)
def test_an_unusable_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json is unusable"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    _write_shards(tmp_path, {"one.safetensors": ["a", "b", "c"], "two.safetensors": ["b"]})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"b is stored twice.*two\.safetensors"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", None])
def test_other_formats_are_refused(tmp_path: Path, name: str | None) -> None:
    """Above all pickles, which run code when they are read."""
    if name is not None:
        torch.save(_tensors(), tmp_path / name)
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor .* are not read"):
        load_weights(tmp_path, _slots(_tensors()), tied=False)


class TestWhichFilesAreRead:
    """Those that transformers reads, whatever lies beside them."""

    @staticmethod
    def _check(path: Path) -> None:
        slots = _slots(_tensors())
        load_weights(path, slots, tied=False)
        assert all(torch.equal(slots[name].target, one) for name, one in _tensors().items())

    @pytest.mark.parametrize(
        "name",
        [
            "adapter_model.safetensors",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "optimizer.safetensors",
            "._model.safetensors",
        ],
    )
    def test_the_single_file_alone(self, tmp_path: Path, name: str) -> None:
        save_file(_tensors(), tmp_path / "model.safetensors")
        save_file({"a": torch.zeros(4, 3), "lora": torch.ones(1)}, tmp_path / name)
        self._check(tmp_path)
        (tmp_path / name).write_bytes(b"\0\5\x16\7 of macOS")
        self._check(tmp_path)

    @pytest.mark.parametrize("stale", [True, False])
    def test_the_single_file_rather_than_an_index(self, tmp_path: Path, stale: bool) -> None:
        """A model that was saved again, in one file; the old shards may be there or not."""
        _write_shards(tmp_path, {"x-1.safetensors": ["a"], "x-2.safetensors": ["b", "c"]})
        save_file({"a": torch.zeros(4, 3)}, tmp_path / "x-1.safetensors")
        if stale:
            (tmp_path / "x-1.safetensors").unlink()
        save_file(_tensors(), tmp_path / "model.safetensors")
        self._check(tmp_path)

    @pytest.mark.parametrize(
        "names",
        [
            ["weights.safetensors"],
            ["adapter_model.safetensors"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ],
    )
    def test_no_other_name_is_guessed(self, tmp_path: Path, names: list[str]) -> None:
        for name in names:
            save_file(_tensors(), tmp_path / name)
        with pytest.raises(WeightsError, match=f"It has {', '.join(names)}. Rename the file"):
            load_weights(tmp_path, _slots(_tensors()), tied=False)

    @pytest.mark.parametrize(
        "name",
        [
            "../other/a",
            "{}/a",
            "other/../../other/a",
            "./a",
            "x" * 5000,
            "a\0",
            "",
            ".",
            "..",
            "in/a",
        ],
    )
    def test_an_index_does_not_leave_the_folder(self, tmp_path: Path, name: str) -> None:
        path, other = tmp_path / "model", tmp_path / "other"
        for folder in (path, other, path / "other", path / "in"):
            folder.mkdir()
        _write_shards(path, {"a": ["a"], "b": ["b", "c"]})
        for folder in (other, path / "in"):
            save_file({"a": torch.zeros(4, 3)}, folder / "a")
        index = {"weight_map": {"a": name.format(other), "b": "b"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(WeightsError, match=r"lacks the shards .* named in its index"):
            load_weights(path, _slots(_tensors()), tied=False)

    @pytest.mark.parametrize(
        "shards", [{"model.safetensors": [*"abc"]}, {"a": ["a"], "b": [*"bc"]}]
    )
    def test_links_as_in_the_cache_of_the_hub(
        self, tmp_path: Path, shards: dict[str, list[str]]
    ) -> None:
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        _write_shards(blobs, shards)
        for file in blobs.iterdir():
            (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
        self._check(snapshot)

    def test_tensors_count_wherever_they_are_stored(self, tmp_path: Path) -> None:
        """An index may name a wrong shard for a tensor, or a tensor that no shard has."""
        _write_shards(tmp_path, {"x-1": ["a"], "x-2": ["b", "c"]})
        index = {"weight_map": {"a": "x-2", "b": "x-1", "c": "x-2", "d": "x-1"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        self._check(tmp_path)

    def test_a_tensor_that_only_the_index_has_is_missing(self, tmp_path: Path) -> None:
        _write_shards(tmp_path, {"x-1": ["a"], "x-2": ["b", "c"]})
        save_file({"b": torch.arange(4.0)}, tmp_path / "x-2")
        with pytest.raises(WeightsError, match="1 missing: c"):
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

    def test_an_equal_copy_may_have_another_dtype(self, tmp_path: Path) -> None:
        self._load(tmp_path, torch.arange(6.0, dtype=torch.bfloat16).view(3, 2))

    def test_an_equal_copy_may_have_nans(self, tmp_path: Path) -> None:
        matrix = torch.arange(6.0).view(3, 2)
        matrix[1, 0] = float("nan")
        tensors = {self.EMBEDDING: matrix, "lm_head.weight": matrix.clone()}
        save_file(tensors, tmp_path / "model.safetensors")
        load_weights(tmp_path, _slots({self.EMBEDDING: matrix}), tied=True)

    @pytest.mark.parametrize("shape", [(3, 2), (3, 3)])
    def test_another_matrix_is_refused(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        with pytest.raises(WeightsError, match=r"lm_head\.weight.*differs"):
            self._load(tmp_path, torch.ones(shape))

    def test_a_matrix_of_integers_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"lm_head\.weight.*differs"):
            self._load(tmp_path, torch.arange(6).view(3, 2))

    @pytest.mark.parametrize(
        "stored", [["lm_head.weight"], [EMBEDDING], ["lm_head.weight", EMBEDDING]]
    )
    def test_either_name_will_do(self, tmp_path: Path, stored: list[str]) -> None:
        matrix = torch.arange(12.0).view(6, 2)
        save_file({name: matrix.clone() for name in stored}, tmp_path / "model.safetensors")
        for start in (0, 3):  # as on two ranks
            target = torch.empty(3, 2)
            slots = {self.EMBEDDING: WeightTarget(target, (6, 2), 0, start, 3)}
            load_weights(tmp_path, slots, tied=True)
            assert torch.equal(target, matrix[start : start + 3])

    def test_the_rank_whose_slices_differ_refuses(self, tmp_path: Path) -> None:
        matrix = torch.arange(12.0).view(6, 2)
        other = matrix.clone()
        other[5] = 0.0
        tensors = {self.EMBEDDING: matrix, "lm_head.weight": other}
        save_file(tensors, tmp_path / "model.safetensors")
        slots = {self.EMBEDDING: WeightTarget(torch.empty(3, 2), (6, 2), 0, 3, 3)}
        with pytest.raises(WeightsError, match=r"lm_head\.weight.*differs"):
            load_weights(tmp_path, slots, tied=True)

    def test_a_misshapen_head_alone_is_noticed(self, tmp_path: Path) -> None:
        save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
        slots = {self.EMBEDDING: WeightTarget(torch.empty(3, 2), (3, 2))}
        with pytest.raises(WeightsError, match=r"is \[2, 2\], expected \[3, 2\]"):
            load_weights(tmp_path, slots, tied=True)


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
