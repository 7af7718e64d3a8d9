"""Values under which every template is rendered: each option at least once away from its default."""

from __future__ import annotations

from typing import Any

URI = "mongodb://shop:hunter2@mongo-0.mongo,mongo-1.mongo/?replicaSet=rs0"
TOKEN = "correct-horse-battery-staple"

_PLUMBING: dict[str, Any] = {
    "podLabels": {"team": "orders"},
    "podAnnotations": {"example.com/note": "x"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "priorityClassName": "high",
    "extraEnv": [{"name": "RELEASE", "value": "{{ .Release.Name }}"}],
    "extraEnvFrom": [{"configMapRef": {"name": "{{ .Release.Name }}-environment"}}],
    "extraVolumes": [{"name": "extra", "configMap": {"name": "{{ .Release.Name }}-extra"}}],
    "extraVolumeMounts": [{"name": "extra", "mountPath": "/extra"}],
    "extraContainers": [{"name": "beside", "image": "beside:1", "securityContext": {"readOnlyRootFilesystem": True}}],
    "extraInitContainers": [{"name": "before", "image": "before:1"}],
    "serviceAccount": {"annotations": {"example.com/role": "x"}},
}
_SPREAD = [
    {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"},
    {
        "maxSkew": 2,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"own": "selector"}},
    },
]
MONITORING = ("monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule")

MATRIX: dict[str, dict[str, Any]] = {
    "a trial": {},
    "a trial without a volume": {"mongodb": {"embedded": {"enabled": True, "persistence": {"enabled": False}}}},
    "a trial on chosen nodes": {
        "mongodb": {
            "embedded": {
                "enabled": True,
                "persistence": {"storageClassName": "fast", "size": "1Gi"},
                "nodeSelector": {"disk": "ssd"},
                "tolerations": [{"operator": "Exists"}],
                "resources": {"limits": {"memory": "1Gi"}},
                "image": {"digest": "sha256:" + "0" * 64},
            }
        }
    },
    "a connection string": {"mongodb": {"uri": URI}},
    "a Secret": {"mongodb": {"existingSecret": {"name": "mongo", "key": "url"}}},
    "a Secret for each": {
        "mongodb": {"existingSecret": {"name": "mongo"}},
        "appender": {
            "mongodb": {"existingSecret": {"name": "mongo-appender"}},
            "deployment": {"enabled": True, "auth": {"existingSecret": {"name": "tokens", "key": "all"}}},
        },
        "projector": {
            "mongodb": {"existingSecret": {"name": "mongo-projector"}},
            "database": "readmodels",
            "auth": {"existingSecret": {"name": "tokens"}},
        },
        "operator": {"mongodb": {"existingSecret": {"name": "mongo-operator"}}},
        "tests": {"readModel": False},
    },
    "an image by digest": {
        "image": {
            "registry": "registry.example.com",
            "repository": "a/b",
            "tag": "1.2.3",
            "digest": "sha256:" + "a" * 64,
            "pullPolicy": "Always",
        },
        "imagePullSecrets": [{"name": "pull"}],
    },
    "all plumbing": {
        "mongodb": {"uri": URI},
        "nameOverride": "es",
        "fullnameOverride": "events",
        "commonLabels": {"cost-centre": "42"},
        "hostUsers": False,
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["mongo"]}],
        "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
        "log": {"level": "debug", "format": "console"},
        "appender": {
            "extraEnv": [{"name": "RELEASE", "value": "{{ .Release.Name }}"}],
            "deployment": {
                "enabled": True,
                "replicas": 3,
                "auth": {"token": TOKEN},
                "service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}},
                "podDisruptionBudget": {"enabled": True, "maxUnavailable": "50%"},
                "topologySpreadConstraints": _SPREAD,
                "preStopSeconds": 0,
                **{key: value for key, value in _PLUMBING.items() if key != "extraEnv"},
            },
        },
        "projector": {
            "replicas": 3,
            "auth": {"token": TOKEN},
            "strategy": {"rollingUpdate": {"maxSurge": 0}},
            "podDisruptionBudget": {"enabled": True, "unhealthyPodEvictionPolicy": "IfHealthyBudget"},
            "topologySpreadConstraints": _SPREAD,
            "resources": {"requests": {"cpu": "1"}},
            **_PLUMBING,
        },
        "operator": {"resources": {"limits": {"memory": "256Mi"}}, **_PLUMBING},
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-map"}},
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: '{{ .Release.Name }}-text'}",
        ],
    },
    "accounts of the user's": {
        "projector": {"serviceAccount": {"create": False, "name": "mine"}},
        "operator": {"serviceAccount": {"create": False, "name": "mine"}, "rbac": {"create": False}},
    },
    "projections in a ConfigMap": {
        "operator": {"enabled": False},
        "crds": {"enabled": False},
        "projector": {
            "projections": {
                "source": "configMap",
                "definitions": {"permits": {"version": 1, "on": {"*": {"$inc": {"steps": 1}}}}},
            }
        },
    },
    "projections in the user's ConfigMap": {
        "projector": {"projections": {"source": "configMap", "existingConfigMap": "mine"}}
    },
    "projections in Python": {"projector": {"projections": {"source": "module", "module": "shop.projections"}}},
    "the operator alone": {"projector": {"enabled": False}},
    "nothing but the appender": {
        "operator": {"enabled": False},
        "projector": {"enabled": False},
        "appender": {"deployment": {"enabled": True, "auth": {"token": TOKEN}}},
    },
    "an operator of two namespaces": {"operator": {"namespaces": ["a", "b"], "rbac": {"secrets": True}}},
    "an operator of all namespaces": {"operator": {"namespaces": ["*"]}},
    "the injector": {"injector": {"enabled": True}},
    "the injector by cert-manager": {
        "injector": {
            "enabled": True,
            "failurePolicy": "Fail",
            "certificate": {"source": "certManager"},
            "namespaceSelector": {
                "matchLabels": {"inject": "yes"},
                "matchExpressions": [{"key": "env", "operator": "Exists"}],
            },
            "objectSelector": {"matchLabels": {"inject": "yes"}},
        }
    },
    "the injector by a certificate of the user's": {
        "injector": {
            "enabled": True,
            "secret": {"name": "mongo", "key": "url"},
            "certificate": {"source": "existingSecret", "existingSecret": "tls", "caBundle": "Q0E="},
        }
    },
    "network policies": {
        "injector": {"enabled": True},
        "appender": {"deployment": {"enabled": True, "auth": {"token": TOKEN}}},
        "networkPolicy": {
            "enabled": True,
            "mongodbCIDRs": ["10.1.0.0/16"],
            "mongodbPorts": [27017, 27018],
            "opsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "appenderFrom": [{"podSelector": {}}],
            "extraEgress": [{"ports": [{"protocol": "TCP", "port": 4318}]}],
        },
    },
    "monitoring": {
        "monitoring": {
            "podMonitor": {
                "enabled": True,
                "additionalLabels": {"release": "prometheus"},
                "interval": "15s",
                "scrapeTimeout": "10s",
                "sidecarNamespaces": ["*"],
            },
            "prometheusRule": {
                "enabled": True,
                "additionalLabels": {"release": "prometheus"},
                "ruleLabels": {"team": "orders"},
            },
            "dashboards": {"enabled": True, "namespace": "grafana", "annotations": {"grafana_folder": "Events"}},
        }
    },
}
