"""Where a reader of the log's change stream stands.

A position is the stream's *post-batch token*: it passes events that the reader's filter leaves out, so that it does not
age on a quiet stream. With it goes the cluster time, by which positions are compared.

After a full batch the post-batch token is that of the last event, from which no filter can resume that hides this event
(error 280). So whoever resumes with other slots goes by the time alone: it sees the events of that time again, and its
marks tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from bson.timestamp import Timestamp

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Position"]

_TIMESTAMP_TAG: Final = "82"


@dataclass(frozen=True, slots=True)
class Position:
    """A post-batch resume token and the cluster time that it stands for: every event before that time has been read."""

    token: Mapping[str, Any] | None
    """None: resume by the time."""
    cluster_time: Timestamp

    @classmethod
    def of(cls, token: Mapping[str, Any], at_most: Timestamp) -> Position:
        """The position of a token. `at_most` bounds its time, for a server whose tokens we cannot read."""
        return cls(token, _time_of(token) or at_most)

    @classmethod
    def load(cls, document: Mapping[str, Any]) -> Position:
        """From its form in a checkpoint."""
        return cls(document["token"], document["clusterTime"])

    def dump(self) -> dict[str, Any]:
        """Its form in a checkpoint."""
        return {"token": None if self.token is None else dict(self.token), "clusterTime": self.cluster_time}


def _time_of(token: Mapping[str, Any]) -> Timestamp | None:
    """The cluster time inside a token, or None.

    A token is the hexadecimal KeyString of its parts, the first of which is the cluster time: a type byte (0x82), then
    4 bytes seconds and 4 bytes increment (MongoDB, src/mongo/db/pipeline/resume_token.h).
    """
    data = token.get("_data")
    if not isinstance(data, str) or not data.startswith(_TIMESTAMP_TAG) or len(data) < 18:
        return None
    try:
        return Timestamp(int(data[2:10], 16), int(data[10:18], 16))
    except ValueError:
        return None
