"""Pictures on the page: the grids of tiles among a map's key blocks, and the pictures below them, small and embedded."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnpatch.errors import CaptureError, MissingExtraError, PageError, in_one_line
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.picture_tiles import ONLY, picture_tiles
from attnpatch.plotting.images import as_image, to_bytes

LONGEST = 640  # pixels of an embedded picture's longer edge
_QUALITY = 85

# As ``write_page`` takes them.
Pictures = Sequence[Any] | Mapping[str, Any]


class EmbeddedPictures:
    """The pictures of a page: each is embedded once, however many maps show it.

    Args:
        given: As ``write_page`` takes them.

    Raises:
        PageError: They are no list or dict.
    """

    def __init__(self, given: Pictures | None) -> None:
        if given is not None and (
            isinstance(given, (str, bytes)) or not isinstance(given, (Sequence, Mapping))
        ):
            raise PageError(
                f"pictures={given!r:.60} is not accepted; give a list of pictures, or a dict such as {{'image 1': picture}}"
            )
        self._given = given or ()
        self._ids: dict[int, dict[str, Any]] = {}
        self._data: list[str] = []
        self._unused: set[str] = set()
        self._tiles: dict[str, None] = {}

    def grids(self, one: BlockMap, sequence: int, count: int) -> list[dict[str, Any]]:
        """What the page has to know of each grid of tiles among the key blocks of one sequence.

        Args:
            one: The map of this sequence.
            sequence: Its number.
            count: Number of sequences in the map.

        Raises:
            PageError: A picture cannot be read, or the sequences of a batch have no pictures of their own.
        """
        pictures = self._of_sequence(sequence, count)
        found = []
        for name, tiles in picture_tiles(one.key_labels, one.key_sizes.tolist()).items():
            label = "image 1" if name == ONLY else name.removesuffix(" whole")
            self._tiles[label] = None
            picture = pictures.get(label, pictures.get(name))
            found.append(
                {
                    "name": name,
                    "blocks": tiles.blocks.tolist(),
                    "heights": tiles.heights.tolist(),
                    "widths": tiles.widths.tolist(),
                    "picture": None if picture is None else self._embedded(picture),
                }
            )
        return found

    def check_used(self) -> None:
        """Check that each picture is shown somewhere.

        Raises:
            PageError: One is not.
        """
        unused = sorted(self._unused - set(self._tiles))
        if unused:
            known = ", ".join(map(repr, self._tiles)) or "no picture"
            raise PageError(
                f"no map has tiles of {unused[0]!r}; there are tiles of: {known}. Leave that picture out."
            )

    def elements(self) -> Iterator[str]:
        """One script element of data per picture."""
        for number, data in enumerate(self._data):
            yield f'<script type="application/octet-stream" id="p{number}">{data}</script>\n'

    def _of_sequence(self, sequence: int, count: int) -> dict[str, Any]:
        given: Any = self._given
        if not given:
            return {}
        if not isinstance(given, Mapping) and all(isinstance(each, (list, tuple, Mapping)) for each in given):
            if len(given) != count:
                raise PageError(
                    f"pictures of {len(given)} sequences are given, and a map has {count}; give a list for each."
                )
            given = given[sequence]
        elif count > 1:
            raise PageError(
                f"a map has {count} sequences, and it is not known which pictures belong to which; give a list of pictures "
                "for each"
            )
        if not isinstance(given, Mapping):
            given = {f"image {number + 1}": picture for number, picture in enumerate(given)}
        self._unused |= set(given)
        return dict(given)

    def _embedded(self, picture: Any) -> dict[str, Any]:
        if id(picture) not in self._ids:
            data, width, height = _jpeg(picture)
            self._ids[id(picture)] = {"id": f"p{len(self._data)}", "width": width, "height": height}
            self._data.append(base64.b64encode(data).decode())
        return self._ids[id(picture)]


def _jpeg(picture: Any) -> tuple[bytes, int, int]:
    """The picture as JPEG, at most ``LONGEST`` pixels wide and high; its width and height."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtraError('pictures on a page need Pillow: pip install "attnpatch[plot]"') from error
    try:
        if isinstance(picture, (str, os.PathLike)):
            with Image.open(picture) as file:
                picture = ImageOps.exif_transpose(file)
        image = Image.fromarray(to_bytes(as_image(picture)))
    except (OSError, ValueError, CaptureError) as error:
        raise PageError(
            f"the picture {picture!r:.80} cannot be used: {in_one_line(error)}; give another file"
        ) from error
    image.thumbnail((LONGEST, LONGEST))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=_QUALITY)
    return written.getvalue(), *image.size
