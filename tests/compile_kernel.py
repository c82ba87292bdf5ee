"""Compile kernels for GPUs that are not there; prints a line of JSON for each: run by ``test_fused_mass.py``."""

import json
import re
import subprocess
import sys
import tempfile

import one_pass
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnpatch.recording.gpu.fused_sums import shape_for
from attnpatch.recording.gpu.kernel import sum_tiles

POINTERS = {
    "lse": "*fp32", "out": "*fp32", "query_tiles": "*i32", "key_tiles": "*i32", "query_order": "*i32",
    "key_order": "*i32", "heads": "*i32",
}  # fmt: skip
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# What a launch with these values compiles: Triton makes constants of integers that are 1.
LONG = {"dtype": torch.bfloat16, "width": 128, "IS_CAUSAL": True, "EVEN": True, "MASK": 0}
CASES = {
    "causal": LONG,
    "one of everything": {
        **LONG, "ones": ["num_query_tiles", "num_key_tiles", "num_places", "head_count", "group", "l_row"],
    },
    "uneven blocks": {**LONG, "EVEN": False, "FULL_FIRST": True},
    "boolean mask": {**LONG, "IS_CAUSAL": False, "MASK": 1, "mask": "*u8", "EVEN": False, "ones": ["m_key"]},
    "added mask of heads, ordered": {
        **LONG, "IS_CAUSAL": False, "MASK": 2, "mask": "*bf16", "MASK_OF_HEADS": True, "ordered": True, "ones": ["m_key"],
    },
    "float32": {**LONG, "dtype": torch.float32},
    "narrow tiles, wide heads": {**LONG, "EVEN": False, "ROWS": 16, "KEYS": 16, "width": 256},
    "causal, capability 8.0": {**LONG, "capability": 80},
    "float32, capability 8.6": {**LONG, "dtype": torch.float32, "capability": 86},
    "float32, wide heads, capability 8.6": {**LONG, "dtype": torch.float32, "width": 256, "capability": 86},
    "wide heads, capability 8.6": {**LONG, "width": 256, "capability": 86},
}  # fmt: skip


def mass(case):
    """The kernel of block mass."""
    dtype, width, capability = case["dtype"], case["width"], case.get("capability", 90)
    shape, ordered = shape_for(dtype, width, case["MASK"] != 0), case.get("ordered", False)
    constants = {
        "HEAD_DIM": width, "WIDTH": width, "ROWS": case.get("ROWS", shape.rows), "KEYS": case.get("KEYS", shape.keys),
        "KEY_TILES": shape.key_tiles, "QUERY_ORDERED": ordered, "KEY_ORDERED": ordered,
        "EVEN": case["EVEN"], "FULL_FIRST": case.get("FULL_FIRST", case["EVEN"]), "IS_CAUSAL": case["IS_CAUSAL"], "MASK": case["MASK"],
        "MASK_OF_HEADS": case.get("MASK_OF_HEADS", False),
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        **dict.fromkeys(["q_dim", "k_dim", *case.get("ones", [])], 1),
    }  # fmt: skip
    kind = f"*{NAMES[dtype]}"
    types = {**POINTERS, "query": kind, "key": kind, "mask": case.get("mask", kind), "scale": "fp32"}
    return compiled(sum_tiles, constants, types, capability, shape.warps, shape.stages)


def both(shape):
    """Attention and block mass in one pass."""
    constants = {
        "WIDTH": 128, "ROWS": shape.rows, "KEYS": shape.keys, "BLOCK": 128, "IS_CAUSAL": True, "PRECISION": "ieee",
    }  # fmt: skip
    types = {
        **dict.fromkeys(("query", "key", "value", "out"), "*bf16"),
        **dict.fromkeys(("sums", "kept"), "*fp32"),
        "scale": "fp32",
    }
    return compiled(one_pass.attend_and_sum, constants, types, 90, shape.warps, shape.stages)


def compiled(function, constants, types, capability, warps, stages):
    """Registers of a thread, bytes of shared memory and of spills, and whether matrix units are used."""
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or re.match("[qklmvo]_", name)]
    aligned = [name for name in aligned if signature[name] != "constexpr"]
    source = ASTSource(
        function,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        architecture = f"sm_{capability}{'a' if capability == 90 else ''}"
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"-arch={architecture}",
            file.name,
            "-o",
            "/dev/null",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "shared": kernel.metadata.shared,
        "threads": 32 * warps,
        "matrix units": bool(re.search(r"wgmma|mma\.sync", kernel.asm["ptx"])),
    }


found = {name: lambda case=case: mass(case) for name, case in CASES.items()}
found |= {f"one pass, {shape}": lambda shape=shape: both(shape) for shape in one_pass.SHAPES}
for name in sys.argv[1:] or found:
    print(json.dumps({"case": name, **found[name]()}), flush=True)
