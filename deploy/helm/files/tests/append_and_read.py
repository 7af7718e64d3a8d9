"""`helm test`: appends an event over HTTP by the sidecar of its pod, reads it back, and waits for it in a read model.

Called as `append_and_read.py URL AGGREGATE SECONDS [COLLECTION]`. The event stays in the log, as any event does; its
eventId makes it one event however often it had to be sent.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid
from typing import Any

from pymongo import MongoClient

DEADLINE = time.monotonic() + float(sys.argv[3])


def call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST of JSON; again while the appender says that it cannot yet. Raises what remains at the deadline."""
    request = urllib.request.Request(url, headers={"Content-Type": "application/json"})
    request.data = json.dumps(body).encode() if body is not None else None
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > DEADLINE:
                raise SystemExit(f"{url}: {error.code} {error.read().decode(errors='replace')}") from error
        except OSError:
            if time.monotonic() > DEADLINE:
                raise
        time.sleep(0.5)


def wait_for_read_model(collection: str, aggregate: str, run: str) -> None:
    """Until the read model holds the event of this run. Raises SystemExit at the deadline."""
    name = os.environ.get("PROJECTOR_DATABASE") or os.environ["EVENTSTORE_DATABASE"]
    with MongoClient[dict[str, Any]](os.environ["MONGODB_URI"], serverSelectionTimeoutMS=10_000) as client:
        while time.monotonic() < DEADLINE:
            document = client[name][collection].find_one({"_id": aggregate})
            if document is not None and document.get("run") == run:
                print(f"the read model {collection} has it: {document}", flush=True)
                return
            time.sleep(0.2)
    raise SystemExit(f"the read model {collection} did not get the event in time; is the projector ready?")


def main(url: str, aggregate: str, collection: str | None) -> None:
    """Append, read back, wait."""
    run = str(uuid.uuid4())
    event = {"eventId": run, "eventName": "HelmTested", "payload": {"run": run}}
    events = f"{url}/v1/aggregates/{aggregate}/events"
    sequence_no = call(events, {"events": [event]})["lastSequenceNo"]
    print(f"appended as {aggregate} {sequence_no}", flush=True)
    stored = call(f"{events}?after={sequence_no - 1}&limit=1")["events"][0]
    if (stored["eventId"], stored["sequenceNo"]) != (run, sequence_no):
        raise SystemExit(f"the log holds another event there: {stored}")
    print("read it back from the log", flush=True)
    if collection is not None:
        wait_for_read_model(collection, aggregate, run)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[4] if len(sys.argv) > 4 else None)
