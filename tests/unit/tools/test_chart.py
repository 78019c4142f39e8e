"""The Helm chart: rendered by Helm for each value set, and validated for several Kubernetes."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils as schemas

import reservation
from docs.reference.generate import OF_THE_CHART
from reservation.config.given import may_be_a_file
from reservation.config.settings import PREFIX, Settings, require_given_secrets

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "deploy" / "helm" / "reservation"
VALUE_SETS = {path.stem: path for path in sorted((CHART / "ci").glob("*.yaml"))}
KUBERNETES = ("1.31", "1.33", "1.35", "1.37")
#: Kinds of operators that a cluster may have; no release of Kubernetes has their schemas.
OF_OPERATORS = {"ServiceMonitor", "ScaledObject"}
SECRET_FOLDER = "/run/secrets/reservation/"
LONG = "0123456789abcdef0123456789abcdef"
CONTENTS = {
    "RESERVATION_REDIS_URL": "redis://reservation:pw@redis:6379/0",
    "RESERVATION_DATABASE_URL": "postgresql://reservation:pw@postgres:5432/reservation",
    "RESERVATION_ADMIN_API_KEY": LONG,
    "RESERVATION_SIGNING_KEYS": f"{LONG},{LONG}",
    "RESERVATION_ORDER_ID_KEY": LONG,
    "RESERVATION_JWT_SECRET": LONG,
    "RESERVATION_TOSS_SECRET_KEY": "live_gsk_abc",
    "RESERVATION_TOSS_CLIENT_KEY": "live_gck_abc",
}

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def chart() -> Iterator[helm.Chart]:
    with helm.Chart.load(CHART) as loaded:
        yield loaded


def values_of(name: str) -> dict[str, Any]:
    return helm.values_from_yaml(VALUE_SETS[name].read_text())


def rendered(chart: helm.Chart, values: dict[str, Any]) -> list[Manifest]:
    files = chart.render(values, name="shop", namespace="sale")
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def one(manifests: list[Manifest], kind: str, suffix: str = "") -> Manifest:
    (found,) = [
        manifest
        for manifest in manifests
        if manifest["kind"] == kind and manifest["metadata"]["name"].endswith(suffix)
    ]
    return found


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The spec of each pod template, by the name of its only container."""
    specs = [
        manifest["spec"]["template"]["spec"]
        for manifest in manifests
        if manifest["kind"] in {"Deployment", "Job"}
    ]
    return {container["name"]: spec for spec in specs for container in spec["containers"]}


def environment(pod: Manifest) -> dict[str, str]:
    return {pair["name"]: pair["value"] for pair in pod["containers"][0]["env"]}


@pytest.fixture(scope="module")
def cached_schemas() -> Iterator[None]:
    """Each schema is read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas, "schema_contents", functools.cache(schemas.schema_contents))
        yield


@pytest.mark.usefixtures("cached_schemas")
@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", VALUE_SETS)
def test_each_manifest_is_valid(chart: helm.Chart, name: str, version: str) -> None:
    for manifest in rendered(chart, values_of(name)):
        if manifest["kind"] in OF_OPERATORS:
            with pytest.raises(schemas.SchemaNotFoundError):
                kubernetes_validate.validate(manifest, version, strict=True)
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.usefixtures("cached_schemas")
def test_the_validation_refuses_an_unknown_field(chart: helm.Chart) -> None:
    manifest = one(rendered(chart, values_of("production")), "Deployment", "-api")
    manifest["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_helm_lints_each_value_set(name: str) -> None:
    report = helm.lint(CHART, values_of(name), strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_there_are_twelve_value_sets() -> None:
    assert len(VALUE_SETS) == 12


def test_the_chart_has_the_version_of_the_package(chart: helm.Chart) -> None:
    assert chart.version == chart.metadata["appVersion"] == reservation.__version__


@pytest.mark.parametrize("name", VALUE_SETS)
def test_the_service_accepts_the_settings_of_each_pod(
    chart: helm.Chart, name: str, tmp_path: Path
) -> None:
    for pod in pods(rendered(chart, values_of(name))).values():
        environ = environment(pod)
        test_keys = environ["RESERVATION_ENV"] != "production"
        for variable, value in environ.items():
            if value.startswith(SECRET_FOLDER):
                setting = value.removeprefix(SECRET_FOLDER)
                assert variable == f"{setting}_FILE"
                path = tmp_path / setting
                content = CONTENTS[setting]
                path.write_text(content.replace("live", "test") if test_keys else content)
                environ[variable] = str(path)
        environ["RESERVATION_DATA_DIR"] = str(tmp_path / "data")
        environ.setdefault("RESERVATION_HOST", "0.0.0.0")
        require_given_secrets(environ, None)
        settings = Settings.load(environ, None)
        assert settings.redis_url
        assert settings.database_url


def test_yaml_numbers_and_switches_keep_their_text(chart: helm.Chart) -> None:
    environ = environment(pods(rendered(chart, values_of("tuned")))["api"])
    assert environ["RESERVATION_UNPAID_ORDERS"] == "1000000"
    assert environ["RESERVATION_FAST_PATH"] == "off"
    assert environ["RESERVATION_PREPARE_RATE"] == "0"
    assert environ["RESERVATION_PORT"] == "8080"


@pytest.mark.parametrize("field", Settings.__struct_fields__)
def test_each_setting_can_be_given_through_the_chart(chart: helm.Chart, field: str) -> None:
    variable = f"{PREFIX}{field.upper()}"
    values = values_of("production")
    schema: Any = chart.schema
    plain = variable in schema["properties"]["settings"]["properties"]
    if field in OF_THE_CHART:
        assert not plain
    if plain:
        values["settings"][variable] = "given"
        if may_be_a_file(field):
            for source in values.setdefault("secrets", chart.values["secrets"]):
                source["items"].pop(variable, None)
        for pod in pods(rendered(chart, values)).values():
            assert environment(pod)[variable] == "given"
    elif field not in OF_THE_CHART:
        values["secrets"] = [*chart.values["secrets"], {"secretName": "s", "items": {}}]
        for source in values["secrets"]:
            source["items"].pop(variable, None)
        values["secrets"][-1]["items"] = {variable: "key"}
        for pod in pods(rendered(chart, values)).values():
            assert environment(pod)[f"{variable}_FILE"] == f"{SECRET_FOLDER}{variable}"


def test_the_chart_derives_ports_and_drain(chart: helm.Chart) -> None:
    found = pods(rendered(chart, values_of("tuned") | {"drainSeconds": 7}))
    given = {name: environment(pod) for name, pod in found.items()}
    assert given["api"]["RESERVATION_INTERNAL_PORT"] == "8081"
    assert given["worker"]["RESERVATION_METRICS_PORT"] == "8082"
    assert "RESERVATION_METRICS_PORT" not in given["api"]
    assert {environ["RESERVATION_DRAIN_SECONDS"] for environ in given.values()} == {"7"}
    # The image's data directory.
    assert {"name": "data", "mountPath": "/data"} in found["api"]["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("name", VALUE_SETS)
def test_each_pod_is_unprivileged_and_has_no_service_links(chart: helm.Chart, name: str) -> None:
    found = pods(rendered(chart, values_of(name)))
    assert {"api", "worker"} <= set(found)
    for pod in found.values():
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        (container,) = pod["containers"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", VALUE_SETS)
def test_no_manifest_contains_a_secret(chart: helm.Chart, name: str) -> None:
    manifests = rendered(chart, values_of(name))
    assert not [manifest for manifest in manifests if manifest["kind"] in {"Secret", "ConfigMap"}]
    for pod in pods(manifests).values():
        for variable, value in environment(pod).items():
            if variable.endswith(("_KEY", "_KEYS", "_SECRET")):
                assert value == "", variable


@pytest.mark.parametrize(("pre_stop", "drain"), [(0, 0), (5, 5), (15, 20)])
def test_the_grace_period_covers_pre_stop_and_drain(
    chart: helm.Chart, pre_stop: int, drain: int
) -> None:
    values = values_of("production") | {"preStopSeconds": pre_stop, "drainSeconds": drain}
    found = pods(rendered(chart, values))
    # The supervisor has ended everything 10 s after the drain: docs/operations.md.
    assert found["api"]["terminationGracePeriodSeconds"] >= pre_stop + drain + 10
    assert found["worker"]["terminationGracePeriodSeconds"] >= drain + 10
    lifecycle = found["api"]["containers"][0].get("lifecycle")
    command = lifecycle and lifecycle["preStop"]["exec"]["command"]
    assert command == (["sleep", str(pre_stop)] if pre_stop else None)


def test_probes_never_ask_for_readiness_of_the_sales(chart: helm.Chart) -> None:
    """A single closed sale makes /health/ready 503: no pod may leave its Service for that."""
    found = pods(rendered(chart, values_of("production")))
    api, worker = found["api"]["containers"][0], found["worker"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert api[probe]["httpGet"] == {"path": "/health/live", "port": "http"}
    assert worker["livenessProbe"]["httpGet"]["path"] == "/metrics"
    assert "readinessProbe" not in worker


def test_the_migration_runs_before_installation_and_upgrade(chart: helm.Chart) -> None:
    job = one(rendered(chart, values_of("production")), "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == ["migrate"]
    # Before an installation nothing else of the chart exists.
    assert all("configMap" not in volume for volume in pod["volumes"])
    assert "serviceAccountName" not in pod
    off = rendered(chart, values_of("development"))
    assert not [manifest for manifest in off if manifest["kind"] == "Job"]


def test_the_internal_port_is_on_a_service_of_its_own(chart: helm.Chart) -> None:
    manifests = rendered(chart, values_of("ingress"))
    public = one(manifests, "Service", "shop-reservation")
    assert [port["targetPort"] for port in public["spec"]["ports"]] == ["http"]
    internal = one(manifests, "Service", "-internal")
    assert [port["targetPort"] for port in internal["spec"]["ports"]] == ["internal"]
    (rule,) = one(manifests, "Ingress")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": "shop-reservation", "port": {"name": "http"}}


def test_each_selector_selects_its_pods_alone(chart: helm.Chart) -> None:
    manifests = rendered(chart, values_of("monitoring"))
    labels = {
        manifest["spec"]["template"]["spec"]["containers"][0]["name"]: set(
            manifest["spec"]["template"]["metadata"]["labels"].items()
        )
        for manifest in manifests
        if manifest["kind"] in {"Deployment", "Job"}
    }

    def selected(selector: dict[str, str]) -> set[str]:
        return {name for name, own in labels.items() if set(selector.items()) <= own}

    by_name = {
        (manifest["kind"], manifest["metadata"]["name"].removeprefix("shop-reservation")): manifest
        for manifest in manifests
    }
    for suffix, component in (("", "api"), ("-internal", "api"), ("-worker", "worker")):
        assert selected(by_name["Service", suffix]["spec"]["selector"]) == {component}
    for component in ("api", "worker"):
        for kind, key in (
            ("Deployment", "selector"),
            ("PodDisruptionBudget", "selector"),
            ("NetworkPolicy", "podSelector"),
        ):
            spec = by_name[kind, f"-{component}"]["spec"]
            assert selected(spec[key]["matchLabels"]) == {component}


def test_prometheus_finds_the_jobs_of_the_alert_rules(chart: helm.Chart) -> None:
    manifests = rendered(chart, values_of("monitoring"))
    for component, suffix, port in (
        ("api", "-internal", "internal"),
        ("worker", "-worker", "metrics"),
    ):
        monitor = one(manifests, "ServiceMonitor", f"-{component}")
        service = one(manifests, "Service", suffix)
        wanted = monitor["spec"]["selector"]["matchLabels"]
        assert wanted.items() <= service["metadata"]["labels"].items()
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == (
            f"reservation-{component}"
        )
        (endpoint,) = monitor["spec"]["endpoints"]
        assert (endpoint["port"], endpoint["path"]) == (port, "/metrics")
        assert port in [one["name"] for one in service["spec"]["ports"]]
        assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_an_autoscaler_owns_the_number_of_pods(chart: helm.Chart) -> None:
    for name, kind in (("autoscaling", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
        manifests = rendered(chart, values_of(name))
        api = one(manifests, "Deployment", "-api")
        assert "replicas" not in api["spec"]
        target = one(manifests, kind)["spec"]["scaleTargetRef"]
        assert target["name"] == api["metadata"]["name"]


def test_keda_adds_pods_for_the_time_of_a_sale(chart: helm.Chart) -> None:
    spec = one(rendered(chart, values_of("keda")), "ScaledObject")["spec"]
    assert [trigger["type"] for trigger in spec["triggers"]] == ["cpu", "cron", "cron"]
    assert spec["triggers"][1]["metadata"] == {
        "timezone": "Asia/Seoul",
        "start": "50 19 * * *",
        "end": "30 20 * * *",
        "desiredReplicas": "12",
    }


def test_the_internal_port_is_closed_to_other_namespaces(chart: helm.Chart) -> None:
    spec = one(rendered(chart, values_of("production")), "NetworkPolicy", "-api")["spec"]
    public, internal = spec["ingress"]
    assert "from" not in public
    assert internal == {"ports": [{"port": "internal"}], "from": [{"podSelector": {}}]}
    closed = values_of("production") | {"networkPolicy": {"internalFrom": []}}
    spec = one(rendered(chart, closed), "NetworkPolicy", "-api")["spec"]
    assert [rule["ports"] for rule in spec["ingress"]] == [[{"port": "http"}]]


def test_egress_is_restricted_for_every_pod_if_rules_are_given(chart: helm.Chart) -> None:
    manifests = rendered(chart, values_of("egress"))
    policies = [manifest["spec"] for manifest in manifests if manifest["kind"] == "NetworkPolicy"]
    assert len(policies) == 3
    for spec in policies:
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        assert spec["egress"][0]["ports"][0] == {"port": 53, "protocol": "UDP"}
        assert len(spec["egress"]) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"settings": {"RESERVATION_PUBLIC_URL": ""}}, "PUBLIC_URL must be given"),
        ({"secrets": []}, "RESERVATION_REDIS_URL must be given"),
        ({"settings": {"RESERVATION_REDIS_URL": "redis://h"}}, "REDIS_URL is given twice"),
        ({"autoscaling": {"enabled": True}, "keda": {"enabled": True}}, "must not both"),
        ({"ingress": {"enabled": True}}, "ingress.host must be given"),
        ({"settings": {"RESERVATION_WORKRES": 1}}, "RESERVATION_WORKRES"),
        ({"settings": {"RESERVATION_ADMIN_API_KEY": LONG}}, "RESERVATION_ADMIN_API_KEY"),
        ({"settings": {"RESERVATION_PORT": 1}}, "RESERVATION_PORT"),
        ({"drainSeconds": 301}, "drainSeconds"),
        ({"api": {"replica": 3}}, "replica"),
    ],
)
def test_values_that_no_pod_could_use_are_refused(
    chart: helm.Chart, changes: dict[str, Any], reason: str
) -> None:
    values = values_of("production")
    for name, change in changes.items():
        values[name] = values.get(name, {}) | change if isinstance(change, dict) else change
    with pytest.raises(helm.HelmError, match=reason):
        rendered(chart, values)
