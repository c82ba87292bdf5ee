"""Makes block maps from what a recorder has gathered."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.errors import CaptureError
from attnpatch.maps.block_map import BlockMap
from attnpatch.recording.accumulator import SiteSums
from attnpatch.recording.assemble import block_map, measured, together
from attnpatch.recording.text.recorder import Recorder
from attnpatch.recording.text.sequences import Calls
from attnpatch.recording.threads import ELSEWHERE

_NOTHING = (
    "nothing was captured: call the model inside the with block, and uncompiled (torch.compile's graphs are not captured); "
    "attnpatch.report(model) says what its attention sites did"
)
# The message if the model has been called.
_NONE = (
    "nothing was captured: no attention was seen in {0}. None of its modules computes softmax of a product of queries and "
    "keys, or the one that does is compiled (torch.compile's graphs are not captured); attnpatch.report(model) says what its "
    "modules did"
)


def nothing(recorder: Recorder) -> CaptureError:
    """The error that says why there is no map."""
    if recorder.is_elsewhere:
        return CaptureError(f"nothing was captured of {recorder.model_name}: {ELSEWHERE}")
    if not recorder.left_out:
        return CaptureError(_NONE.format(recorder.model_name) if recorder.sequences else _NOTHING)
    reasons = list(recorder.left_out.items())
    more = f" (and {len(reasons) - 3} more in maps.left_out)" if len(reasons) > 3 else ""
    told = "; ".join(f"{name or '(model)'}: {reason}" for name, reason in reasons[:3])
    return CaptureError(f"no attention could be mapped. {told}{more}")


def maps_of(recorder: Recorder, calls: Calls) -> tuple[dict[str, BlockMap], dict[str, str]]:
    """The block maps of one sequence by kind of site, and for each kind without one the reason.

    Args:
        recorder: The recorder.
        calls: The records of the sequence.
    """
    records, apart = _records(calls)
    facts: dict[str, Any] = {"model": recorder.model_name}
    if recorder.is_of_gradient:
        facts["weighting"] = "gradient"
    if recorder.sample_rows is not None:
        facts |= {"sample_rows": recorder.sample_rows, "seed": recorder.seed}
    maps: dict[str, BlockMap] = {}
    problems: dict[str, str] = {}
    for kind, names in _kinds(recorder, records).items():
        # Sites that were asked for and not captured: no path serves them, or too little is known.
        missing = sorted(n for n in recorder.wanted if recorder.places[n][0] == kind and n not in names)
        more: dict[str, Any] = {"num_layers": sum(group == kind for group, _ in recorder.places.values())}
        if missing:
            more["not_captured"] = missing
        notes = list(dict.fromkeys(note for name in names for note in records[name].notes))
        if notes:
            more["notes"] = notes
        steps = [[call.get(name) for name in names] for call in apart]
        try:
            maps[kind] = block_map(
                [records[name] for name in names],
                steps if any(any(step) for step in steps) else [],
                layers=[recorder.place_of(name)[1] for name in names],
                heads=recorder.heads,
                metadata={**facts, "sites": kind, **more},
            )
        except CaptureError as error:
            problems[kind] = str(error)
    return maps, problems


def measured_of(recorder: Recorder, calls: Calls) -> dict[str, dict[str, torch.Tensor]]:
    """The statistics of one sequence, by kind of site and by name; see ``Maps.measured``."""
    if not recorder.measures:
        return {}
    records, _ = _records(calls)
    return {
        kind: measured([records[name] for name in names], recorder.measures)
        for kind, names in _kinds(recorder, records).items()
    }


def records_by_kind(recorder: Recorder, calls: Calls) -> dict[str, dict[str, SiteSums]]:
    """The records of one sequence, by kind of site and then by site."""
    records, _ = _records(calls)
    return {
        kind: {name: records[name] for name in names} for kind, names in _kinds(recorder, records).items()
    }


def _records(calls: Calls) -> tuple[dict[str, SiteSums], list[dict[str, SiteSums]]]:
    """The records of a sequence, and those of each of its calls if calls are kept separate."""
    apart = [call for call in calls.apart if call]
    return {**calls, **together(apart)}, apart


def _kinds(recorder: Recorder, records: dict[str, SiteSums]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    # Sort in the model's order: in a backward pass the last layer comes first.
    order = {name: place for place, name in enumerate(recorder.places)}
    for name in sorted(records, key=lambda name: (order[name.partition(":")[0]], name)):
        kinds.setdefault(recorder.place_of(name)[0], []).append(name)
    return kinds
