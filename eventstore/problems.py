"""The form of every refusal over HTTP: RFC 9457 `application/problem+json` with a stable `type`."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MEDIA_TYPE", "Problem", "type_uri"]

MEDIA_TYPE: Final = "application/problem+json"


def type_uri(name: str) -> str:
    """The `type` of a problem: a URN, since it identifies and need not resolve."""
    return f"urn:eventprojector:problem:{name}"


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """A refusal with its status, stable type, and text; `members` are RFC 9457 extension members."""

    status: ClassVar[int]
    name: ClassVar[str]
    title: ClassVar[str]
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = members

    def document(self) -> dict[str, Any]:
        """The problem document, without absent members."""
        members = {key: value for key, value in self.members.items() if value is not None}
        return {
            "type": type_uri(self.name),
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        } | members

    def encode(self) -> bytes:
        """The problem document as JSON."""
        return msgspec.json.encode(self.document())
