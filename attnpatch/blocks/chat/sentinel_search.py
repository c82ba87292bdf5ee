"""Finds the contents of messages in a rendered conversation, by sentinels that do not change the rest of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnpatch.blocks.chat.sentinels import Layout, Marked, Marker

# For each rendered message, the positions of its sentinels in the text, and their kinds.
Places = dict[int, list[tuple[int, str]]]

# At most this many renderings are spent on finding the messages that cannot have sentinels at both ends.
_SEARCH = 48


def locate(
    render: Callable[..., str], messages: Sequence[Mapping], text: str, marker: Marker
) -> tuple[Marked, Places] | None:
    """Sentinels that do not change the rest of the rendering, and their positions in it; None if there are none.

    If the template inspects some messages, such as those that begin with a tag, these are found by halving the
    conversation, and their sentinels are placed elsewhere.
    """

    def check(layouts: dict[int, Layout]) -> tuple[Marked, Places] | None:
        marked = marker.mark(layouts)
        if marked is None:
            return None
        try:
            without, places = marked.read(render(marked.messages))
        except Exception:  # a template that inspects a message may refuse it
            return None
        return (marked, places) if without == text else None

    layouts: dict[int, Layout] = dict.fromkeys(range(len(messages)), "beside")
    found = check(layouts)
    if found is None:
        layouts, odd = {}, list(range(len(messages)))
        for layout in ("beside", "outside", "inside"):
            odd = _add_what_fits(layouts, odd, layout, check)
        found = None if odd else check(layouts)
    blank = marker.blank()
    if found is None or not blank:
        return found
    # Most templates write an empty content like any other, so a sentinel in it changes nothing.
    _add_what_fits(layouts, blank, "outside", check)
    return check(layouts) or found


def _add_what_fits(
    layouts: dict[int, Layout], indexes: list[int], layout: Layout, check: Callable[[dict[int, Layout]], Any]
) -> list[int]:
    """Use a layout for all messages that pass ``check`` with it. Halving the list of messages finds them.

    Returns:
        The messages that do not pass, or were not tested before the limit of renderings was reached.
    """
    odd: list[int] = []
    waiting, left = [indexes] if indexes else [], _SEARCH
    while waiting:
        some = waiting.pop()
        left -= 1
        if left < 0:
            odd += some
            continue
        tried = layouts | dict.fromkeys(some, layout)
        if check(tried):
            layouts.update(tried)
        elif len(some) == 1:
            odd += some
        else:
            middle = len(some) // 2
            waiting += [some[middle:], some[:middle]]
    return sorted(odd)
