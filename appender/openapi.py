"""The OpenAPI 3.1 document, from the types that decode the requests. `python -m appender.openapi` prints it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from appender import requests
from appender.cloudevents import ATTRIBUTE, BATCH, STRUCTURED
from appender.endpoint import JSON, NDJSON
from appender.history import MAX_PAGE_EVENTS
from appender.problems import TYPES
from appender.routes import EVENTS_PATH, HEAD_PATH, HISTORY_PATH
from eventstore import __version__
from eventstore.event import INT64_MAX, MAX_AGGREGATE_ID_BYTES
from eventstore.problems import MEDIA_TYPE, type_uri

__all__ = ["document", "encode"]

_TYPES: Final = (
    requests.AppendRequest,
    requests.SeveralRequest,
    requests.EventLine,
    requests.CloudEvent,
    requests.Appended,
    requests.AppendedSeveral,
    requests.AppendedLine,
    requests.HistoryPage,
    requests.AggregateHead,
    requests.ProblemDocument,
)

_AGGREGATE_ID: Final = {
    "name": "aggregateId",
    "in": "path",
    "required": True,
    "description": "Percent-encoded; any Unicode but NUL.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_AGGREGATE_ID_BYTES, "pattern": requests.NO_NUL},
    "example": "order-17",
}
_TRACEPARENT: Final = {
    "name": "traceparent",
    "in": "header",
    "description": "W3C trace context; kept in the events' metadata unless that has one.",
    "schema": {"type": "string"},
}

_RESPONSES: Final = {
    "400": "The body is not what its Content-Type says.",
    "401": "The bearer token is missing or wrong.",
    "404": "No such aggregate.",
    "408": "The body did not arrive in time.",
    "409": "sequence-conflict (with `actualSequenceNo`) or event-id-conflict (with `eventIds`).",
    "413": "An event, the request or the batch is too large.",
    "415": "The Content-Type is not supported.",
    "422": "A field is not valid; `field` names it.",
    "503": "The queue is full, MongoDB is away, the appender is shutting down, or the outcome is unknown.",
}


def encode() -> bytes:
    """The document as JSON, laid out for reading."""
    return msgspec.json.format(msgspec.json.encode(document()), indent=2) + b"\n"


def document() -> dict[str, Any]:
    """The document."""
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    schemas["ProblemDocument"]["properties"]["type"]["enum"] = [type_uri(problem.name) for problem in TYPES]
    document = {"propertyNames": {"pattern": requests.KEY}, "additionalProperties": _ref("Value")}
    schemas["Value"] = {
        "description": "A JSON value that MongoDB can hold.",
        "anyOf": [
            {"type": ["null", "boolean", "string"]},
            {"type": "number", "description": "Written as an integer it must fit 64 bits."},
            {"type": "array", "items": _ref("Value")},
            {"type": "object", **document},
        ],
    }
    schemas["CloudEvent"] |= {
        "propertyNames": {"pattern": ATTRIBUTE},
        "additionalProperties": {"type": ["null", "boolean", "string", "number"]},
    }
    schemas["AppendRequest"]["examples"] = [
        {"expectedSequenceNo": 0, "events": [{"eventName": "OrderPlaced", "payload": {"total": 12.5}}]}
    ]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Eventprojector appender",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "Appends events to the log, contiguous per aggregate, and reads histories.",
        },
        "servers": [{"url": "http://127.0.0.1:8080"}],
        "paths": {HISTORY_PATH: _history_path(), HEAD_PATH: _head_path(), EVENTS_PATH: _events_path(), **_ops_paths()},
        "components": {
            "schemas": schemas,
            "responses": {code: _problem(text) for code, text in _RESPONSES.items()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _history_path() -> dict[str, Any]:
    return {
        "parameters": [_AGGREGATE_ID],
        "post": {
            "operationId": "append",
            "summary": "Append events to one aggregate, all or nothing",
            "parameters": [_TRACEPARENT],
            "requestBody": _body({JSON: _ref("AppendRequest")}),
            "responses": _appended("Appended") | _problems("400", "401", "408", "409", "413", "415", "422", "503"),
        },
        "get": {
            "operationId": "readHistory",
            "summary": "Read an aggregate's events in order",
            "description": f"Send `Accept: {NDJSON}` for all of them as a stream of lines. An aggregate without events has"
            " an empty history.",
            "parameters": [
                _query("after", "Only events with a sequenceNo above this one.", 0, INT64_MAX, 0),
                _query("limit", "At most so many events; a page may end earlier, at 4 MiB.", 1, MAX_PAGE_EVENTS, 100),
            ],
            "responses": {
                "200": {
                    "description": "A page, or the stream.",
                    "content": {
                        JSON: {"schema": _ref("HistoryPage")},
                        NDJSON: {"schema": {"type": "string", "description": "A StoredEvent a line."}},
                    },
                }
            }
            | _problems("401", "422", "503"),
        },
    }


def _head_path() -> dict[str, Any]:
    tag = {"ETag": {"description": "The sequenceNo, quoted.", "schema": {"type": "string"}}}
    return {
        "parameters": [_AGGREGATE_ID],
        "get": {
            "operationId": "readHead",
            "summary": "Read an aggregate's last sequenceNo",
            "parameters": [{"name": "If-None-Match", "in": "header", "schema": {"type": "string"}}],
            "responses": {
                "200": {"description": "It.", "headers": tag, "content": {JSON: {"schema": _ref("AggregateHead")}}},
                "304": {"description": "It is the one that the caller knows.", "headers": tag},
            }
            | _problems("401", "404", "422", "503"),
        },
    }


def _events_path() -> dict[str, Any]:
    several = _appended("AppendedSeveral")
    for code in ("200", "201"):
        content = several[code]["content"]
        content[JSON]["schema"] = {"anyOf": [_ref("AppendedSeveral"), _ref("Appended")]}
    several["200"]["content"][NDJSON] = {
        "schema": {
            "type": "string",
            "description": "For a stream of lines: an AppendedLine or a ProblemDocument a line.",
        }
    }
    return {
        "post": {
            "operationId": "appendSeveral",
            "summary": "Append to several aggregates atomically, a stream of lines, or CloudEvents",
            "description": f"`{JSON}`: all or nothing, in one transaction; with `ce-` headers one CloudEvent in binary mode."
            f" `{NDJSON}`: each line by itself, answered by a line, in order, while the stream goes on."
            f" `{STRUCTURED}` and `{BATCH}`: CloudEvents 1.0, a batch is atomic.",
            "parameters": [_TRACEPARENT],
            "requestBody": _body(
                {
                    JSON: _ref("SeveralRequest"),
                    NDJSON: {"type": "string", "description": "An EventLine a line."},
                    STRUCTURED: _ref("CloudEvent"),
                    BATCH: {"type": "array", "minItems": 1, "items": _ref("CloudEvent")},
                }
            ),
            "responses": several | _problems("400", "401", "408", "409", "413", "415", "422", "503"),
        }
    }


def _ops_paths() -> dict[str, Any]:
    def get(operation: str, summary: str, media: str, *, unready: bool = False) -> dict[str, Any]:
        content = {media: {"schema": {"type": "object" if media == JSON else "string"}}}
        responses = {"200": {"description": "OK.", "content": content}}
        if unready:
            responses["503"] = {"description": "Not ready; `reason` says why.", "content": content}
        return {"get": {"operationId": operation, "summary": summary, "security": [{}], "responses": responses}}

    return {
        "/healthz": get("healthz", "Whether the process lives", JSON),
        "/readyz": get("readyz", "Whether appends can be taken", JSON, unready=True),
        "/metrics": get("metrics", "Prometheus' metrics", "text/plain"),
        "/openapi.json": get("openapi", "This document", JSON) | {},
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _body(content: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"required": True, "content": {media: {"schema": schema} for media, schema in content.items()}}


def _query(name: str, text: str, least: int, most: int, default: int) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": least, "maximum": most, "default": default}
    return {"name": name, "in": "query", "description": text, "schema": schema}


def _appended(name: str) -> dict[str, Any]:
    def answer(text: str) -> dict[str, Any]:
        return {"description": text, "content": {JSON: {"schema": _ref(name)}}}

    return {"201": answer("Appended."), "200": answer("All were there already: their original numbers.")}


def _problem(text: str) -> dict[str, Any]:
    return {"description": text, "content": {MEDIA_TYPE: {"schema": _ref("ProblemDocument")}}}


def _problems(*codes: str) -> dict[str, Any]:
    return {code: {"$ref": f"#/components/responses/{code}"} for code in codes}


if __name__ == "__main__":
    import sys

    sys.stdout.buffer.write(encode())
