"""A script that trains models inside DistributedDataParallel and both kinds of FSDP, on the CPU.

Run as a script it prints, for each process and each model, hashes of what it computed (outputs, gradients, the parameters
after two steps), and how many attention calls went by rows. Its arguments: when attnpatch is applied (``before`` or
``after`` a model is wrapped, ``never``), separated by commas, and the number of processes.
"""

import hashlib
import json
import pathlib
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

N, DIM, HEADS = 48, 32, 4


class Attention(nn.Module):
    """By hand, as a paper writes it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        query, key, value = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1)
        )
        weights = (query @ key.transpose(-1, -2) * (DIM // HEADS) ** -0.5).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def net():
    return Net(), torch.randn(2, N, DIM), lambda model: model.layers


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=DIM, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=N, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.randint(97, (2, N)), lambda model: model.model.layers


def fsdp(model, layers):
    kinds = {type(layer) for layer in layers(model)}
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=lambda module, recurse, **_: recurse or type(module) in kinds,
    )  # fmt: skip


def flat_fsdp(model, _):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)


def sharded(model, layers):
    for layer in layers(model):
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {
    "DistributedDataParallel": lambda model, _: DistributedDataParallel(model),
    "FullyShardedDataParallel": fsdp,
    "FullyShardedDataParallel, flat": flat_fsdp,
    "fully_shard": sharded,
}


def digest(tensors):
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    found = hashlib.sha256()
    for tensor in local:
        found.update(tensor.detach().double().contiguous().numpy().tobytes())
    return found.hexdigest()


def trained(wrap, build, when):
    """The hashes of two steps, and how many attention calls went by rows."""
    torch.manual_seed(0)
    model, x, layers = build()
    if when == "before":
        import attnpatch

        attnpatch.apply(model, mode="always")
    wrapped = wrap(model, layers)
    if when == "after":
        import attnpatch

        attnpatch.apply(wrapped, mode="always")
    found = []
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        out = wrapped(x)
        out = getattr(out, "logits", out)
        out.square().mean().backward()
        gradients = [parameter.grad for parameter in wrapped.parameters() if parameter.grad is not None]
        found += [digest([out]), digest(gradients)]
        optimizer.step()
        optimizer.zero_grad()
    found.append(digest(wrapped.parameters()))
    return found, rows_of(model, wrapped)


def rows_of(model, wrapped):
    if "attnpatch.patching.patch" not in sys.modules:
        return 0
    import attnpatch
    from attnpatch.patching.patch import patch_of

    patched = next((each for each in (wrapped, model) if patch_of(each) is not None), None)
    return 0 if patched is None else attnpatch.report(patched).totals["by_rows"]


def work(rank, world, how, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(pathlib.Path(folder, "store")), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = {}
    for when in how.split(","):
        for name, wrap in WRAPPERS.items():
            for build in (net, llama):
                found[f"{name}, {build.__name__}, {when}"] = trained(wrap, build, when)
    pathlib.Path(folder, f"found{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(how, world):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(world, how, folder), nprocs=world)
        print(
            json.dumps(
                [json.loads(pathlib.Path(folder, f"found{rank}").read_text()) for rank in range(world)]
            )
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
