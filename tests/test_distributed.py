"""Data parallelism, both kinds of FSDP and tensor parallelism in two gloo processes.

Forced by rows, equal to the same steps without attnpatch, and undone exactly.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import zoo
from torch import nn
from traces import described, first_difference, kind

import attnpatch

WORLD = 2
IDS = zoo.tokens(33, batch=2)


def small_llama(implementation: str = "eager") -> nn.Module:
    # In float64, where another order of summation in a gradient shows only beyond the tenth digit.
    return zoo.BY_NAME["llama"].build(implementation, torch.float64)


def train_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Loss, logits and the local part of every gradient."""
    output = model(IDS, labels=IDS)
    output.loss.backward()
    found = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[f"grad.{name}"] = grad.to_local() if hasattr(grad, "to_local") else grad
        parameter.grad = None
    return found


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        if name.startswith("grad."):
            torch.testing.assert_close(got[name], tensor, rtol=1e-10, atol=1e-12, msg=f"{name} differs")
        else:
            assert torch.equal(got[name], tensor), f"{name} differs"


# -------------------------------------------------------------------------------------------- in two processes


def _work(rank: int, cases: list[Callable[[], None]], folder: str) -> None:
    torch.set_num_threads(1)
    failure = pathlib.Path(folder, f"failure{rank}")
    # Their peer waits for them, so a failure is written down before the group breaks.
    try:
        store = dist.FileStore(str(pathlib.Path(folder, "store")), WORLD)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
        for case in cases:
            case()
        dist.destroy_process_group()
    except BaseException:
        failure.write_text(traceback.format_exc())
        raise


def in_two_processes(cases: list[Callable[[], None]], folder: pathlib.Path) -> None:
    """Run the cases in two processes of one group; what fails there fails here."""
    try:
        torch.multiprocessing.spawn(_work, args=(cases, str(folder)), nprocs=WORLD)
    except Exception as error:
        reasons = [path.read_text() for path in sorted(folder.glob("failure*"))]
        pytest.fail("\n".join(reasons) or str(error))


# --------------------------------------------------------------------------------------------------------- fsdp2


def sharded(model: nn.Module) -> nn.Module:
    """Layer by layer, and the attention modules too: theirs are the classes that both change."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer.self_attn)
        fully_shard(layer)
    return fully_shard(model)


def held(model: nn.Module) -> list[tuple]:
    """Every module's class and what it holds; deeper down FSDP2 shares and numbers things as they come."""
    described(model)  # fails on anything of ours
    return [(kind(type(module)), {k: type(v) for k, v in vars(module).items()}) for module in model.modules()]


def both_orders(tool: Callable[[nn.Module], nn.Module]) -> Iterator[nn.Module]:
    """The tool on a patched model, and the patch on a model with the tool."""
    yield tool(attnpatch.apply(small_llama(), mode="always", rows=7))
    yield attnpatch.apply(tool(small_llama()), mode="always", rows=7)


def fsdp_case() -> None:
    plain = sharded(small_llama())
    expected = train_step(plain)
    for model in both_orders(sharded):
        assert_same(train_step(model), expected)
        assert attnpatch.report(model).totals["by_rows"] == 2
        attnpatch.remove(model)
        assert_same(train_step(model), expected)
        assert type(model).__name__ == "FSDPLlamaForCausalLM"
        assert isinstance(model, torch.distributed.fsdp.FSDPModule)
        difference = first_difference(held(model), held(plain))
        assert not difference, difference


def parallel(model: nn.Module) -> nn.Module:
    """By the model's own plan, as ``from_pretrained`` applies it."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = dist.init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_plan="auto", tp_size=WORLD))
    return apply_tensor_parallelism(model, mesh, plan)


def tensor_parallel_case() -> None:
    """Each process attends with its own heads: plain tensors, which go by rows."""
    plain = parallel(small_llama())
    expected = train_step(plain)
    torch.testing.assert_close(expected["logits"], train_step(small_llama())["logits"])
    for model in both_orders(parallel):
        assert_same(train_step(model), expected)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert attnpatch.report(model).totals["by_rows"] == 4
        attnpatch.remove(model)
        assert_same(train_step(model), expected)
        difference = first_difference(described(model), described(plain))
        assert not difference, difference


def loaded_in_parallel_case() -> None:
    """As people ask for it: ``from_pretrained`` with a plan."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    with tempfile.TemporaryDirectory() as own:
        # transformers saves in the first process only.
        folder = [own]
        dist.broadcast_object_list(folder)
        small_llama().save_pretrained(folder[0])
        dist.barrier()
        config = DistributedConfig(tp_plan="auto", tp_size=WORLD)
        model = AutoModelForCausalLM.from_pretrained(
            folder[0], distributed_config=config, attn_implementation="eager", dtype=torch.float64
        )
        dist.barrier()
    assert model.tp_size == WORLD
    native = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with attnpatch.patched(model, mode="always", rows=7):
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), native)
        assert attnpatch.report(model).totals["by_rows"] == 2
    described(model)


class ShardedAttention(nn.Module):
    """Attention by hand between projections that give distributed tensors."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qkv":
            setattr(self, name, nn.Linear(64, 64, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            each(x).unflatten(-1, (4, 16)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        return (query @ key.transpose(-1, -2) / 4).softmax(-1) @ value


def distributed_tensors_case() -> None:
    """They mean more than their elements: the native call, which is counted."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    model = nn.Sequential(zoo.randomise(ShardedAttention()))
    x = zoo.floats(2, 33, 64)
    parallelize_module(model[0], mesh, {name: ColwiseParallel(use_local_output=False) for name in "qkv"})
    native = model(x)
    with attnpatch.patched(model, mode="always"):
        got = model(x)
        assert isinstance(got, DTensor)
        assert torch.equal(got.full_tensor(), native.full_tensor())
        assert attnpatch.report(model).totals["native"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        [fsdp_case],
        pytest.param(
            [tensor_parallel_case, loaded_in_parallel_case, distributed_tensors_case], marks=pytest.mark.long
        ),
    ],
)
def test_in_two_processes(cases, tmp_path):
    in_two_processes(cases, tmp_path)


# -------------------------------------------------------------------------------------------- as a script wraps models


def wrapped(*arguments: object, **variables: str) -> tuple[list[dict[str, list]], str]:
    """What each process of the script ``wrapped_models.py`` computed, and its stderr."""
    root = pathlib.Path(attnpatch.__file__).parents[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ATTNPATCH")}
    paths = [str(root / "attnpatch" / "activation" / "boot"), str(root), clean.get("PYTHONPATH", "")]
    clean |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, str(pathlib.Path(__file__).parent / "wrapped_models.py"), *map(str, arguments)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_wrapped_models_compute_the_same_bits():
    """DistributedDataParallel, FullyShardedDataParallel and fully_shard, patched before, after, or by the variable."""
    # The models without attnpatch come first, when it is not imported yet.
    given, _ = wrapped("never,before,after", WORLD)
    active, said = wrapped("never", WORLD, ATTNPATCH="1", ATTNPATCH_MODE="always")
    assert len(given) == len(active) == WORLD and len(given[0]) == 24 and len(active[0]) == 8
    for rank in range(WORLD):
        for case in active[rank]:
            expected, none = given[rank][case]
            assert none == 0 and len(expected) == 5
            others = [given[rank][case.replace("never", when)] for when in ("before", "after")]
            for found, by_rows in [*others, active[rank][case]]:
                assert found == expected, case
                assert by_rows == 4, case  # two layers, two steps
    assert "Error" not in said and "left as it is" not in said
