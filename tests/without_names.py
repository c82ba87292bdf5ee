"""Takes each private name of torch away from ``attnpatch/compat.py``, and prints what attnpatch does then.

    python tests/without_names.py        # one line of JSON for each name, or for those that are given

A name that torch no longer has is one that ``compat`` does not find: a copy of its code runs, in which the name is
replaced by a word that torch does not have. torch itself is not changed, since it uses these names too. Each name is
tried in a process of its own, which begins with torch imported and attnpatch not.
"""

import ast
import importlib.abc
import importlib.util
import json
import os
import pathlib
import sys
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
NOWHERE = "_no_such_name"
COMPAT = pathlib.Path(__file__).parents[1] / "attnpatch" / "compat.py"
# What ``compat`` calls modules of torch that it imports by a path without an underscore.
ROOTS = ("torch", "checkpoint", "forward_ad", "sys")


class Names(ast.NodeTransformer):
    """Collects the private names of torch in a file, as ``owner.name``, and replaces one of them.

    Args:
        gone: The name that is replaced.
    """

    def __init__(self, gone=None):
        self.gone, self.found = gone, []

    def is_gone(self, words):
        if "._" not in f".{words}":
            return False
        self.found.append(words)
        return words == self.gone

    def visit_ImportFrom(self, node):
        for alias in node.names if node.module.startswith("torch") else ():
            if self.is_gone(f"{node.module}.{alias.name}"):
                alias.asname, alias.name = alias.asname or alias.name, NOWHERE
        return node

    def visit_Attribute(self, node):
        words = ast.unparse(node)
        if words.split(".")[0] not in ROOTS:
            return self.generic_visit(node)
        if self.is_gone(words):
            node.attr = NOWHERE
        return node

    def visit_Call(self, node):
        if not isinstance(node.func, ast.Name) or node.func.id not in ("getattr", "hasattr"):
            return self.generic_visit(node)
        owner, name = node.args[:2]
        root = ast.unparse(owner).split(".")[0]
        if (
            root in ROOTS
            and isinstance(name, ast.Constant)
            and self.is_gone(f"{ast.unparse(owner)}.{name.value}")
        ):
            name.value = NOWHERE
        if isinstance(owner, ast.Call):
            self.visit(owner)
        return node


def names_in(source):
    """The private names of torch that some code uses, each once."""
    names = Names()
    names.visit(ast.parse(source))
    return list(dict.fromkeys(names.found))


class Compat(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports ``attnpatch.compat`` without one name."""

    def __init__(self, gone):
        self.gone = gone

    def find_spec(self, name, path=None, target=None):
        if name == "attnpatch.compat":
            return importlib.util.spec_from_loader(name, self, origin=str(COMPAT))
        return None

    def exec_module(self, module):
        tree = Names(self.gone).visit(ast.parse(COMPAT.read_text(encoding="utf-8")))
        exec(compile(ast.fix_missing_locations(tree), str(COMPAT), "exec"), vars(module))


def model_and_input():
    """Attention by products, by SDPA with dense math and by torch's encoder layer."""
    import torch
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            q, k, v = (each(x).unflatten(-1, (4, 8)).transpose(1, 2) for each in (self.q, self.k, self.v))
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                dense = scaled_dot_product_attention(q, k, v)
            scored = torch.softmax(q @ k.mT / 3, -1) @ v
            return (dense + scored + scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True))
    return model.eval(), torch.randn(2, 40, 32)


def trained(model, run):
    """The gradients of a model's parameters after a call."""
    model.zero_grad()
    run().square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def agree(some, others):
    import torch

    most = max(
        float(theirs.abs().max()) for theirs in others
    )  # that of a key's bias is 0, apart from rounding
    pairs = zip(some, others, strict=True)
    return all(torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * most) for mine, theirs in pairs)


def selective(model, x):
    """A call under a selective checkpoint that keeps the results of products."""
    import torch
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    kept = [torch.ops.aten.bmm.default, torch.ops.aten.addmm.default]
    return checkpoint(
        model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(kept)
    )


def outcome(model, x, native, calls, gradients):
    """What a user sees of a model with attnpatch, and what ``attnpatch doctor`` would say is off."""
    import torch

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        import attnpatch

        attnpatch.apply(model, mode="always")
        with torch.no_grad():
            is_same = torch.equal(model(x), native)
        differ = [name for name, call in calls.items() if not agree(trained(model, call), gradients[name])]
        report = attnpatch.report(model)
        attnpatch.remove(model)
        refusal = refused(attnpatch, model, x)
    from attnpatch.activation.examination import features_off

    return {
        "is_same": is_same,
        "differ": differ,
        "by_rows": 0 if isinstance(report, str) else report.totals["by_rows"],
        "refusal": refusal,
        "warnings": [str(each.message) for each in record if "attnpatch" in str(each.message)],
        "off": features_off(),
    }


def refused(attnpatch, model, x):
    """The words in which a capture is refused; empty if it gives a map."""
    try:
        with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)) as maps:
            model(x)
        assert maps["*.self_attn"].mass.shape[-1] == 5
    except attnpatch.errors.ReleaseError as error:
        return str(error)
    return ""


def main():
    import torch
    from torch.utils.checkpoint import checkpoint

    torch.set_num_threads(1)
    model, x = model_and_input()
    calls = {
        "plain": lambda: model(x),
        "checkpoint": lambda: checkpoint(model, x, use_reentrant=False),
        "selective": lambda: selective(model, x),
    }
    with torch.no_grad():
        native = model(x)
    gradients = {name: trained(model, call) for name, call in calls.items()}
    # First with every name.
    for gone in sys.argv[1:] or ["", *names_in(COMPAT.read_text(encoding="utf-8"))]:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            if gone:
                sys.meta_path.insert(0, Compat(gone))
            found = outcome(model, x, native, calls, gradients)
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        finally:
            print(json.dumps({"name": gone, **found}), flush=True)
            os._exit(0)


if __name__ == "__main__":
    main()
