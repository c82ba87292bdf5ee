"""Attention as other people formulate it, by rows: what the unpatched module computes, and maps that are right or refused."""

import formulations.table
import formulations.trying
import pytest
import torch
from formulations.page import counts, row

FORMULATIONS = {one.name: one for one in formulations.table.all_of_them()}
# What is wrong today, by the cells of the table; ``docs/formulations.md`` says how.
KNOWN = {
    # By rows its random numbers are others, as those of dropout are.
    "Gumbel noise": {"float32", "bfloat16", "autocast", "gradients", "checkpoint", "reentrant"},
}


# Each third one; all of them in "make test-long" and, with their table, in "make formulations".
SAMPLED = [
    pytest.param(name, marks=[pytest.mark.long] if place % 3 else [])
    for place, name in enumerate(FORMULATIONS)
]


@pytest.mark.parametrize("name", SAMPLED)
def test_a_formulation(name):
    """Results, gradients and a map; the largest tensor is for ``make formulations``."""
    tried = formulations.trying.try_out(FORMULATIONS[name], everything=False)
    wrong = [line for line in tried.wrong if line.split(":")[0] not in KNOWN.get(name, ())]
    assert not wrong, tried


def test_what_is_known_to_be_wrong_exists():
    assert set(KNOWN) <= set(FORMULATIONS)


class Wrong(torch.nn.Module):
    """Attention whose result is another where ``attnpatch`` watches: the table must see it."""

    class Attention(torch.nn.Module):
        def forward(self, x):
            scores = x @ x.transpose(1, 2)
            return (scores if type(scores) is torch.Tensor else scores * 1.001).softmax(-1) @ x

    def __init__(self):
        super().__init__()
        self.attention = self.Attention()

    def forward(self, x):
        return self.attention(x)


def test_a_wrong_result_is_seen():
    one = formulations.table.Formulation("wrong", "", Wrong, formulations.table.sequence)
    tried = formulations.trying.try_out(one)
    assert tried.float32.startswith("WRONG") and tried.gradients.startswith("WRONG") and tried.wrong
    assert "wrong" in counts([(one, tried)]) and "WRONG" in row(one, tried)


def test_a_whole_matrix_is_seen():
    one = FORMULATIONS["eager"]
    tried = formulations.trying.try_out(one)
    assert not tried.is_held and tried.largest[1] > tried.bound
