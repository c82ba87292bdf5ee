"""Small denoisers called by themselves, and what their attention is without attnpatch."""

import contextlib

import numpy as np
import torch
from dense_images import recording

import attnpatch

TEXT = 12


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(denoiser, inputs):
    with torch.no_grad():
        return denoiser(**inputs, return_dict=False)[0]


def captured(denoiser, inputs, **options):
    """What a denoiser's own probabilities are, and its maps; what it returns is the same."""
    with recording(denoiser) as calls:
        native = run(denoiser, inputs)
    with attnpatch.capture(denoiser, **options) as maps:
        made = run(denoiser, inputs)
    assert torch.equal(native, made)
    return calls[0].sites, maps


def assert_joint(maps, sites, text_first, image, text=TEXT):
    """Image to image and image to words, of the first picture; all else is in no block."""
    start = text if text_first else 0
    places = range(start, start + image)
    words = range(text) if text_first else range(image, image + text)
    block_map = maps["joint"]
    shown = [name for name in block_map.layers if name in sites]
    assert shown
    for name in shown:
        layer = block_map.mass[block_map.layers.index(name)].numpy()
        dense = sites[name][0].mean(0)
        for row in range(image):
            mine = dense[places[row]]
            expected = [*(mine[word] for word in words), *(mine[place] for place in places)]
            assert np.abs(layer[text + row] - expected).max() < 1e-6
    assert block_map.metadata["query_tiles"][1] * block_map.metadata["query_tiles"][2] == image


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.heads = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), 2

    def forward(self, hidden_states, context=None):
        context = hidden_states if context is None else context
        query = self.to_q(hidden_states).unflatten(-1, (2, 8)).transpose(1, 2)
        key = self.to_k(context).unflatten(-1, (2, 8)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)


@contextlib.contextmanager
def recording_of(denoiser):
    """float64 probabilities of the one attention of a module of ours."""
    found = []

    def keep(attention, args):
        hidden, context = args[0], args[-1]
        query = attention.to_q(hidden).unflatten(-1, (2, 8)).transpose(1, 2).double()
        key = attention.to_k(context).unflatten(-1, (2, 8)).transpose(1, 2).double()
        found.append(torch.softmax(query @ key.mT / 8**0.5, -1).numpy())

    handle = denoiser.attention.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
