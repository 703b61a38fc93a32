"""Prompts of all kinds become token ids; conversations become prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from utils.chats import PLAIN_CHAT, ChatOptions, check_chat, templated
from utils.errors import RequestError
from utils.prompts import load_tokenizer, tokenized

ONE = [[5, 6, 7]]
TWO = [[5, 6, 7], [8, 9, 10]]
TEXTS = ["import os", "class"]
MESSAGES = [{"role": "user", "content": "Hello"}]
# A template that shows everything that it gets.
SHOWS = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    "{{ tools and tools[0].function.name }}|{{ enable_thinking }}|{{ add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def tokenizer(shipped: Path) -> Any:
    return load_tokenizer(shipped)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([5, 6, 7], ONE),
        ((5, 6, 7), ONE),
        ([[5, 6, 7]], ONE),
        ([[[5, 6, 7]]], ONE),
        (TWO, TWO),
        (tuple(map(tuple, TWO)), TWO),
        (np.array(ONE[0]), ONE),
        (np.array(ONE[0], dtype=np.uint16), ONE),
        (np.array(TWO), TWO),
        ([np.array(one) for one in TWO], TWO),
        ([np.array([one]) for one in TWO], TWO),
        (torch.tensor(ONE[0]), ONE),
        (torch.tensor(TWO), TWO),
        ([torch.tensor(one) for one in TWO], TWO),
        ([torch.tensor([one]) for one in TWO], TWO),
        (list(torch.tensor(ONE[0])), ONE),
        ([np.int64(5), 6, np.int32(7)], ONE),
        ([[np.int64(5), 6, 7], [8, 9, 10]], TWO),
        ({"prompt_token_ids": [5, 6, 7]}, ONE),
        ({"prompt_token_ids": np.array(ONE)}, ONE),
        ([{"prompt_token_ids": one} for one in TWO], TWO),
        ([{"prompt_token_ids": [5, 6, 7], "prompt": None}, [8, 9, 10]], TWO),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, ONE),
        ({"input_ids": TWO, "token_type_ids": [[0] * 3] * 2}, TWO),
        ({"input_ids": torch.tensor(TWO), "attention_mask": torch.ones(2, 3)}, TWO),
        ({"input_ids": [*map(torch.tensor, TWO)], "attention_mask": torch.ones(2, 3)}, TWO),
        ({"input_ids": [[0, 5, 6], [8, 9, 0]], "attention_mask": [[0, 1, 1], [1, 1, 0]]},
         [[5, 6], [8, 9]]),
        (BatchEncoding({"input_ids": [5, 6, 7]}), ONE),
        (BatchEncoding({"input_ids": torch.tensor(TWO)}), TWO),
        ([BatchEncoding({"input_ids": [one]}) for one in TWO], TWO),
        ([], []),
        ((), []),
    ],
)  # fmt: skip
def test_token_ids(prompts: Any, expected: list[list[int]]) -> None:
    found = tokenized(None, prompts)
    assert [one.token_ids for one in found] == expected
    assert {type(token) for one in found for token in one.token_ids} <= {int}
    assert {one.text for one in found} <= {None}


@pytest.mark.parametrize(
    "prompts",
    [TEXTS, tuple(TEXTS), [{"prompt": text} for text in TEXTS], np.array(TEXTS),
     [TEXTS[0], {"prompt": TEXTS[1]}]],
)  # fmt: skip
def test_texts(tokenizer: Any, prompts: Any) -> None:
    found = tokenized(tokenizer, prompts)
    assert [one.text for one in found] == TEXTS
    assert [one.token_ids for one in found] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("prompt", [TEXTS[0], {"prompt": TEXTS[0]}], ids=str)
def test_one_text(tokenizer: Any, prompt: Any) -> None:
    assert tokenized(tokenizer, prompt) == [(tokenizer.encode(TEXTS[0]), TEXTS[0])]


class _Begins:
    """A tokenizer that puts a special token before a text, as those of Llama do."""

    chat_template = SHOWS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(char) for char in text]

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "".join(f"{one['content']}" for one in messages)


def test_texts_begin_with_a_special_token_and_conversations_as_their_template_says() -> None:
    assert tokenized(_Begins(), "ab") == [([1, 97, 98], "ab")]
    made = templated(_Begins(), [{"role": "user", "content": "ab"}])
    assert made == {"prompt": "ab", "prompt_token_ids": [97, 98]}


def test_the_text_of_token_ids_is_kept_and_not_encoded() -> None:
    prompt = {"prompt": "anything", "prompt_token_ids": [5, 6, 7]}
    assert tokenized(None, prompt) == tokenized(None, [prompt]) == [([5, 6, 7], "anything")]


@pytest.mark.parametrize("mask", [[1], [[1, 1, 1]], 5, [1, 1, 1, 1]], ids=str)
def test_masks_of_another_shape(mask: Any) -> None:
    with pytest.raises(RequestError, match="another shape") as caught:
        tokenized(None, {"input_ids": [5, 6, 7], "attention_mask": mask})
    assert caught.value.field == "attention_mask"


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("multi_modal_data", "text alone"),
        ("cache_salt", "SamplingParams(cache_salt"),
        ("type", "Known: prompt"),
    ],
)
def test_other_keys_are_named(key: str, fix: str) -> None:
    with pytest.raises(RequestError, match=f"prompt='{key}'") as caught:
        tokenized(None, [{"prompt_token_ids": [5], key: 1}])
    assert fix in caught.value.fix


def test_what_apply_chat_template_returns(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.encode(text, add_special_tokens=False)
    asked: list[dict[str, Any]] = [
        {},
        {"return_dict": False},
        {"return_dict": True},
        {"return_dict": True, "return_tensors": "pt"},
        {"return_dict": False, "return_tensors": "np"},
    ]
    for options in asked:
        given = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, **options)
        assert [one.token_ids for one in tokenized(tokenizer, given)] == [expected], options
        assert [one.token_ids for one in tokenized(tokenizer, [given])] == [expected], options
    other = [*MESSAGES, {"role": "assistant", "content": "Yes, what?"}]
    padded = tokenizer.apply_chat_template(
        [MESSAGES, other], padding=True, return_dict=True, return_tensors="pt"
    )
    both = [tokenizer.apply_chat_template(m, return_dict=False) for m in (MESSAGES, other)]
    assert padded["input_ids"].shape[1] == len(both[1]) > len(both[0])
    assert [one.token_ids for one in tokenized(tokenizer, padded)] == both


def _chat(**values: Any) -> ChatOptions:
    options: Any = {**PLAIN_CHAT, "chat_template": SHOWS, **values}
    return options  # type: ignore[no-any-return]


class TestChats:
    def test_the_template_gets_everything(self, tokenizer: Any) -> None:
        tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
        others = {"enable_thinking": False}
        options = _chat(tools=[tool], chat_template_kwargs=others, add_generation_prompt=False)
        made = templated(tokenizer, MESSAGES, options)
        assert made["prompt"] == "[user:Hello]look|False|False"
        assert tokenizer.decode(made["prompt_token_ids"]) == made["prompt"]
        assert templated(tokenizer, MESSAGES, _chat())["prompt"] == "[user:Hello]None||True"

    def test_the_last_message_goes_on(self, tokenizer: Any) -> None:
        messages = [*MESSAGES, {"role": "assistant", "content": "def f"}]
        options: Any = {**PLAIN_CHAT, "add_generation_prompt": False}
        whole = templated(tokenizer, messages, options)["prompt"]
        options["continue_final_message"] = True
        begun = templated(tokenizer, messages, options)["prompt"]
        assert begun.endswith("assistant\ndef f")
        assert whole == begun + "<|im_end|>\n"

    def test_content_parts_are_joined(self, tokenizer: Any) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        made = templated(tokenizer, [{"role": "user", "content": parts}], _chat())
        assert made["prompt"].startswith("[user:a\nb]")
        assert parts == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        again = templated(tokenizer, ({"role": "user", "content": tuple(parts)},), _chat())
        assert again == made

    @pytest.mark.parametrize(
        "part",
        [{"type": "image_url", "image_url": {"url": "x"}}, "a", {"text": "a"}, {"type": "text"}, 5],
        ids=str,
    )
    def test_parts_without_text_are_refused(self, tokenizer: Any, part: Any) -> None:
        parts = [{"type": "text", "text": "a"}, part]
        with pytest.raises(RequestError, match="no part with text") as caught:
            templated(tokenizer, [{"role": "user", "content": parts}], _chat())
        assert (caught.value.field, caught.value.value) == ("messages", part)

    @pytest.mark.parametrize(
        ("values", "field"),
        [
            ({"continue_final_message": True}, "continue_final_message"),
            ({"continue_final_message": 1}, "continue_final_message"),
            ({"add_generation_prompt": None}, "add_generation_prompt"),
            ({"tools": {"type": "function"}}, "tools"),
            ({"chat_template": Path("template.jinja")}, "chat_template"),
            ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {5: 1}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"conversation": []}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"return_dict": True}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"return_tensors": "pt"}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
        ],
        ids=str,
    )
    def test_wrong_options(self, values: dict[str, Any], field: str) -> None:
        with pytest.raises(RequestError) as caught:
            check_chat(_chat(**values))
        assert caught.value.field == field
        assert caught.value.fix

    def test_right_options(self) -> None:
        check_chat(_chat(continue_final_message=True, add_generation_prompt=False))
        check_chat(_chat(tools=[], chat_template_kwargs={"enable_thinking": True}))

    def test_a_template_that_fails(self, tokenizer: Any) -> None:
        with pytest.raises(RequestError, match="chat template fails"):
            templated(tokenizer, MESSAGES, _chat(chat_template="{{ raise_exception('no') }}"))

    def test_a_template_for_a_tokenizer_that_has_none(self, shipped: Path) -> None:
        bare = load_tokenizer(shipped)
        assert bare is not None
        bare.chat_template = None
        assert templated(bare, MESSAGES, _chat())["prompt"] == "[user:Hello]None||True"
        with pytest.raises(RequestError, match="no chat template"):
            templated(bare, MESSAGES)
