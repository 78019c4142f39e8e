{{- define "reservation.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The labels of an object. Arguments: root, component. */}}
{{- define "reservation.labels" -}}
{{ include "reservation.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
{{- end -}}

{{- define "reservation.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* A value of `settings` as text: YAML's 1000000 is a float, and its `off` a boolean. */}}
{{- define "reservation.text" -}}
{{- if kindIs "bool" . -}}{{ ternary "on" "off" . }}
{{- else if kindIs "float64" . -}}{{ int64 . }}
{{- else -}}{{ . }}
{{- end -}}
{{- end -}}

{{/* Fails where pods would refuse to start. */}}
{{- define "reservation.check" -}}
{{- $given := dict -}}
{{- range $name, $value := .Values.settings -}}
{{- if ne (toString $value) "" -}}{{- $_ := set $given $name true -}}{{- end -}}
{{- end -}}
{{- range .Values.secrets -}}
{{- range $name, $key := .items -}}
{{- if hasKey $given $name -}}{{- fail (printf "%s is given twice, in settings or secrets" $name) -}}{{- end -}}
{{- $_ := set $given $name true -}}
{{- end -}}
{{- end -}}
{{- range list "RESERVATION_REDIS_URL" "RESERVATION_DATABASE_URL" "RESERVATION_PUBLIC_URL" "RESERVATION_ADMIN_API_KEY" "RESERVATION_SIGNING_KEYS" "RESERVATION_ORDER_ID_KEY" -}}
{{- if not (hasKey $given .) -}}{{- fail (printf "%s must be given in settings or secrets" .) -}}{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled -}}{{- fail "autoscaling and keda must not both be enabled" -}}{{- end -}}
{{- end -}}

{{- define "reservation.env" -}}
- {name: RESERVATION_PORT, value: {{ .Values.ports.http | int | quote }}}
- {name: RESERVATION_DRAIN_SECONDS, value: {{ .Values.drainSeconds | int | quote }}}
{{- range $name, $value := .Values.settings }}
{{- if ne (toString $value) "" }}
- {name: {{ $name }}, value: {{ include "reservation.text" $value | quote }}}
{{- end }}
{{- end }}
{{- range .Values.secrets }}
{{- range $name, $key := .items }}
- {name: {{ $name }}_FILE, value: /run/secrets/reservation/{{ $name }}}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "reservation.image" -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end -}}

{{- define "reservation.mounts" -}}
- {name: data, mountPath: /data}
- {name: tmp, mountPath: /tmp}
{{- if .Values.secrets }}
- {name: secrets, mountPath: /run/secrets/reservation, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "reservation.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* What all pods share. */}}
{{- define "reservation.pod" -}}
# The service ignores the variables of Services; without them there are none.
enableServiceLinks: false
automountServiceAccountToken: false
{{- with .Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
volumes:
  # Sockets and metrics of the processes; nothing in it outlives the pod.
  - {name: data, emptyDir: {}}
  - {name: tmp, emptyDir: {}}
{{- if .Values.secrets }}
  - name: secrets
    projected:
      defaultMode: 0440
      sources:
      {{- range .Values.secrets }}
        - secret:
            name: {{ .secretName }}
            items:
            {{- range $name, $key := .items }}
              - {key: {{ $key | quote }}, path: {{ $name }}}
            {{- end }}
      {{- end }}
{{- end }}
{{- with .Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The placement of a component. Arguments: root, component, values. */}}
{{- define "reservation.placement" -}}
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
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "reservation.selector" . | nindent 8 }}
{{- end -}}
