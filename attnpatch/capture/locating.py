"""Where the contents of messages are in a rendered conversation, by marks that change nothing else in it."""

from collections.abc import Callable, Mapping, Sequence

from attnpatch.capture.marks import Marked, Marker

# Of each message that came out, the characters of the text where its marks were, and which.
Places = dict[int, list[tuple[int, str]]]

# Renderings spent on finding the messages that cannot be marked at both ends.
_SEARCH = 48


def locate(
    render: Callable[..., str], messages: Sequence[Mapping], text: str, marker: Marker
) -> tuple[Marked, Places] | None:
    """Marks that change nothing else in the rendering, and where they come out; None if any would.

    Messages that the template looks into, such as those that begin with a tag, are found by halving the
    conversation, and marked in the middle only.
    """

    def check(ends: Sequence[int], inner: Sequence[int] = ()) -> tuple[Marked, Places] | None:
        marked = marker.mark(ends, inner)
        if marked is None:
            return None
        try:
            without, places = marked.read(render(marked.messages))
        except Exception:  # a template may refuse what it looks into
            return None
        return (marked, places) if without == text else None

    everything = list(range(len(messages)))
    if found := check(everything):
        return found
    good: list[int] = []
    odd: list[int] = []
    waiting, left = [everything], _SEARCH
    while waiting:
        some = waiting.pop()
        left -= 1
        if left < 0:
            return check([], everything)
        if check(good + some):
            good += some
        elif len(some) == 1:
            odd += some
        else:
            middle = len(some) // 2
            waiting += [some[middle:], some[:middle]]
    return check(sorted(good), sorted(odd))
