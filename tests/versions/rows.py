"""The releases that attnpatch is run with: one environment for each row, as data."""

from __future__ import annotations

import dataclasses

WHOLE_MASKS = (
    "masks by rows: Llama, sdpa",
    "masks by rows: Mistral, eager",
    "masks by rows: Bert, sdpa",
)
# Tests of what attnpatch itself computes, and the reason why a release may change their results. They need torch, and of
# the hosts little or nothing. Not here: files on text, blocks, pages and command lines.
CORE = {
    "test_operators.py": "torch's functions: their names, arguments, results, gradients",
    "test_spellings.py": "torch's functions: all ways to write a product",
    "test_biases.py": "masks and biases, whose kernels and strides torch chooses",
    "test_dense.py": "bits of torch's dense math",
    "test_sdpa_call.py": "which kernel scaled_dot_product_attention chooses, and its logsumexp",
    "test_edges.py": "autograd: hooks, checkpoints, saved tensors",
    "test_indexing.py": "torch's indexing, and what it warns of",
    "test_views.py": "torch's views: strides, versions, writes in place",
    "test_steps.py": "torch's functions: their strides, dtypes, meta kernels",
    "test_shortage.py": "how torch and models of transformers allocate, and raise errors for memory",
    "test_block_map.py": "numpy and safetensors: dtypes, pickles, headers of files",
}
# Tests that build models of transformers from configs of the newest releases, or are about releases to come.
HOSTS = (
    "test_exact.py", "test_gradients.py", "test_masks.py", "test_deferred_weights.py", "test_capture.py",
    "test_activation_session.py", "test_degraded.py", "test_without_names.py",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One set of releases.

    Attributes:
        name: What the row stands for.
        python: The interpreter, such as ``"3.10"``.
        packages: Pinned releases, as pip takes them.
        off: Features of the smoke that fail there, and the change of the host that is the reason.
        tests: Test files that run after the smoke.
    """

    name: str
    python: str
    packages: tuple[str, ...]
    off: dict[str, str] = dataclasses.field(default_factory=dict)
    tests: tuple[str, ...] = tuple(CORE)


_BEFORE_MASKING_UTILS = (
    "transformers 4.53 brought functions that make a mask for some rows; before, each model writes its own"
)
_OLD = dict.fromkeys(WHOLE_MASKS, _BEFORE_MASKING_UTILS)

ROWS = (
    Row(
        "pins of research code", "3.10",
        ("torch==2.6.0", "transformers==4.46.3", "diffusers==0.31.0", "numpy==1.26.4"),
        off=_OLD,
    ),
    # With the oldest releases of everything that pyproject.toml declares, apart from what another row has.
    Row(
        "the oldest torch", "3.11",
        (
            "torch==2.5.1", "transformers==4.51.3", "diffusers==0.33.1", "numpy==1.26.4", "wrapt==1.16.0",
            "safetensors==0.4.3", "psutil==5.9.0", "accelerate==1.0.0", "bitsandbytes==0.46.0", "matplotlib==3.9.0",
            "pandas==2.2.0", "typer==0.19.0", "rich==13.7.0", "xarray==2024.7.0",
        ),
        off=_OLD,
    ),
    Row(
        "transformers 4.57", "3.12",
        ("torch==2.8.0", "transformers==4.57.6", "diffusers==0.35.2", "numpy==2.2.6"),
        off={"masks by rows: Bert, sdpa": "transformers 5.0 moved BERT's mask to masking_utils"},
    ),
    Row("transformers 5.0", "3.13", ("torch==2.9.1", "transformers==5.0.0", "diffusers==0.36.0", "numpy==2.2.6")),
    # The releases of torch between, with releases of transformers and diffusers of their time: the smoke alone.
    Row(
        "torch 2.7", "3.12", ("torch==2.7.1", "transformers==4.53.3", "diffusers==0.34.0"), tests=(),
        off={"masks by rows: Bert, sdpa": "transformers 5.0 moved BERT's mask to masking_utils"},
    ),
    Row("torch 2.10", "3.13", ("torch==2.10.0", "transformers==5.3.0", "diffusers==0.37.1"), tests=()),
    Row("torch 2.11", "3.13", ("torch==2.11.0", "transformers==5.8.1", "diffusers==0.38.0"), tests=()),
    Row("torch 2.12", "3.13", ("torch==2.12.1", "transformers==5.16.1", "diffusers==0.40.0"), tests=()),
    Row("Python 3.14", "3.14", ("torch==2.14.1", "transformers==5.24.0", "diffusers==0.42.1", "bitsandbytes==0.50.2")),
    Row(
        "the newest of everything", "3.11",
        ("torch==2.14.1", "transformers==5.24.0", "diffusers==0.42.1", "bitsandbytes==0.50.2"),
        tests=(*CORE, *HOSTS),
    ),
)  # fmt: skip
