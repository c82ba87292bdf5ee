"""Where the contents of messages are in a rendered conversation, by marks that change nothing else in it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnpatch.blocks.chat.sentinels import Layout, Marked, Marker

# Of each message that came out, the characters of the text where its marks were, and which.
Places = dict[int, list[tuple[int, str]]]

# Renderings spent on finding the messages that cannot be marked at both ends.
_SEARCH = 48


def locate(
    render: Callable[..., str], messages: Sequence[Mapping], text: str, marker: Marker
) -> tuple[Marked, Places] | None:
    """Marks that change nothing else in the rendering, and where they come out; None if any would.

    Messages that the template looks into, such as those that begin with a tag, are found by halving the
    conversation and marked at other places.
    """

    def check(layouts: dict[int, Layout]) -> tuple[Marked, Places] | None:
        marked = marker.mark(layouts)
        if marked is None:
            return None
        try:
            without, places = marked.read(render(marked.messages))
        except Exception:  # a template may refuse what it looks into
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
    # Most templates write an empty content as any other; a mark in it then changes nothing either.
    _add_what_fits(layouts, blank, "outside", check)
    return check(layouts) or found


def _add_what_fits(
    layouts: dict[int, Layout], indexes: list[int], layout: Layout, check: Callable[[dict[int, Layout]], Any]
) -> list[int]:
    """Give a layout to the messages that pass the check with it, found by halving.

    Returns:
        The messages that do not, or were not looked at before the search was given up.
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
