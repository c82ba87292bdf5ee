"""Training a patched model: checkpointing as hosts do it, ``Trainer``, adapters; and data from worker processes.

Losses of a step are the same to the bit. Gradients are sums over rows, taken in another order: they differ from the
native ones as those differ from float64, and so do the losses of later steps.
"""

import functools
import gc

import pytest
import torch
import transformers
import zoo
from torch import nn
from traces import described, first_difference

import attnpatch

STEPS = 4


def small_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    return zoo.BY_NAME["llama"].build("eager", dtype).train()


CHECKPOINTING = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "not_reentrant": {"use_reentrant": False},
}


def lora(model: nn.Module) -> nn.Module:
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)


def losses(model: nn.Module, folder, checkpointing: dict | None) -> list[float]:
    """The loss curve of a short run."""
    from transformers import Trainer, TrainingArguments

    dtype = next(model.parameters()).dtype
    examples = [{"input_ids": ids, "labels": ids} for ids in zoo.tokens(33, batch=2 * STEPS)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=checkpointing,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.train()
    assert next(model.parameters()).dtype == dtype
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["all_weights", "lora"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_trainer(checkpointing, adapted, tmp_path):
    """The same loss curve, as near to the one in float64 as the native one is."""

    def made(dtype: torch.dtype) -> nn.Module:
        return lora(small_llama(dtype)) if adapted else small_llama(dtype)

    exact = torch.tensor(losses(made(torch.float64), tmp_path / "exact", checkpointing))
    native = torch.tensor(losses(made(torch.float32), tmp_path / "native", checkpointing))
    model = attnpatch.apply(made(torch.float32), mode="always", rows=7)
    got = torch.tensor(losses(model, tmp_path / "rows", checkpointing))
    assert len(got) == STEPS
    assert got[0] == native[0], "the first loss depends on no gradient"
    assert native[0] - native[-1] > 0.1, "nothing was learned, so nothing was compared"
    # A loss is about 5; a float32 of that size is rounded by eps times it.
    slack = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * (native - exact).abs().max() + slack
    assert attnpatch.report(model).totals["by_rows"] >= 2 * STEPS
    attnpatch.remove(model)


@pytest.mark.parametrize("first", ["patch", "checkpointing"])
@pytest.mark.parametrize("last", ["patch", "checkpointing"])
@pytest.mark.parametrize("kwargs", list(CHECKPOINTING.values())[1:], ids=list(CHECKPOINTING)[1:])
def test_gradient_checkpointing(kwargs, first, last):
    """Switched on and off before and after the patch: the same loss and the same gradients."""
    ids = zoo.tokens(33, batch=2)

    def step(model: nn.Module) -> dict[str, torch.Tensor]:
        loss = model(ids, labels=ids).loss
        loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return {"loss": loss.detach(), **found}

    def assert_same(got: dict[str, torch.Tensor]) -> None:
        assert torch.equal(got["loss"], exact["loss"])
        for name, tensor in exact.items():
            # Float64: another order of summation shows only beyond the tenth digit.
            torch.testing.assert_close(got[name], tensor, rtol=1e-10, atol=1e-12)

    plain, model = small_llama(torch.float64), small_llama(torch.float64)
    exact = step(plain)
    step(model)
    plain.gradient_checkpointing_enable(kwargs)
    step(plain)
    plain.gradient_checkpointing_disable()
    on = {
        "patch": functools.partial(attnpatch.apply, model, mode="always", rows=7),
        "checkpointing": functools.partial(model.gradient_checkpointing_enable, kwargs),
    }
    off = {
        "patch": functools.partial(attnpatch.remove, model),
        "checkpointing": model.gradient_checkpointing_disable,
    }
    other = {"patch": "checkpointing", "checkpointing": "patch"}
    on[first]()
    on[other[first]]()
    assert_same(step(model))
    # Twice each: forward, and again in the backward pass.
    assert attnpatch.report(model).totals["by_rows"] == 4
    off[other[last]]()
    assert_same(step(model))
    off[last]()
    assert_same(step(model))
    assert not first_difference(described(model), described(plain))


# ------------------------------------------------------------------------------------------------- data workers


class Embedded(torch.utils.data.Dataset):
    """What a patched model makes of sequences, computed in the worker."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        torch.set_num_threads(1)
        with torch.no_grad():
            logits = self.model(zoo.tokens(33, seed=index)).logits
        return {"logits": logits, "by_rows": torch.tensor(attnpatch.report(self.model).totals["by_rows"])}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method):
    """The model works in the workers, on their account, and in the parent meanwhile."""
    model = zoo.BY_NAME["llama"].build("eager")
    fresh = zoo.BY_NAME["llama"].build("eager")
    with torch.no_grad():
        native = [fresh(zoo.tokens(33, seed=index)).logits for index in range(4)]
    # Spawned workers get a pickle, which the hooks of a used transformers model do not survive, patched or not.
    attnpatch.apply(model, mode="always", rows=7)
    loader = torch.utils.data.DataLoader(
        Embedded(model), num_workers=2, multiprocessing_context=method, batch_size=None
    )
    found = []
    for index, item in enumerate(loader):
        found.append({name: tensor.clone() for name, tensor in item.items()})
        if index == 0:
            assert attnpatch.report(model).totals["by_rows"] == 0
    assert all(torch.equal(item["logits"], expected) for item, expected in zip(found, native, strict=True))
    # Each worker served two sequences of two layers, and counted for itself.
    assert [int(item["by_rows"]) for item in found] == [2, 2, 4, 4]
    with torch.no_grad():
        assert torch.equal(model(zoo.tokens(33, seed=0)).logits, native[0])
    assert attnpatch.report(model).totals["by_rows"] == 2
    attnpatch.remove(model)


@pytest.mark.parametrize("applied", ["never", "before", "after"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_checkpoint_that_was_captured_runs_again_after_the_capture(attention, applied):
    """A checkpoint expects as many saved tensors when it runs again, and the backward pass may come later."""
    ids = torch.arange(30)[None]

    def model():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        config = transformers.LlamaConfig(
            vocab_size=97, num_hidden_layers=2, attn_implementation=attention, use_cache=False, **sizes
        )
        made = transformers.LlamaForCausalLM(config).train()
        made.gradient_checkpointing_enable({"use_reentrant": False})
        return made

    native = model()
    native(ids, labels=ids).loss.backward()
    captured = model()
    if applied == "before":
        attnpatch.apply(captured)
    with attnpatch.capture(captured, attnpatch.Blocks.fixed(5)) as maps:
        loss = captured(ids, labels=ids).loss
    with attnpatch.capture(captured, attnpatch.Blocks.fixed(5)) as others, torch.no_grad():
        captured(ids)
    if applied == "after":
        attnpatch.apply(captured, min_tokens=7)
    loss.backward()
    for one, other in zip(captured.parameters(), native.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert maps.block_map.mass.shape == others.block_map.mass.shape == (2, 6, 6)
    del loss
    gc.collect()
    if applied == "never":
        with pytest.raises(attnpatch.errors.PatchError):
            attnpatch.report(captured)
    else:
        assert attnpatch.report(captured).policy.min_tokens == (7 if applied == "after" else 1024)
