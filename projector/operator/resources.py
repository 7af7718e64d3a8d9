"""The custom resources `EventStore` and `Projection` as models: what the operator decodes, what the CRDs are made of.

`crds` turns these models into the CustomResourceDefinitions, so that the API server refuses what the code would not
understand. A rule is CEL where the schema alone cannot say it. Key orders are lists here: the API server does not keep
the order of a map, and `{b: 1, a: 1}` is another index than `{a: 1, b: 1}`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

from msgspec import Meta, Struct, field

from projector.projection import AGGREGATE_ID, COLLECTION_PATTERN

__all__ = [
    "API_VERSION",
    "GROUP",
    "INT32",
    "INT64",
    "MAP_BY_NAME",
    "PAUSED_ANNOTATION",
    "VERSION",
    "Collation",
    "Connection",
    "DeletionPolicy",
    "EventStoreRef",
    "EventStoreSpec",
    "IndexKey",
    "LogIndex",
    "Model",
    "ProjectionSpec",
    "ReadModel",
    "ReadModelIndex",
    "Rebuild",
    "Rule",
    "SecretRef",
]

GROUP: Final = "eventprojector.io"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"

PAUSED_ANNOTATION: Final = f"{GROUP}/paused"
"""While it is "true" on a resource the operator changes nothing for it, neither in MongoDB nor in its status."""

DeletionPolicy = Literal["Retain", "Delete"]

_NAME: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$"
MAP_BY_NAME: Final = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
_MAP_BY_FIELD: Final = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["field"]}
_FREE: Final = {"x-kubernetes-preserve-unknown-fields": True}
INT32: Final = {"format": "int32"}
INT64: Final = {"format": "int64"}


class Rule(NamedTuple):
    """A CEL rule of the schema, and what the API server answers when it does not hold."""

    rule: str
    message: str


_PartialFilter = Annotated[
    dict[str, Any],
    Meta(
        description="Only documents that match it: MongoDB's partialFilterExpression.",
        extra_json_schema=_FREE,
    ),
]

_SPARSE_OR_PARTIAL: Final = Rule(
    "!(has(self.sparse) && self.sparse && has(self.partialFilter))", "an index is either sparse or has a partialFilter"
)


class Model(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of all models: fields in camelCase, absent where they have their default; unknown ones are ignored."""

    rules: ClassVar[tuple[Rule, ...]] = ()


class SecretRef(Model, frozen=True, kw_only=True):
    """A key of a Secret in the resource's own namespace."""

    name: Annotated[str, Meta(min_length=1, max_length=253, description="Name of the Secret.")]
    key: Annotated[str, Meta(min_length=1, max_length=253, description="Key in the Secret.")] = "uri"


class Connection(Model, frozen=True, kw_only=True):
    """Where MongoDB is."""

    secret_ref: Annotated[SecretRef, Meta(description="Secret that holds the connection string (`mongodb://…`).")]


class IndexKey(Model, frozen=True, kw_only=True):
    """One field of an index."""

    rules = (
        Rule(
            "type(self.order) == int ? self.order in [1, -1] : self.order in ['text', '2dsphere', 'hashed']",
            "order must be 1, -1, text, 2dsphere or hashed",
        ),
        Rule("!self.field.startsWith('$')", "a field must not begin with $"),
    )

    field: Annotated[str, Meta(min_length=1, max_length=512, description="Path of the field, dotted.")]
    order: Annotated[
        int | str,
        Meta(
            description="1 (ascending), -1 (descending), text, 2dsphere or hashed.",
            extra_json_schema={"x-kubernetes-int-or-string": True, "maxLength": 16},
        ),
    ] = 1


class Collation(Model, frozen=True, kw_only=True):
    """How texts are compared. What is not given is the locale's own default."""

    locale: Annotated[
        str, Meta(min_length=2, max_length=64, description="ICU locale, for example `en` or `de@collation=phonebook`.")
    ]
    strength: Annotated[int, Meta(ge=1, le=5, description="Level of comparison; 2 ignores case.")] | None = None
    case_level: Annotated[bool, Meta(description="Compare case at strength 1 or 2 too.")] | None = None
    case_first: Annotated[Literal["upper", "lower", "off"], Meta(description="Which case sorts first.")] | None = None
    numeric_ordering: Annotated[bool, Meta(description="Compare digits as numbers.")] | None = None
    alternate: (
        Annotated[Literal["non-ignorable", "shifted"], Meta(description="Whether spaces and punctuation count.")] | None
    ) = None


class LogIndex(Model, frozen=True, kw_only=True):
    """An extra index of the log. Not unique, which would make appends fail; not expiring, which would lose events."""

    rules = (
        Rule("!(self.name in ['_id_', 'aggregate_sequence'])", "this index belongs to the log itself"),
        _SPARSE_OR_PARTIAL,
    )

    name: Annotated[str, Meta(min_length=1, max_length=100, pattern=_NAME, description="Name of the index.")]
    keys: Annotated[
        list[IndexKey],
        Meta(min_length=1, max_length=32, description="Fields in their order.", extra_json_schema=_MAP_BY_FIELD),
    ]
    sparse: Annotated[bool, Meta(description="Leave out documents that lack the fields.")] = False
    hidden: Annotated[bool, Meta(description="Keep it up to date, but let no query use it.")] = False
    partial_filter: _PartialFilter | None = None
    collation: Collation | None = None


class ReadModelIndex(Model, frozen=True, kw_only=True):
    """An index of a read model."""

    rules = (
        _SPARSE_OR_PARTIAL,
        Rule("!has(self.name) || self.name != '_id_'", "this index belongs to MongoDB itself"),
        Rule(
            "!has(self.expireAfterSeconds) || size(self.keys) == 1",
            "an index that expires documents has one field",
        ),
        Rule(
            "!(has(self.unique) && self.unique) || self.keys.all(k, type(k.order) == int)",
            "a unique index has no text, 2dsphere or hashed field",
        ),
    )

    name: (
        Annotated[
            str,
            Meta(
                min_length=1, max_length=100, pattern=_NAME, description="Default: MongoDB's own, such as `status_1`."
            ),
        ]
        | None
    ) = None
    keys: Annotated[
        list[IndexKey],
        Meta(min_length=1, max_length=32, description="Fields in their order.", extra_json_schema=_MAP_BY_FIELD),
    ]
    unique: Annotated[bool, Meta(description="No two documents may have the same values.")] = False
    sparse: Annotated[bool, Meta(description="Leave out documents that lack the fields.")] = False
    partial_filter: _PartialFilter | None = None
    expire_after_seconds: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=2**31 - 1,
                description="Delete a document so long after the date in its field.",
                extra_json_schema=INT32,
            ),
        ]
        | None
    ) = None


class EventStoreSpec(Model, frozen=True, kw_only=True):
    """An event store: the log's collection `events` in a database, its validator and its indexes."""

    database: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=63,
            pattern=r'^[^/\\. "$*<>:|?]+$',
            description="Database of the collection `events`.",
            extra_json_schema={
                "x-kubernetes-validations": [
                    {"rule": "self == oldSelf", "message": "database is immutable: make another EventStore"},
                    {
                        "rule": "!(self in ['admin', 'local', 'config'])",
                        "message": "MongoDB keeps this database for itself",
                    },
                ]
            },
        ),
    ] = "eventstore"
    connection: Annotated[Connection, Meta(description="Absent: the connection of the operator itself.")] | None = None
    validator: Annotated[bool, Meta(description="Keep the validator that refuses what is no event.")] = True
    indexes: Annotated[
        list[LogIndex],
        Meta(max_length=60, description="Extra indexes; each costs speed of appends.", extra_json_schema=MAP_BY_NAME),
    ] = []
    allow_recreate: Annotated[
        bool,
        Meta(
            description="An index whose options cannot be changed in place may be built anew and the old one dropped."
        ),
    ] = False
    deletion_policy: Annotated[
        DeletionPolicy,
        Meta(
            description="`Retain`: no index is dropped, whatever happens to this resource. `Delete`: extra indexes that"
            " the operator made are dropped when they leave the spec or the resource is deleted. The log always stays."
        ),
    ] = "Retain"


class EventStoreRef(Model, frozen=True, kw_only=True):
    """An EventStore in the same namespace."""

    name: Annotated[str, Meta(min_length=1, max_length=253, description="Name of the EventStore.")]


class ReadModel(Model, frozen=True, kw_only=True):
    """Where the documents of a projection lie."""

    rules = (
        Rule("!has(self.collection) || self.collection != 'events'", "`events` is the log"),
        Rule(
            "has(self.collection) == has(oldSelf.collection)"
            " && (!has(self.collection) || self.collection == oldSelf.collection)",
            "collection is immutable: make another Projection",
        ),
    )

    collection: (
        Annotated[
            str,
            Meta(
                pattern=COLLECTION_PATTERN, description="Name of the view that is read; default: the resource's name."
            ),
        ]
        | None
    ) = None
    key: Annotated[
        str,
        Meta(
            pattern=r"^\$.",
            max_length=512,
            description="Reference to the field of an event that names its document.",
        ),
    ] = AGGREGATE_ID
    indexes: Annotated[
        list[ReadModelIndex],
        Meta(
            max_length=60,
            description="Indexes of the read model.",
            extra_json_schema={
                "x-kubernetes-list-type": "atomic",
                "x-kubernetes-validations": [
                    {
                        "rule": "self.all(a, !has(a.name) || self.exists_one(b, has(b.name) && b.name == a.name))",
                        "message": "two indexes have one name",
                    }
                ],
            },
        ),
    ] = []


class Rebuild(Model, frozen=True, kw_only=True):
    """How a new version takes over."""

    cutover: Annotated[
        Literal["Automatic", "Manual"],
        Meta(description="`Manual`: the new version waits for `projector cutover` once it has caught up."),
    ] = "Automatic"


class ProjectionSpec(Model, frozen=True, kw_only=True):
    """A read model, declared: which document an event belongs to, and what each kind of event changes in it."""

    rules = (
        Rule(
            "has(self.on) && !has(self.__true__)",
            'the fold is missing: write its key in quotes, "on":, because YAML takes the bare word for true',
        ),
        Rule("self.version >= oldSelf.version", "version must not decrease: `projector rollback` takes a version back"),
        Rule(
            "self.version > oldSelf.version || self.readModel.key == oldSelf.readModel.key",
            "another key needs a higher version",
        ),
        Rule(
            "has(self.eventStoreRef) == has(oldSelf.eventStoreRef)"
            " && (!has(self.eventStoreRef) || self.eventStoreRef.name == oldSelf.eventStoreRef.name)",
            "eventStoreRef is immutable: make another Projection",
        ),
    )

    event_store_ref: (
        Annotated[EventStoreRef, Meta(description="Absent: the operator's own MongoDB and database.")] | None
    ) = None
    version: Annotated[
        int,
        Meta(
            ge=1,
            le=2**31 - 1,
            description="Raised with every change of key or fold; a rebuild follows.",
            extra_json_schema=INT32,
        ),
    ]
    read_model: ReadModel = ReadModel()
    on: (
        Annotated[
            dict[str, Any],
            Meta(
                min_length=1,
                description="The fold: for each eventName (`*`: all others) MongoDB's update operators, or"
                " `$delete: true`. Required; its key is written in quotes.",
                extra_json_schema=_FREE,
            ),
        ]
        | None
    ) = None
    bare_on: (
        Annotated[
            dict[str, Any], Meta(description="What `on` without quotes becomes; refused.", extra_json_schema=_FREE)
        ]
        | None
    ) = field(default=None, name="true")
    partitions: Annotated[
        int,
        Meta(ge=1, le=64, description="How many replicas can share the work.", extra_json_schema=INT32),
    ] = 1
    paused: Annotated[bool, Meta(description="The projector stops before the next event.")] = False
    rebuild: Rebuild = Rebuild()
    allow_recreate: Annotated[
        bool,
        Meta(
            description="An index whose options cannot be changed in place may be built anew and the old one dropped."
        ),
    ] = False
    deletion_policy: Annotated[
        DeletionPolicy,
        Meta(
            description="`Retain`: the read model stays when this resource is deleted, and no index is dropped."
            " `Delete`: the read model goes with the resource, an index when it leaves the spec."
        ),
    ] = "Retain"
