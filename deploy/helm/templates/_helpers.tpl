{{/* Names. */}}
{{- define "eventprojector.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "eventprojector.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "eventprojector.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "eventprojector.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels. Context: root, component (may be absent). helm.sh/chart is never in a selector: it changes with each version. */}}
{{- define "eventprojector.selectorLabels" -}}
app.kubernetes.io/name: {{ include "eventprojector.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "eventprojector.labels" -}}
{{ include "eventprojector.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Metadata of an object. Context: root, component, name (without it: fullname-component), namespace, cluster (it has none). */}}
{{- define "eventprojector.metadata" -}}
name: {{ .name | default (printf "%s-%s" (include "eventprojector.fullname" .root) .component) }}
{{- if not .cluster }}
namespace: {{ .namespace | default .root.Release.Namespace }}
{{- end }}
labels:
  {{- include "eventprojector.labels" . | nindent 2 }}
{{- end -}}

{{/* Image reference. Context: root, image. */}}
{{- define "eventprojector.imageReference" -}}
{{- $tag := .image.tag | default .root.Chart.AppVersion -}}
{{- printf "%s/%s" .image.registry .image.repository | trimPrefix "/" -}}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ $tag }}{{ end -}}
{{- end -}}

{{- define "eventprojector.image" -}}
image: {{ include "eventprojector.imageReference" (dict "root" . "image" .Values.image) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}

{{/* Where MongoDB is. */}}
{{- define "eventprojector.mongodb.validate" -}}
{{- $m := .Values.mongodb -}}
{{- $ways := list -}}
{{- if $m.uri }}{{ $ways = append $ways "mongodb.uri" }}{{ end -}}
{{- if $m.existingSecret.name }}{{ $ways = append $ways "mongodb.existingSecret.name" }}{{ end -}}
{{- if $m.embedded.enabled }}{{ $ways = append $ways "mongodb.embedded.enabled" }}{{ end -}}
{{- if not $ways -}}
{{- fail "Where is MongoDB? Set mongodb.existingSecret.name (a Secret with the connection string) or mongodb.uri; for a trial mongodb.embedded.enabled=true." -}}
{{- end -}}
{{- if gt (len $ways) 1 -}}
{{- fail (printf "Only one of %s may be set." (join ", " $ways)) -}}
{{- end -}}
{{- end -}}

{{- define "eventprojector.mongodb.embeddedHost" -}}
{{- $name := printf "%s-mongodb" (include "eventprojector.fullname" .) -}}
{{ $name }}-0.{{ $name }}.{{ .Release.Namespace }}.svc:27017
{{- end -}}

{{- define "eventprojector.mongodb.embeddedURI" -}}
mongodb://{{ include "eventprojector.mongodb.embeddedHost" . }}/?replicaSet=rs0
{{- end -}}

{{- define "eventprojector.mongodb.secretName" -}}
{{- .Values.mongodb.existingSecret.name | default (printf "%s-mongodb" (include "eventprojector.fullname" .)) -}}
{{- end -}}

{{/* Restarts the pods when the chart's own Secret changes; of a Secret of the user's the chart knows nothing. */}}
{{- define "eventprojector.mongodb.checksum" -}}
{{- if not .Values.mongodb.existingSecret.name -}}
checksum/mongodb: {{ .Values.mongodb.uri | default (include "eventprojector.mongodb.embeddedURI" .) | sha256sum }}
{{- end -}}
{{- end -}}

{{/* Environment that all roles share. Context: root, values (of the component), provision (whether it makes the log). */}}
{{- define "eventprojector.env" -}}
{{- $own := .values.mongodb.existingSecret -}}
- name: MONGODB_URI
  valueFrom:
    secretKeyRef:
      name: {{ $own.name | default (include "eventprojector.mongodb.secretName" .root) }}
      key: {{ if $own.name }}{{ $own.key }}{{ else if .root.Values.mongodb.existingSecret.name }}{{ .root.Values.mongodb.existingSecret.key }}{{ else }}uri{{ end }}
- name: EVENTSTORE_DATABASE
  value: {{ .root.Values.eventstore.database | quote }}
{{- if hasKey . "provision" }}
- name: EVENTSTORE_PROVISION
  value: {{ .provision | quote }}
{{- end }}
- name: LOG_LEVEL
  value: {{ .root.Values.log.level }}
- name: LOG_FORMAT
  value: {{ .root.Values.log.format }}
{{- end -}}

{{- define "eventprojector.serviceAccountName" -}}
{{- if .values.serviceAccount.create -}}
{{- .values.serviceAccount.name | default (printf "%s-%s" (include "eventprojector.fullname" .root) .component) -}}
{{- else -}}
{{- .values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* The account of a component. Context: root, component, values. */}}
{{- define "eventprojector.serviceAccount" -}}
{{- if .values.serviceAccount.create }}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "eventprojector.metadata" (dict "root" .root "component" .component "name" (include "eventprojector.serviceAccountName" .)) | nindent 2 }}
  {{- with .values.serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end -}}
{{- end -}}

{{/* What every pod of the chart has. Context: root. */}}
{{- define "eventprojector.pod.base" -}}
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if kindIs "bool" .root.Values.hostUsers }}
hostUsers: {{ .root.Values.hostUsers }}
{{- end }}
{{- with .root.Values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The pod of a component, all but its containers and volumes. Context: root, component, values. */}}
{{- define "eventprojector.pod" -}}
{{ include "eventprojector.pod.base" . }}
serviceAccountName: {{ include "eventprojector.serviceAccountName" . }}
automountServiceAccountToken: {{ eq .component "operator" }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .values.terminationGracePeriodSeconds }}
terminationGracePeriodSeconds: {{ . }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .values.topologySpreadConstraints }}
{{- $selector := dict "labelSelector" (dict "matchLabels" (include "eventprojector.selectorLabels" . | fromYaml)) }}
topologySpreadConstraints:
  {{- range .values.topologySpreadConstraints }}
  {{- if hasKey . "labelSelector" }}
  - {{- toYaml . | nindent 4 }}
  {{- else }}
  - {{- toYaml (merge (deepCopy .) $selector) | nindent 4 }}
  {{- end }}
  {{- end }}
{{- end }}
{{- with .values.extraInitContainers }}
initContainers:
  {{- tpl (toYaml .) $.root | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The pod template's metadata. Context: root, component, values, checksums (text, may be empty). */}}
{{- define "eventprojector.podMetadata" -}}
labels:
  {{- include "eventprojector.labels" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ .component }}
  {{- with .checksums | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Probes by HTTP. Context: port (its name), startPath, startSeconds. */}}
{{- define "eventprojector.probes" -}}
startupProbe:
  httpGet: {path: {{ .startPath | default "/healthz" }}, port: {{ .port }}}
  timeoutSeconds: 3
  periodSeconds: 1
  failureThreshold: {{ .startSeconds | default 60 }}
livenessProbe:
  httpGet: {path: /healthz, port: {{ .port }}}
  timeoutSeconds: 3
  periodSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: {{ .port }}}
  timeoutSeconds: 3
  periodSeconds: 5
  failureThreshold: 3
{{- end -}}

{{/* Bearer tokens. Context: root, component, auth, path (of the values). */}}
{{- define "eventprojector.token.validate" -}}
{{- if and .auth.token .auth.existingSecret.name -}}
{{- fail (printf "Only one of %s.token and %s.existingSecret.name may be set." .path .path) -}}
{{- end -}}
{{- end -}}

{{- define "eventprojector.token.secretName" -}}
{{- .auth.existingSecret.name | default (printf "%s-%s-token" (include "eventprojector.fullname" .root) .component) -}}
{{- end -}}

{{- define "eventprojector.token.volume" -}}
name: token
secret:
  secretName: {{ include "eventprojector.token.secretName" . }}
  items: [{key: {{ if .auth.existingSecret.name }}{{ .auth.existingSecret.key }}{{ else }}token{{ end }}, path: token}]
{{- end -}}

{{- define "eventprojector.token.secret" -}}
{{- if .auth.token }}
---
apiVersion: v1
kind: Secret
metadata:
  {{- include "eventprojector.metadata" (dict "root" .root "component" .component "name" (include "eventprojector.token.secretName" .)) | nindent 2 }}
type: Opaque
stringData:
  token: {{ .auth.token | quote }}
{{- end -}}
{{- end -}}

{{- define "eventprojector.podDisruptionBudget" -}}
{{- if .values.podDisruptionBudget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "eventprojector.metadata" . | nindent 2 }}
spec:
  maxUnavailable: {{ .values.podDisruptionBudget.maxUnavailable }}
  unhealthyPodEvictionPolicy: {{ .values.podDisruptionBudget.unhealthyPodEvictionPolicy }}
  selector:
    matchLabels:
      {{- include "eventprojector.selectorLabels" . | nindent 6 }}
{{- end -}}
{{- end -}}

{{/* Whether a monitoring object is rendered: text or nothing. Context: root, values, kind. */}}
{{- define "eventprojector.monitoring.render" -}}
{{- if .values.enabled -}}
{{- $there := .root.Capabilities.APIVersions.Has (printf "monitoring.coreos.com/v1/%s" .kind) -}}
{{- if or $there (eq .values.renderMode "alwaysRender") -}}
yes
{{- else if eq .values.renderMode "failIfMissing" -}}
{{- fail (printf "The cluster has no %s (monitoring.coreos.com/v1). Install the Prometheus operator first, or set renderMode to skipIfMissing or alwaysRender." .kind) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Who makes the log at its first start: the projector where there is one, else the appender. An EventStore resource can only follow. */}}
{{- define "eventprojector.appender.provisions" -}}
{{- not (and .Values.projector.enabled .Values.projector.replicas) -}}
{{- end -}}
