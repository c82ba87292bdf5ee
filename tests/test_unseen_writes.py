"""Tokens that are written over where no function of torch is seen: by numpy, at an address, scripted, by another thread."""

import ctypes
import threading
import warnings

import numpy as np
import pytest
import torch
from test_known_facts import captured, tokens
from test_moved_tokens import BACK, ORDER, SQUARE, Model, MovedInside, is_mapped

import attnpatch
from attnpatch.rows.provenance.unseen_writes import sum_of_sample


def by_numpy(x):
    array = x.numpy()
    array[:] = array[:, ::-1].copy()
    return x


def by_an_earlier_array(x):
    array = x.numpy()
    y = x * 2
    array[:] = array[:, ::-1].copy()
    return x + y * 0


def by_asarray(x):
    array = np.asarray(x)
    array[:] = array[:, ::-1].copy()
    return x


def by_dlpack(x):
    torch.from_dlpack(x).copy_(x.flip(1))
    return x


def at_an_address(x):
    other = x.flip(1).contiguous()
    ctypes.memmove(x.data_ptr(), other.data_ptr(), x.numel() * 4)
    return x


def into_the_storage(x):
    x.untyped_storage().copy_(x.flip(1).contiguous().untyped_storage())
    return x


def by_set(x):
    return x.set_(x.flip(1))


@torch.jit.script
def _scripted(x):
    x.copy_(x.flip(1))
    return 1


def scripted(x):
    _scripted(x)
    return x


def by_a_thread(x):
    thread = threading.Thread(target=torch.inference_mode(x.is_inference())(lambda: x.copy_(x.flip(1))))
    thread.start()
    thread.join()
    return x


@torch.library.custom_op("attnpatch_tests::turn_", mutates_args=("x",))
def turn_(x: torch.Tensor) -> None:
    x.copy_(x.flip(1))


def by_an_operator(x):
    torch.ops.attnpatch_tests.turn_(x)
    return x


LIBRARY = torch.library.Library("attnpatch_tests_of_c", "DEF")
LIBRARY.define("turn_into(Tensor x, Tensor(a!) out) -> ()")
LIBRARY.impl("turn_into", lambda x, out: out.numpy().__setitem__(..., x.flip(1).numpy()), "CPU")


def by_an_operator_in_place(x):
    """Which torch does not count."""
    torch.ops.attnpatch_tests_of_c.turn_into(x, x)
    return x


def by_an_operator_into_new_memory(x):
    """As kernels of other libraries return what they make."""
    y = torch.empty_like(x)
    torch.ops.attnpatch_tests_of_c.turn_into(x, y)
    return y


def at_the_address_of_new_memory(x):
    y, other = torch.empty_like(x), x.flip(1).contiguous()
    ctypes.memmove(y.data_ptr(), other.data_ptr(), x.numel() * 4)
    return y


def through_data(x):
    x.data[:] = x.flip(1)
    return x


def through_a_detached(x):
    x.detach().copy_(x.flip(1))
    return x


def under_a_view(x):
    view = x[:]
    x.copy_(x.flip(1))
    return view


def over_a_base(x):
    view = x.view(2, 4, 6, 32)
    view.copy_(x.flip(1).view(2, 4, 6, 32))
    return x


def by_an_overload(x):
    torch.ops.aten.copy_.default(x, x.flip(1))
    return x


def sorted_out(x):
    y, places = torch.empty_like(x), torch.empty(x.shape, dtype=torch.int64)
    torch.sort(x, 1, True, out=(y, places))
    return y


def joined_out(x):
    y = torch.empty_like(x)
    torch.cat([x[:, 12:], x[:, :12]], 1, out=y)
    return y


def selected_out(x):
    y = x.clone()
    torch.index_select(x, 1, ORDER, out=y)
    return y


def multiplied_out(x):
    y = x.clone()
    torch.matmul(SQUARE, x, out=y)
    return y


def in_a_row(x):
    """A scripted function, and one that is seen."""
    _scripted(x)
    return x.mul_(2)


WRITES = (
    by_numpy, by_an_earlier_array, by_asarray, by_dlpack, at_an_address, into_the_storage, by_set, scripted, by_a_thread,
    by_an_operator, by_an_operator_in_place, by_an_operator_into_new_memory, at_the_address_of_new_memory, through_data,
    through_a_detached, under_a_view, over_a_base, by_an_overload, sorted_out, joined_out, selected_out, multiplied_out, in_a_row,
)  # fmt: skip
UNSEEN = {write.__name__: write for write in WRITES}
UNSEEN |= {
    "index_copy_": lambda x: x.index_copy_(1, ORDER, x.clone()),
    "index_put_": lambda x: x.index_put_((torch.arange(2)[:, None], ORDER[None]), x.clone()),
    "masked_scatter_": lambda x: x.masked_scatter_(torch.ones_like(x, dtype=torch.bool), x.flip(1)),
    "scatter_": lambda x: x.scatter_(1, ORDER[None, :, None].expand_as(x), x.clone()),
    "a swap in place": lambda x: x.view(2, 4, 6, 32).transpose_(1, 2).reshape(2, 24, 32),
    "as_strided_": lambda x: x.as_strided_((2, 4, 6, 32), (768, 32, 128, 1)).reshape(2, 24, 32),
    "lerp_": lambda x: x.lerp_(x.flip(1), 1.0),
    "put_": lambda x: x.put_(torch.arange(x.numel()).view(x.shape).flip(1), x.clone()),
    "map_": lambda x: x.map_(x.flip(1), lambda a, b: b),
}


@pytest.mark.parametrize("is_inside", [False, True], ids=["between", "inside"])
@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_written_over_unseen_is_left_out(name, is_inside, mode):
    with mode():
        left_out_if_written_over(name, is_inside)


def left_out_if_written_over(name, is_inside):
    change, ids = UNSEEN[name], torch.cat([tokens(24), tokens(24, 2)])
    numbers = torch.arange(1.0, 49).view(2, 24, 1).expand(2, 24, 32).clone()
    assert not torch.equal(change(numbers.clone()), numbers)
    model = Model(lambda x: x if is_inside else change(x.clone())).eval()
    if is_inside:
        model.layers[1] = MovedInside(lambda x: change(x.clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attnpatch.capture(model, attnpatch.Blocks.fixed(8)) as maps:
            model(ids)
    left = ["layers.1"] if is_inside else ["layers.0", "layers.1"]
    assert sorted(maps.left_out) == left, maps.left_out
    assert not any("no softmax" in why for why in maps.left_out.values()), maps.left_out


def read_by_numpy(x):
    float(x.numpy().sum())
    return x * 1


def at_an_address_read(x):
    x.data_ptr()
    return x


def written_alike(x):
    """The same numbers, and others in the same places where that is seen."""
    array = x.numpy()
    array[:] = array.copy()
    return x.mul_(2).clamp_(-100, 100)


def seen_in_place(x):
    y = x.clone()
    y += 1
    y.relu_().mul_(2)
    y[:, 3:7] = x[:, 3:7]
    y.copy_(x)
    view = y.view(2, 4, 6, 32)
    view.add_(1)
    torch.add(y, 1, out=y)
    return torch.nn.functional.dropout(torch.nn.functional.silu(y, inplace=True), 0.5, False, True)


SEEN = {
    "read by numpy": read_by_numpy,
    "its address": at_an_address_read,
    "written alike": written_alike,
    "in place": seen_in_place,
}


@pytest.mark.parametrize("is_inside", [False, True], ids=["between", "inside"])
@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_only_read_or_seen_is_mapped(name, is_inside, mode):
    with mode():
        mapped_if_read_or_seen(name, is_inside)


def mapped_if_read_or_seen(name, is_inside):
    change = SEEN[name]
    model = Model((lambda x: x) if is_inside else change).eval()
    if is_inside:
        for i in range(2):
            model.layers[i] = MovedInside(change)
    is_mapped(model, torch.cat([tokens(24), tokens(24, 2)]))


ALPHA = torch.zeros(2, 24, 32)
NOTHING = {
    "times 0": lambda x: x * 0 + x.flip(1),
    "times a tensor of zeros": lambda x: x * ALPHA + x.flip(1),
    "times zeros, and places": lambda x: x * 0 + torch.arange(24.0)[:, None] / 24 + x.flip(1),
    "minus itself": lambda x: x - x + x.flip(1),
    "masked out": lambda x: x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0) + x.flip(1),
    "some masked out": lambda x: x * (torch.arange(24) % 2)[:, None] + x.flip(1),
    "one number for all": lambda x: x * 0.0 + 1 + x.flip(1),
    "the same in all places": lambda x: x * ALPHA + x.mean(1, keepdim=True) + x.flip(1),
    "rounded away": lambda x: x * 1e-20 + x.flip(1),
    "subtracted": lambda x: x.flip(1) - x * ALPHA,
    "in place": lambda x: (x * ALPHA).add_(x.flip(1)),
    "beside the others": lambda x: torch.cat([x * ALPHA, x.flip(1)], 2) @ torch.ones(64, 32),
    "a product along tokens": lambda x: x * ALPHA + SQUARE @ x,
    "picked": lambda x: x * ALPHA + x[:, BACK],
}


@pytest.mark.parametrize("is_inside", [False, True], ids=["between", "inside"])
@pytest.mark.parametrize("name", NOTHING)
@torch.no_grad()
def test_a_residual_without_tokens_says_nothing(name, is_inside):
    change, ids = NOTHING[name], torch.cat([tokens(24), tokens(24, 2)])
    model = Model(lambda x: x if is_inside else change(x)).eval()
    if is_inside:
        model.layers[1] = MovedInside(change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(ids))
    left = ["layers.1"] if is_inside else ["layers.0", "layers.1"]
    assert sorted(maps.left_out) == left, maps.left_out


RESIDUALS = {
    "small": lambda x: x * 1e-3 + x.flip(1),
    "a branch that begins at nothing": lambda x: x + x.flip(1) * ALPHA,
    "scaled by channel": lambda x: x * torch.linspace(0, 1, 32) + x.flip(1),
}


@pytest.mark.parametrize("name", RESIDUALS)
@torch.no_grad()
def test_residuals_are_mapped(name):
    model, ids = Model(RESIDUALS[name]).eval(), torch.cat([tokens(24), tokens(24, 2)])
    assert not captured(model, lambda: model(ids)).left_out


class Padded(Model):
    """Padding is zeros before anything else."""

    def forward(self, ids, mask):
        x = self.embed(ids) * mask[..., None]
        x = x + self.before(x)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


@torch.no_grad()
def test_padding_that_is_zeros_is_no_token_that_is_lost():
    model, ids = Padded(lambda x: SQUARE @ x), torch.cat([tokens(24), tokens(24, 2)])
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    assert not captured(model.eval(), lambda: model(ids, mask)).left_out
    with pytest.warns(Warning, match="code that attnpatch cannot follow"):
        maps = captured(model, lambda: model(ids, mask.float()))
    assert sorted(maps.left_out) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("count", [1, 16, 17, 300, 4000])
@torch.inference_mode()
def test_the_checksum_of_a_memory_differs_if_two_of_its_rows_change_places(count, dtype):
    x = torch.randint(0, 2, (count + 1, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = sum_of_sample(x)
    assert sum_of_sample(x[3:]) == before == sum_of_sample(x.T)
    for one in {0, count // 2, count - 1}:
        changed = x.clone()
        changed[[one, one + 1]] = x[[one + 1, one]]
        assert sum_of_sample(changed) != before
