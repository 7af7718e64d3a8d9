"""CloudEvents 1.0 over HTTP: structured, batch and binary content mode, mapped to the log's event.

id -> eventId, subject -> aggregateId, type -> eventName, time -> timestamp, data (a JSON object) -> payload; source and all
other attributes -> metadata.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import msgspec

from appender.problems import Invalid
from appender.requests import CloudEvent, NewAppend, NewEvent, decode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ATTRIBUTE", "BATCH", "STRUCTURED", "batch", "binary", "is_binary", "structured"]

STRUCTURED: Final = "application/cloudevents+json"
BATCH: Final = "application/cloudevents-batch+json"

_KNOWN: Final = frozenset({"specversion", "id", "type", "subject", "time", "data", "datacontenttype"})

ATTRIBUTE: Final = "^[a-z0-9]+$"
"""Names of attributes, by the specification."""

_attribute: Final = re.compile(ATTRIBUTE)
_attributes: Final = msgspec.json.Decoder(dict[str, Any])
_several: Final = msgspec.json.Decoder(list[dict[str, Any]])
_data: Final = msgspec.json.Decoder(dict[str, Any])


def structured(body: bytes) -> NewAppend:
    """One event, all of it in the body. Raises Malformed and Invalid."""
    return _append(decode(_attributes, body), "")


def batch(body: bytes) -> list[NewAppend]:
    """Several events, atomic; those of one aggregate together, in their order. Raises Malformed and Invalid."""
    attributes = decode(_several, body)
    if not attributes:
        raise Invalid("the body", "must have at least one event")
    appends = [_append(each, f"[{index}].") for index, each in enumerate(attributes)]
    together: dict[str, list[NewEvent]] = {}
    for append in appends:
        together.setdefault(append.aggregate_id, []).extend(append.events)
    return [NewAppend(aggregate_id, events) for aggregate_id, events in together.items()]


def is_binary(headers: Mapping[str, str]) -> bool:
    """Whether the headers carry a CloudEvent."""
    return "ce-specversion" in headers or "ce-id" in headers


def binary(headers: Mapping[str, str], body: bytes) -> NewAppend:
    """One event, its attributes in percent-encoded `ce-` headers, its data the body. Raises Malformed and Invalid."""
    attributes: dict[str, Any] = {}
    for name, value in headers.items():
        if name[:3].lower() == "ce-":
            attributes[name[3:].lower()] = unquote(value)
    if "data" in attributes:
        raise Invalid("ce-data", "is not an attribute")
    attributes["data"] = decode(_data, body)
    return _append(attributes, "ce-")


def _append(attributes: dict[str, Any], prefix: str) -> NewAppend:
    if "data_base64" in attributes:
        raise Invalid(f"{prefix}data_base64", "is not supported: data must be a JSON object")
    try:
        event = msgspec.convert(attributes, CloudEvent)
    except msgspec.ValidationError as error:
        raise Invalid(*_explain(error, prefix)) from error
    metadata = {name: value for name, value in attributes.items() if name not in _KNOWN and value is not None}
    for name, value in metadata.items():
        if not _attribute.fullmatch(name):
            raise Invalid(prefix + name, "is no name of an attribute: lower-case letters and digits")
        if not isinstance(value, str | bool | int | float):
            raise Invalid(prefix + name, "must be a string, a boolean or a number")
    return NewAppend(event.subject, [NewEvent(event.type, event.data, event.id, event.time, metadata)])


def _explain(error: msgspec.ValidationError, prefix: str) -> Sequence[str]:
    text, _, at = str(error).partition(" - at `$.")
    if "missing required field" in text:
        return prefix + text.split("`")[1], "is required"
    return prefix + (at.rstrip("`") or "the body"), f"is not valid: {text}"
