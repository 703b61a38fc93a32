"""Outputs that are JSON of a schema."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoTokenizer

from engine.json_schema import JsonGrammars
from llm import LLM, SamplingParams
from tests.checkpoints import Checkpoints, random_prompts
from utils.errors import LogitsError, RequestError

# Every value of this schema is short, so that outputs end before `max_tokens`.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "tags", "inner"],
    "additionalProperties": False,
    "$defs": {
        "inner": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": -5, "maximum": 20}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
PROMPTS = ["x = ", "def f(a):", "import "]
OPTIONS: dict[str, Any] = {"device": "cpu", "max_num_seqs": 4, "max_model_len": 256}


def _params(seed: int, **values: Any) -> SamplingParams:
    common = {"temperature": 1.2, "max_tokens": 200, "json_schema": SCHEMA}
    return SamplingParams(seed=seed, **{**common, **values})


def _check(out: dict[str, Any]) -> None:
    assert (out["finish_reason"], out["error"]) == ("stop", None)
    value = json.loads(out["text"])
    assert value.keys() == {"name", "tags", "inner"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 9
    assert 1 <= len(value["tags"]) <= 3
    assert set(value["tags"]) <= {"red", "blue"}
    assert value["inner"].keys() == {"x"}
    assert type(value["inner"]["x"]) is int
    assert -5 <= value["inner"]["x"] <= 20


@pytest.fixture(scope="module", params=[0, 1], ids=["depth0", "depth1"])
def llm(shipped: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(shipped, pipeline_depth=request.param, **OPTIONS) as llm:
        yield llm
        assert llm.stats().unfinished_requests == 0


def test_every_output_is_json_of_the_schema(llm: LLM) -> None:
    params = [_params(i, n=1 + i % 2, temperature=t) for i, t in enumerate([0.0, 0.8, 3.0])]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for out in outputs:
        for one in out.get("outputs", [out]):
            _check(one)
    # A schema as text, in a stream, beside a request without one.
    same = _params(2, temperature=3.0, json_schema=json.dumps(SCHEMA))
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (alone,) = llm.generate(PROMPTS[0], free, use_tqdm=False)
    parts: list[list[dict[str, Any]]] = [[], []]
    for part in llm.stream([PROMPTS[2], PROMPTS[0]], [same, free]):
        parts[part["index"]].append(part)
    assert "".join(part["text"] for part in parts[0]) == outputs[2]["text"]
    assert [token for part in parts[1] for token in part["token_ids"]] == alone["token_ids"]


def test_outputs_with_little_memory_and_over_ranks(shipped: Path) -> None:
    """A preemption forgets nothing, here and in the processes of ranks."""
    options = {**OPTIONS, "kvcache_block_size": 16}
    params = [_params(i, max_tokens=60) for i in range(3)]
    with LLM(shipped, **options) as llm:
        expected = [out["token_ids"] for out in llm.generate(PROMPTS, params, use_tqdm=False)]
    for size in (1, 2):
        with LLM(shipped, num_kvcache_blocks=5, tensor_parallel_size=size, **options) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert [out["token_ids"] for out in outputs] == expected
        assert sum(out["metrics"]["preemptions"] for out in outputs) > 0
        for out in outputs:
            _check(out)


def test_other_parameters_apply_first(llm: LLM) -> None:
    tokenizer: Any = llm.tokenizer

    def prefers_blue(token_ids: list[int], logits: Any) -> Any:
        logits[tokenizer.encode("blue")] += 100
        return logits

    (out,) = llm.generate(PROMPTS[0], _params(1, logits_processors=[prefers_blue]), use_tqdm=False)
    _check(out)
    assert "red" not in json.loads(out["text"])["tags"]
    (early,) = llm.generate(PROMPTS[0], _params(1, stop='"tags"'), use_tqdm=False)
    assert early["finish_reason"] == "stop"
    assert early["text"].startswith("{")
    assert "tags" not in early["text"]
    (cut,) = llm.generate(PROMPTS[0], _params(1, max_tokens=5), use_tqdm=False)
    assert cut["finish_reason"] == "length"
    assert cut["token_ids"] == llm.generate(PROMPTS[0], _params(1), False)[0]["token_ids"][:5]


def test_after_the_json_only_its_end_can_follow(llm: LLM) -> None:
    yes = {"json_schema": {"const": "yes"}, "max_tokens": 20}
    (out,) = llm.generate(PROMPTS[0], _params(0, **yes), use_tqdm=False)
    assert (json.loads(out["text"]), out["finish_reason"]) == ("yes", "stop")
    (on,) = llm.generate(PROMPTS[0], _params(0, ignore_eos=True, **yes), use_tqdm=False)
    size = len(out["token_ids"])
    assert (len(on["token_ids"]), on["token_ids"][:size]) == (20, out["token_ids"])
    assert set(on["token_ids"][size:]) <= llm.engine.checkpoint.eos_token_ids
    good, failed = llm.generate(
        PROMPTS[:2], [_params(0, **yes), _params(0, min_tokens=15, **yes)], use_tqdm=False
    )
    assert good["token_ids"] == out["token_ids"]
    assert failed["finish_reason"] == "error"
    assert isinstance(failed["error"], LogitsError)


def test_the_schema_is_stronger_than_other_processors(llm: LLM) -> None:
    def writes(token_ids: list[int], logits: Any) -> Any:
        logits[:] = 0.0
        logits[100] = 50.0
        return logits

    params = _params(0, json_schema={"const": "yes"}, logits_processors=[writes])
    (out,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert json.loads(out["text"]) == "yes"


def test_each_end_of_sequence_token_may_end_the_json(llm: LLM) -> None:
    tokens = sorted(llm.engine.checkpoint.eos_token_ids)
    assert len(tokens) > 1
    for token in tokens:

        def prefers(token_ids: list[int], logits: Any, token: int = token) -> Any:
            logits[token] += 100
            return logits

        params = _params(0, json_schema={"const": "yes"}, logits_processors=[prefers])
        (out,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
        assert json.loads(out["text"]) == "yes"
        assert out["token_ids"][-1] == token


@pytest.mark.parametrize("num_logits", [4000, 4096, 4100])
def test_logits_may_be_more_or_less_than_tokens(shipped: Path, num_logits: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    assert len(tokenizer) == 4096
    grammars = JsonGrammars(tokenizer, num_logits, (2,), shipped)
    params = grammars.applied(SamplingParams(json_schema={"const": "yes"}))
    processor = params.logits_processors[0].for_request([5], 0)
    left = processor([5], torch.zeros(num_logits)) == 0
    texts = tokenizer.batch_decode(left.nonzero())
    assert texts
    assert all('"yes"'.startswith(text) for text in texts)


def test_a_schema_that_becomes_too_large_fails_alone(
    llm: LLM, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its error is no end of the output, and one output takes nothing from the others' budget."""
    large = {"type": "string", "pattern": "([a-m].{1,50}){40}"}
    fields: dict[str, Any] = {"properties": {"a": large}, "required": ["a"]}
    fields |= {"type": "object", "additionalProperties": False}
    hard = SamplingParams(temperature=1.5, seed=7, max_tokens=12, json_schema=fields)
    (alone,) = llm.generate("import ", hard, use_tqdm=False)
    assert len(alone["token_ids"]) == 12
    prompts = [f"x{i} = {i * i}" for i in range(9)]
    *_, last = llm.generate([*prompts, "import "], hard, use_tqdm=False)
    assert last["token_ids"] == alone["token_ids"]
    easy = _params(3)
    (expected,) = llm.generate(PROMPTS[0], easy, use_tqdm=False)
    longer = SamplingParams(temperature=1.5, seed=1, n=4, max_tokens=200, json_schema=fields)
    outputs, good = llm.generate(["import ", PROMPTS[0]], [longer, easy], use_tqdm=False)
    assert good["token_ids"] == expected["token_ids"]
    failed = [out for out in outputs["outputs"] if out["finish_reason"] == "error"]
    assert failed
    for out in outputs["outputs"]:
        if out["finish_reason"] == "stop":
            json.loads(out["text"])
    assert all(len(str(out["error"])) < 500 for out in failed)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True},
        {"not": {"type": "string"}},
        {"type": "strin"},
        {"enum": []},
        {"type": "string", "format": "of my own"},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"type": "string", "pattern": "("},
        {"properties": 3},
        {"const": "\ud800"},
        '{"type": "integer", "minimum": 1e400}',
        '{"items":' * 300 + "{}" + "}" * 300,
    ],
    ids=lambda schema: str(schema)[:30],
)
def test_schemas_that_cannot_be_used(llm: LLM, schema: Any) -> None:
    params = _params(0, json_schema=schema)
    for call in (llm.generate, llm.stream, llm.add_request):
        with pytest.raises(RequestError) as caught:
            call(PROMPTS[0], params)
        assert caught.value.field == "json_schema"
    with pytest.raises(RequestError, match="json_schema"):
        llm.engine.add_request([1, 2], _params(0))
    assert not llm.has_unfinished


@pytest.mark.parametrize(
    "value",
    [
        "",
        "{",
        "[1]",
        "5",
        "null",
        "true",
        [],
        5,
        True,
        object(),
        {"a": object()},
        {"a": float("nan")},
        '{"a": NaN}',
        '{"a":' * 100_000,
        reduce(lambda inner, _: {"a": inner}, range(100_000), cast("dict[str, Any]", {})),
    ],
)
def test_values_that_are_no_schema(value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(json_schema=value)
    assert caught.value.field == "json_schema"


def test_parameters_with_a_schema_are_values() -> None:
    params = _params(0)
    assert params == _params(0, json_schema=json.dumps(SCHEMA))
    assert hash(params) == hash(_params(0))
    assert pickle.loads(pickle.dumps(params)) == params


def test_the_tokenizer_is_that_of_the_engine(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the folder or the current directory has changed, or an older engine used the path."""
    shutil.copytree(shipped, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    yes = SamplingParams(temperature=0, json_schema={"const": "yes"})
    for swap in (False, True):
        file = tmp_path / "model" / "tokenizer.json"
        if swap:
            content = json.loads(file.read_text())
            vocab = content["model"]["vocab"]
            for one, other in ("y{", "e[", "s~"):
                vocab[one], vocab[other] = vocab[other], vocab[one]
            file.write_text(json.dumps(content))
        with LLM("model", **OPTIONS) as llm:
            file.rename(tmp_path / "gone")
            with monkeypatch.context() as elsewhere:
                elsewhere.chdir("/")
                (out,) = llm.generate([[5, 6]], yes, use_tqdm=False)
                recommended = llm.default_sampling_params()
            (tmp_path / "gone").rename(file)
        assert json.loads(out["text"]) == "yes"
        assert recommended == SamplingParams.from_generation_config(shipped)


def test_what_is_missing_is_told(
    shipped: Path, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = checkpoints["qwen3-gqa2-wide-heads"]
    with LLM(plain, **OPTIONS) as llm, pytest.raises(RequestError, match="no tokenizer"):
        llm.generate(random_prompts([5], seed=1), _params(0), use_tqdm=False)
    AutoTokenizer.from_pretrained(shipped).save_pretrained(tmp_path)
    for file in shipped.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((shipped / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    with LLM(tmp_path, **OPTIONS) as llm:
        with pytest.raises(RequestError, match="no end-of-sequence token"):
            llm.generate(PROMPTS, _params(0), use_tqdm=False)
        monkeypatch.setattr("engine.json_schema.version", lambda name: "1.7.6")
        with pytest.raises(RequestError, match=r"1.7.6 is too old; install 1.8"):
            llm.generate(PROMPTS, _params(0), use_tqdm=False)
        monkeypatch.setattr("engine.json_schema.version", lambda name: "1.10.0")
        with pytest.raises(RequestError, match="no end-of-sequence token"):
            llm.generate(PROMPTS, _params(0), use_tqdm=False)

        def broken(*given: Any, **more: Any) -> Any:
            raise KeyError("vocab")

        with monkeypatch.context() as patch:
            patch.setattr("llguidance.hf.from_tokenizer", broken)
            patch.setattr(llm._grammars, "eos_token_ids", (2,))
            with pytest.raises(RequestError, match="vocab"):
                llm.generate(PROMPTS, _params(0), use_tqdm=False)
        monkeypatch.setitem(sys.modules, "llguidance.hf", None)
        with pytest.raises(RequestError, match="pip install llguidance"):
            llm.generate(PROMPTS, _params(0), use_tqdm=False)
        assert not llm.has_unfinished
