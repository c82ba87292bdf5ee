"""What every test shares: no network, few threads, repeatable examples, and no patch left behind."""

import gc
import logging
import os
import sys

# Before anything imports transformers: tests never reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from torch import nn

from attnpatch.rows.deferred.handle import pending
from attnpatch.rows.graph import axes

# Inputs of tests are short: so that they come in several steps, a step has fewer rows than elsewhere.
# tests/test_rounding.py has the number that is shipped.
axes.LEAST[axes.ROW] = 4

# pytest's logging plugin is off (setup.cfg): no test reads logs, and it goes through every logger there is, six times a
# test. As with it, what hosts log without a handler of their own is not on stderr.
logging.getLogger().addHandler(logging.NullHandler())

# One thread per xdist worker: two workers with two threads each on two cores would only wait for each other.
torch.set_num_threads(1)

# Examples repeat from run to run, so that a failure in CI is a failure everywhere; HYPOTHESIS_PROFILE=explore
# looks for new ones.
hypothesis.settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "explore", parent=hypothesis.settings.get_profile("ci"), max_examples=2000, derandomize=False
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_OVERRIDABLE = ("scaled_dot_product_attention", "softmax", "multi_head_attention_forward")


def pytest_collection_finish():
    """What was imported by now stays: tests that collect garbage need not go through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fails a test that leaves a mode active or torch's and transformers' functions replaced."""
    for generation in (1, 2):
        if not pending():
            break
        # In the frames of an error that an earlier test expected; short calls are watched as long as it is alive.
        gc.collect(generation)
    functions = {name: getattr(torch.nn.functional, name) for name in _OVERRIDABLE}
    class_forward = nn.MultiheadAttention.forward
    modes = torch._C._len_torch_function_stack()
    hosts = _host_interfaces()
    yield
    assert torch._C._len_torch_function_stack() == modes, "a torch function mode is still active"
    for name, function in functions.items():
        assert getattr(torch.nn.functional, name) is function, f"torch.nn.functional.{name} is still replaced"
    assert nn.MultiheadAttention.forward is class_forward, "nn.MultiheadAttention.forward is still replaced"
    after = _host_interfaces()
    for table, functions in hosts.items():
        assert after[table] == functions, f"transformers' {table} has changed"


def _host_interfaces():
    """The entries of transformers' attention and mask tables, if a test has imported them by now."""
    found = {}
    for module_name, table in (
        ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ):
        module = sys.modules.get(module_name)
        if module is not None:
            found[table] = dict(getattr(module, table, {}).items())
    return found


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    import chats

    return chats.save_model(tmp_path_factory.mktemp("chat_model"))
