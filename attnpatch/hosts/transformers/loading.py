"""Loads models and tokenizers from folders or the hub, and builds models of their configs on meta."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import nn

from attnpatch.errors import AnalysisError, AttnpatchError, ExplainError, MissingExtraError, first_line
from attnpatch.releases.tested import is_at_least

ENCODER_DECODER = (
    "{} has an encoder and a decoder, but a conversation is one sequence; give a decoder-only model, or see both "
    "sides of this one with attnpatch.capture(model, blocks=...)"
)


def load_model(
    name: str,
    *,
    device_map: Any = None,
    dtype: Any = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    max_memory: dict[Any, Any] | None = None,
    attention: str = "sdpa",
) -> nn.Module:
    """A causal language model of transformers, in evaluation mode.

    Args:
        name: A folder, or a name on the hub.
        device_map: As in transformers, such as ``"auto"``.
        dtype: ``torch.dtype`` or its name; ``None``: as in the checkpoint.
        load_in_4bit, load_in_8bit: Quantise with bitsandbytes.
        max_memory: Bytes per device, as in accelerate.
        attention: transformers' attention implementation; a model that lacks it gets eager attention.

    Raises:
        AnalysisError: There is no such model, it cannot be loaded this way, or it has an encoder and a decoder.
        MissingExtraError: transformers, accelerate or bitsandbytes is not installed.
    """
    transformers = _transformers()
    if load_in_4bit and load_in_8bit:
        raise AnalysisError("load_in_4bit and load_in_8bit were both given; choose one")
    chosen = "auto" if dtype is None else _dtype(dtype)
    options: dict[str, Any] = {_dtype_argument(): chosen}
    if device_map is not None or max_memory is not None:
        options["device_map"] = device_map or "auto"
    if max_memory is not None:
        options["max_memory"] = max_memory
    if load_in_4bit or load_in_8bit:
        _needs("bitsandbytes", "quantization")
        compute = torch.float32 if chosen == "auto" else chosen
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_type="nf4",
        )  # fmt: skip
    if "device_map" in options:
        _needs("accelerate", "all")
    _check_folder(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        _check_rope(name, config)
        # Loaded as a decoder only, such a checkpoint would lack weights, which would be drawn at random.
        if getattr(config, "is_encoder_decoder", False):
            raise AnalysisError(f"model {name!r}: {ENCODER_DECODER.format('it')}")
        try:
            model, about = transformers.AutoModelForCausalLM.from_pretrained(
                name, attn_implementation=attention, output_loading_info=True, **options
            )
        except ValueError as error:
            if "attn_implementation" not in str(error) and "scaled_dot_product_attention" not in str(error):
                raise
            model, about = transformers.AutoModelForCausalLM.from_pretrained(
                name, attn_implementation="eager", output_loading_info=True, **options
            )
    except AnalysisError:
        raise
    # Damaged files, missing devices, ...: whatever the host raises, the model cannot be loaded.
    except Exception as error:
        raise AnalysisError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    _check_weights(name, model, about["missing_keys"])
    return model.eval()


def _dtype_argument() -> str:
    """The name of the argument for a model's dtype: ``dtype`` since transformers 4.56."""
    return "dtype" if is_at_least("transformers", "4.56") else "torch_dtype"


def _check_rope(name: str, config: Any) -> None:
    """Refuse a checkpoint whose positions this release of transformers would read wrongly.

    transformers 5 saves the base of rotary positions in ``rope_parameters``. An older release does not read that, and
    takes 10,000 for it without a word.
    """
    saved = getattr(config, "rope_parameters", None)
    if is_at_least("transformers", "5.0") or not isinstance(saved, dict):
        return
    if saved.get("rope_theta") not in (None, getattr(config, "rope_theta", None)):
        raise AnalysisError(
            f"model {name!r} was saved by transformers 5, and this release does not read its rope_parameters; install "
            '"transformers>=5", or write its rope_theta into config.json'
        )


def _check_weights(name: str, model: nn.Module, missing: Any) -> None:
    """Check that the checkpoint has all weights that attention depends on; only a head may be drawn at random."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    parameters = {key for key, _ in model.named_parameters()}
    drawn = sorted(key for key in missing if key.startswith(prefix) and key in parameters)
    if drawn:
        raise AnalysisError(
            f"model {name!r} lacks {len(drawn)} weights of its {type(model).__name__}, such as {drawn[0]}, which would be "
            "drawn at random; give a folder with all of them"
        )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        AnalysisError: There is none.
        MissingExtraError: transformers is not installed.
    """
    transformers = _transformers()
    _check_folder(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise AnalysisError(
            f"model {name!r} has no tokenizer that can be loaded: {first_line(error)}"
        ) from error


def built_on_meta(name: str, dtype: str | None, attention: str | None) -> nn.Module:
    """The model of a config, on device meta and so without weights.

    Args:
        name: A folder with a ``config.json``, or a model's name on the hub.
        dtype: A name such as ``"bfloat16"``; ``None``: as the config says, else float32.
        attention: transformers' attention implementation; ``None``: its own choice.

    Raises:
        ExplainError: There is no such config, or no model can be built from it.
        MissingExtraError: transformers is not installed.
    """
    transformers = _transformers()
    _check_folder(name, ExplainError)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        is_there = pathlib.Path(name).exists()
        what = "has a config that cannot be read" if is_there else "is no folder, and not on the hub"
        raise ExplainError(f"model {name!r} {what}: {first_line(error)}") from error
    # A quantised checkpoint's config says how to load it. The shapes are those of the model before quantisation.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = next((getattr(transformers, each, None) for each in config.architectures or []), None)
    wanted = dtype or getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    exact = _dtype(wanted, ExplainError)
    try:
        with torch.device("meta"):
            build = kind._from_config if kind is not None else transformers.AutoModel.from_config
            more = {"attn_implementation": attention} if attention else {}
            return build(config, **{_dtype_argument(): exact}, **more)
    except (ValueError, ImportError, AttributeError) as error:
        raise ExplainError(f"model {name!r} cannot be built of its config: {first_line(error)}") from error


def _check_folder(name: str, failure: type[AttnpatchError] = AnalysisError) -> None:
    folder = pathlib.Path(name)
    if folder.is_file():
        raise failure(f"model {name!r} is a file; give the folder that save_pretrained wrote")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise failure(f"model {name!r} has no config.json; give the folder that save_pretrained wrote")
    looks_like_path = folder.is_absolute() or name.startswith(".") or name.count("/") > 1
    if not folder.exists() and looks_like_path:
        raise failure(f"model {name!r}: there is no such folder; give one, or a name on the hub")


def _dtype(dtype: Any, failure: type[AttnpatchError] = AnalysisError) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise failure(f"dtype={dtype!r} is not accepted; give float32, bfloat16 or float16")
    return found


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError('this needs transformers: pip install "attnpatch[transformers]"') from error
    return transformers


def _needs(name: str, extra: str) -> None:
    try:
        __import__(name)
    except ImportError as error:
        raise MissingExtraError(f'this needs {name}: pip install "attnpatch[{extra}]"') from error
