{{/*
The appender as a native sidecar, one item of a pod's initContainers. Its API is on the loopback of the pod alone; probes
and metrics have a port of their own. In this chart the context is the root; in a chart that depends on this one:

  initContainers:
    {{- include "eventprojector.appender.sidecar" .Subcharts.eventprojector | nindent 8 }}
*/}}
{{- define "eventprojector.appender.sidecar" -}}
- {{ include "eventprojector.appender.container" (dict "root" . "host" "127.0.0.1") | indent 2 | trim }}
  restartPolicy: Always
{{- end -}}

{{/* The appender's container. Context: root, host; of the Deployment: drainSeconds, token (true), envFrom. */}}
{{- define "eventprojector.appender.container" -}}
{{- $values := .root.Values.appender -}}
name: appender
{{ include "eventprojector.image" .root }}
args: [appender, serve]
env:
  {{- include "eventprojector.env" (dict "root" .root "values" $values "provision" (include "eventprojector.appender.provisions" .root)) | nindent 2 }}
  - name: APPENDER_HOST
    value: {{ .host | quote }}
  - name: APPENDER_PORT
    value: {{ $values.port | quote }}
  - name: APPENDER_OPS_PORT
    value: {{ $values.opsPort | quote }}
  {{- if .token }}
  - name: APPENDER_TOKEN_FILE
    value: /etc/eventprojector/token/token
  {{- end }}
  {{- with .drainSeconds }}
  - name: APPENDER_DRAIN_SECONDS
    value: {{ . | quote }}
  {{- end }}
  {{- with $values.extraEnv }}
  {{- tpl (toYaml .) $.root | nindent 2 }}
  {{- end }}
{{- with .envFrom }}
envFrom:
  {{- tpl (toYaml .) $.root | nindent 2 }}
{{- end }}
ports:
  {{- if .token }}
  - {name: appender, containerPort: {{ $values.port }}}
  {{- end }}
  - {name: appender-ops, containerPort: {{ $values.opsPort }}}
{{- /* The application's containers start after this, so what they append first is not refused. Long, for while MongoDB is away a
restart would only bring a back-off of minutes. */}}
{{ include "eventprojector.probes" (dict "port" "appender-ops" "startPath" "/readyz" "startSeconds" 600) }}
{{- /* In full, for the pod around it may be anybody's. */}}
securityContext:
  {{- toYaml (merge (deepCopy .root.Values.securityContext) (dict "runAsNonRoot" true "runAsUser" 65532 "seccompProfile" (dict "type" "RuntimeDefault"))) | nindent 2 }}
{{- with $values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
