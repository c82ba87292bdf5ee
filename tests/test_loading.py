"""Models as ``from_pretrained`` and accelerate load them: spread over CPU and disk, in 8 and in 4 bits."""

import functools
import gc
import pathlib
from collections.abc import Callable

import pytest
import torch
import zoo
from torch import nn
from traces import described, first_difference

import attnpatch

IDS = zoo.tokens(33, batch=2)
PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model")
    zoo.BY_NAME["llama"].build("eager").save_pretrained(folder)
    return folder


def load(saved: pathlib.Path, **options) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager", **options)


def with_device_map(saved: pathlib.Path, folder: pathlib.Path) -> nn.Module:
    return load(saved, device_map=PLACES, offload_folder=folder)


def with_device_map_auto(saved: pathlib.Path, folder: pathlib.Path) -> nn.Module:
    # So little memory that the second layer has to go to disk.
    return load(saved, device_map="auto", max_memory={"cpu": 150_000}, offload_folder=folder)


def checkpoint_and_dispatch(saved: pathlib.Path, folder: pathlib.Path) -> nn.Module:
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM

    with accelerate.init_empty_weights():
        config = AutoConfig.from_pretrained(saved, attn_implementation="eager")
        model = AutoModelForCausalLM.from_config(config)
    return accelerate.load_checkpoint_and_dispatch(
        model.eval(), str(saved / "model.safetensors"), device_map=PLACES, offload_folder=folder
    )


def quantised(saved: pathlib.Path, _: pathlib.Path, **options) -> nn.Module:
    from transformers import BitsAndBytesConfig

    # 4-bit weights on CPU need rows of whole blocks of 64, which the last projection has not.
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=["down_proj", "lm_head"])
    return load(saved, quantization_config=config, device_map="cpu", dtype=torch.float32)


LOADERS = {
    "device_map": with_device_map,
    "device_map_auto": with_device_map_auto,
    "load_checkpoint_and_dispatch": checkpoint_and_dispatch,
    "bitsandbytes_8bit": functools.partial(quantised, load_in_8bit=True),
    "bitsandbytes_4bit": functools.partial(
        quantised, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
    ),
    "bitsandbytes_nf4_double": functools.partial(
        quantised, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("hooks", ["stay", "taken_off_first"])
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_loaded(loader: Callable, hooks: str, saved, tmp_path):
    """Patched after it was loaded: by rows, the bits that the same loading gives unpatched, and no trace."""
    from accelerate.hooks import remove_hook_from_submodules

    # The forward of a class stays swapped as long as a patched model of another test lives, and loaders keep it.
    gc.collect()
    (tmp_path / "plain").mkdir(), (tmp_path / "patched").mkdir()
    plain, model = loader(saved, tmp_path / "plain"), loader(saved, tmp_path / "patched")
    native = logits(plain)
    logits(model)  # transformers and bitsandbytes settle at the first call, patched or not
    attnpatch.apply(model, mode="always", rows=7)
    assert torch.equal(logits(model), native)
    assert attnpatch.report(model).totals["by_rows"] == 2
    tokens = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, plain.generate(IDS, max_new_tokens=3, do_sample=False))
    if hooks == "taken_off_first":
        remove_hook_from_submodules(model)
        remove_hook_from_submodules(plain)
    attnpatch.remove(model)
    assert not first_difference(described(model), described(plain))
    if hooks == "stay":
        assert torch.equal(logits(model), native)
