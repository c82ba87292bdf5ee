"""A block map as a pandas table, one row per cell, or as an array of xarray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpatch.errors import MissingExtraError

if TYPE_CHECKING:
    import pandas
    import xarray

    from attnpatch.maps.block_map import BlockMap


def load_pandas() -> Any:
    """The module pandas.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError('to_dataframe needs pandas; pip install "attnpatch[plot]".') from error
    return pandas


def long_form(block_map: BlockMap) -> pandas.DataFrame:
    """See ``BlockMap.to_dataframe``.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    pandas = load_pandas()
    frames = []
    for sequence in range(block_map.num_sequences):
        one = block_map.select(sequence=sequence)
        queries, keys = one.mass.shape[-2:]
        axes: dict[str, Sequence[int | str]] = {"sequence": [sequence]} if block_map.is_batch else {}
        if one.steps:
            axes["step"] = list(one.steps)
        axes["layer"] = list(one.layers)
        if one.heads != "mean":
            axes["head"] = list(one.heads)
        axes |= {"query": range(queries), "key": range(keys)}
        frame = pandas.MultiIndex.from_product(axes.values(), names=axes.keys()).to_frame(index=False)
        frame["query_label"] = np.array(one.query_labels, dtype=object)[frame["query"]]
        frame["key_label"] = np.array(one.key_labels, dtype=object)[frame["key"]]
        frame["mass"] = one.mass.reshape(-1).numpy()
        if block_map.normalization != "none":
            frame["value"] = one.values.reshape(-1).numpy()
        frames.append(frame)
    return pandas.concat(frames, ignore_index=True)


def labelled_array(one: BlockMap) -> xarray.DataArray:
    """See ``BlockMap.to_xarray``.

    Raises:
        MissingExtraError: xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise MissingExtraError('to_xarray needs xarray; pip install "attnpatch[xarray]".') from error
    coords: dict[str, Any] = {"layer": list(one.layers)}
    if one.steps:
        coords["step"] = list(one.steps)
    if one.heads != "mean":
        coords["head"] = list(one.heads)
    for side, axis in (("query", -2), ("key", -1)):
        labels = getattr(one, f"{side}_labels")
        if one.is_batch:
            count = one.mass.shape[axis]
            whole = [[*names, *[""] * (count - len(names))] for names in labels]
            coords[side] = range(count)
            coords[f"{side}_label"] = (("sequence", side), whole)
        else:
            coords[side] = list(labels)
    facts = {"normalization": one.normalization, **one.metadata}
    return xarray.DataArray(one.to_numpy(), coords=coords, dims=one.dims, name="attention", attrs=facts)
