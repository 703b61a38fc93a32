"""Train the tiny Qwen3 checkpoint in this folder on CPython's standard library.

One run goes from a folder of Python sources to a complete Hugging Face checkpoint: it
collects the files, holds some back, trains a byte-level BPE tokenizer on the rest, trains
transformers' own ``Qwen3ForCausalLM`` and measures the saved, bf16-rounded weights on the
held-out files. Try it on a CPU with ``--steps 5 --batch-size 1 --context 256``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import platform
import random
import sysconfig
import textwrap
import time
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The split that Qwen's tokenizers use. Its normalizer (NFC) is left out on purpose, so that
# every text comes back from the tokenizer exactly as it went in.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Corpus:
    """The texts to learn from and the held-out files, which nothing is ever fitted to."""

    train: list[str]
    held_out: list[str]


def collect_corpus(root: Path, held_out_share: float) -> Corpus:
    """Read the Python files under ``root`` and split them by whole file.

    The split hangs on a hash of the relative path, so it survives added or removed files.
    Left out: installed packages, generated tables (the character maps and pydoc's topics
    are data, not code), files that do not parse (the test suite keeps some on purpose) and
    exact duplicates, which could otherwise sit on both sides of the split.
    """
    skipped_folders = {"site-packages", "__pycache__", "pydoc_data", "encoded_modules", "data"}
    seen: set[str] = set()
    corpus = Corpus([], [])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped_folders.intersection(relative.parts[:-1]):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
            parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        if text in seen or not text.strip() or "\ndecoding_table = (" in text:
            continue
        seen.add(text)
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        (corpus.held_out if share < held_out_share else corpus.train).append(text)
    return corpus


def parse(text: str) -> ast.Module:
    """Parse ``text``, silent about the odd escapes that newer interpreters warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def chat_samples(text: str, longest: int = 4000) -> Iterator[str]:
    """Yield a conversation for each documented function of ``text``.

    The user gives a signature and its docstring, the assistant answers with the whole
    function: the only question-and-answer pairs that a source file holds by itself.
    """
    lines = text.split("\n")
    for node in ast.walk(parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node) is None or len(node.body) < 2:
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        docstring_end = node.body[0].end_lineno or node.lineno
        question = textwrap.dedent("\n".join(lines[node.lineno - 1 : docstring_end]))
        if len(source) <= longest:
            yield (
                f"{TURN_START}user\n{question}{TURN_END}\n"
                f"{TURN_START}assistant\n{source}{TURN_END}\n"
            )


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; all 256 bytes are in it, so no text is out of reach."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """Join the documents into one stream, each between end-of-text tokens."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    stream = [separator]
    for encoding in tokenizer.encode_batch(documents):
        stream.extend(encoding.ids)
        stream.append(separator)
    return torch.tensor(stream)


def training_stream(tokenizer: Tokenizer, texts: list[str], chat: float, seed: int) -> Tensor:
    """Pack files and conversations in random order, ``chat`` of the characters chatting."""
    shuffler = random.Random(seed)
    samples = [sample for text in texts for sample in chat_samples(text)]
    shuffler.shuffle(samples)
    room = chat / (1 - chat) * sum(map(len, texts))
    chosen: list[str] = []
    for sample in samples:
        room -= len(sample)
        if room < 0:
            break
        chosen.append(sample)
    documents = texts + chosen
    shuffler.shuffle(documents)
    return pack(tokenizer, documents)


def batches(stream: Tensor, context: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of ``context + 1`` tokens for ever, epoch after epoch.

    Each epoch cuts the stream at a new offset, so that no window is seen twice.
    """
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1, device=stream.device)
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - context, context)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        if len(starts) < batch_size:
            raise ValueError(f"the corpus is too small for {batch_size} windows of {context}")
        for first in range(0, len(starts) - batch_size + 1, batch_size):
            rows = starts[first : first + batch_size].to(stream.device)
            yield stream[rows[:, None] + window]


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss of each token but the first of each row, in nats."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def evaluate(model: nn.Module, stream: Tensor, context: int) -> float:
    """Return the mean loss over ``stream``, each token but the first predicted once."""
    model.eval()
    total = 0.0
    for start in range(0, len(stream) - 1, context):
        tokens = stream[start : start + context + 1]
        total += float(token_losses(model, tokens[None]).double().sum())
    model.train()
    return total / (len(stream) - 1)


def add_dropout(model: Qwen3ForCausalLM, rate: float) -> None:
    """Drop parts of each block's output while training.

    Qwen3 has no such dropout of its own, but a corpus this small is read dozens of times.
    Hooks leave the architecture, and so the checkpoint, as they were.
    """

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], rate, module.training), *output[1:])
        return F.dropout(output, rate, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


def build_model(args: argparse.Namespace, tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """Make a freshly initialised model with fp32 master weights."""
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        max_position_embeddings=args.context,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    model = Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]
    # A padding id makes torch zero that embedding row and never train it; here the row is
    # also the document separator, which the model must learn.
    model.model.embed_tokens.padding_idx = None
    nn.init.normal_(model.model.embed_tokens.weight, std=config.initializer_range)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id,
        eos_token_id=[tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)],
        pad_token_id=config.pad_token_id,
    )
    return model


def rate_factor(step: int, warmup: int, steps: int) -> float:
    """Return the share of the peak learning rate: a linear rise, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def fit(
    args: argparse.Namespace, model: Qwen3ForCausalLM, train: Tensor, held_out: Tensor
) -> list[dict[str, float]]:
    """Train ``model`` in place and return the losses met on the way."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors}],
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, args.warmup, args.steps)
    )
    losses = torch.compile(token_losses) if args.compile else token_losses
    history: list[dict[str, float]] = []
    started = time.perf_counter()
    running = torch.zeros((), device=train.device)
    counted = 0
    source = batches(train, args.context, args.batch_size, args.seed)
    for step in range(1, args.steps + 1):
        with torch.autocast(train.device.type, torch.bfloat16):
            loss = losses(model, next(source)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        running += loss.detach()
        counted += 1
        if step % args.eval_every == 0 or step == args.steps:
            with torch.autocast(train.device.type, torch.bfloat16):
                held_out_loss = evaluate(model, held_out, args.context)
            seconds = round(time.perf_counter() - started, 1)
            record = {"step": step, "seconds": seconds, "held_out": held_out_loss}
            history.append(record | {"train": float(running) / counted})
            print(json.dumps(history[-1]), flush=True)
            running.zero_()
            counted = 0
    return history


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the weights in bf16 together with the tokenizer and its chat template."""
    model.bfloat16().save_pretrained(out)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def read_arguments() -> argparse.Namespace:
    """Read the command line; the defaults are those of the checkpoint in this folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    stdlib = Path(sysconfig.get_path("stdlib"))
    parser.add_argument("--corpus", type=Path, default=stdlib, help="folder of .py files")
    parser.add_argument("--corpus-name", default=f"CPython {platform.python_version()}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--vocab", type=int, default=4096, help="entries, specials included")
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=2048, help="tokens in a training row")
    parser.add_argument("--batch-size", type=int, default=32, help="rows in a step")
    parser.add_argument("--steps", type=int, default=4100)
    parser.add_argument("--warmup", type=int, default=200, help="steps of rising learning rate")
    parser.add_argument("--lr", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--chat", type=float, default=0.1, help="share of chat samples")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of held-out files")
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    return parser.parse_args()


def main() -> None:
    """Run the whole way from sources to a measured checkpoint."""
    args = read_arguments()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")

    corpus = collect_corpus(args.corpus, args.held_out)
    tokenizer = train_tokenizer(corpus.train, args.vocab)
    train = training_stream(tokenizer, corpus.train, args.chat, args.seed).to(device)
    held_out = pack(tokenizer, corpus.held_out).to(device)
    prepared = time.perf_counter()
    print(f"{len(train)} training and {len(held_out)} held-out tokens", flush=True)

    model = build_model(args, tokenizer).to(device)  # type: ignore[arg-type]
    add_dropout(model, args.dropout)
    history = fit(args, model, train, held_out)
    trained = time.perf_counter()

    save(model, tokenizer, args.out)
    saved = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16)
    loss = evaluate(saved.to(device), held_out, args.context)  # type: ignore[arg-type]
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out)
    log = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("corpus", "out")},
        "corpus": {
            "train_files": len(corpus.train),
            "train_tokens": len(train),
            "held_out_files": len(corpus.held_out),
            "held_out_tokens": len(held_out),
            "held_out_bytes": held_out_bytes,
        },
        "parameters": model.num_parameters(),
        "tokens_seen": args.steps * args.batch_size * args.context,
        "history": history,
        "saved_checkpoint_held_out": {
            "nats_per_token": loss,
            "bits_per_byte": loss / math.log(2) * (len(held_out) - 1) / held_out_bytes,
        },
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "minutes": {"prepare": (prepared - started) / 60, "train": (trained - prepared) / 60},
        "versions": {
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.out / "train_log.json").write_text(json.dumps(log, indent=2) + "\n")
    print(json.dumps(log["saved_checkpoint_held_out"]))


if __name__ == "__main__":
    main()
