"""Messages of a dialogue: text and images in order, in the form every reasoner understands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from seerseg.views import LaterView, View


@dataclass(frozen=True)
class TextPart:
    """A piece of text."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """An image: uint8 (H, W, 3). `key` names its content, so that equal images are encoded once."""

    pixels: NDArray[np.uint8]
    key: str


class LaterImage(ImagePart):
    """A view whose pixels are not drawn before a reasoner looks at them."""

    def __init__(self, view: View) -> None:
        self.__dict__["_view"] = view

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """As of `ImagePart`."""
        return self._seen.pixels

    @property
    def key(self) -> str:
        """As of `ImagePart`."""
        return self._seen.key

    @property
    def _seen(self) -> View:
        view: View = self.__dict__["_view"]
        return view


def image_of(view: View) -> ImagePart:
    """A view as a part of a message; it is not drawn for that."""
    return LaterImage(view) if isinstance(view, LaterView) else ImagePart(view.pixels, view.key)


Part = TextPart | ImagePart


@dataclass(frozen=True, eq=False)
class Message:
    """One turn: role "system", "user" or "assistant", and its parts in order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All text parts, joined by newlines."""
        return "\n".join(p.text for p in self.parts if isinstance(p, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """All image parts in order."""
        return tuple(p for p in self.parts if isinstance(p, ImagePart))


def text_message(role: Literal["system", "user", "assistant"], text: str) -> Message:
    """A message of one text part."""
    return Message(role, (TextPart(text),))
