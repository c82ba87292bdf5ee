"""Prompts changed as people change them, and what a pipeline without attnpatch puts on a text token.

What is right comes from float64 probabilities (``dense_images.recording``): the mean of a token's column over sites,
heads, steps and the image.
"""

import functools

import numpy as np
import torch
from dense_images import pipe_of, recording
from pipelines import NEGATIVE, PROMPT, SIZE

WORDS = PROMPT.split()
NUMBERS = {"num_inference_steps": 2, "output_type": "np", **SIZE}


def sample(pipe, prompt=None, **more):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **{**NUMBERS, **more})


def probabilities(pipe, denoiser="unet", **call):
    """Every call's probabilities, float64 ``[batch, heads, q_len, kv_len]`` by site, of an unpatched pipeline."""
    with recording(getattr(pipe, denoiser)) as calls:
        sample(pipe, **call)
    return calls


def column(calls, row, tokens, end="attn2"):
    """float64 ``[8, 8]``: what the image puts on some tokens, in sum; the mean over sites, heads and steps."""
    found = []
    for call in calls:
        for name, site in call.sites.items():
            if name.endswith(end):
                total = 0
                for token in tokens:
                    total = total + site[row, :, :, token].mean(0)
                found.append(total.reshape(8, 8))
    return np.mean(found, axis=0)


def assert_shows(heat, expected):
    """A heat map in tiles of a half of the site's tokens."""
    assert heat.shape == (16, 16)
    assert np.abs(heat - np.kron(expected, np.ones((2, 2)))).max() < 1e-6


@functools.cache
def encodings():
    """What the text encoder says of the prompt, of nothing, and of the negative prompt: ``[1, 72, 32]`` each."""
    pipe = pipe_of("sd15")
    given, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    return given, pipe.encode_prompt("", "cpu", 1, False)[0], negative


# What people do to the embeddings of a prompt: ``given`` those of PROMPT, ``empty`` those of no text.


def scaled(given, _):
    """One word by a factor."""
    given[:, 2] *= 1.3
    return given


def away_from_nothing(given, empty):
    """As compel weights: away from the embeddings of no text, word by word."""
    weights = torch.ones(1, 72, 1)
    weights[:, 2], weights[:, 5:7] = 1.4, 0.6
    return empty + (given - empty) * weights


def all_words(given, empty):
    """Every word of the prompt."""
    weights = torch.ones(1, 72, 1)
    weights[:, 1:12] = 1.2
    return empty + (given - empty) * weights


def same_mean(given, _):
    """As the web UI weights: the mean is put back, which changes every token."""
    before = given.mean()
    given[:, 2] *= 1.3
    return given * (before / given.mean())


def taken_back(given, empty):
    """All of it, half of the way to no text: no token is as it was returned."""
    return (given + empty) / 2


def noise(given, _):
    """What nobody returned, in the place of one word."""
    given[:, 2] = torch.randn(32, generator=torch.Generator().manual_seed(5))
    return given


def nothing(given, _):
    """A word put out."""
    given[:, 2] = 0
    return given


CHANGES = [scaled, away_from_nothing, all_words, same_mean, taken_back, noise, nothing]
