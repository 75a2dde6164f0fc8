"""OpenTelemetry's variables: what its SDK fails at, or leaves out without a word, is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.errors import ConfigError
from tidegate.telemetry.tracing import check_collector, collector_variables, names_collector

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
HERE = {ENDPOINT: "http://collector:4318"}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        (ENDPOINT, "nonsense", "must be http:// or https:// and a host"),
        (ENDPOINT, "collector:4318", "must be http:// or https:// and a host"),
        (ENDPOINT, "http://", "must be http:// or https:// and a host"),
        (ENDPOINT, "http://collector:port", "must be http:// or https:// and a host"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "grpc://x", "must be http:// or https://"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "x", "must be http:// or https://"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "must be a number of seconds"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "-1", "must be a number of seconds"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "must be http/protobuf"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip", "must be none or gzip or deflate"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/not/there", "must be an existing file"),
        ("OTEL_SDK_DISABLED", "maybe", "must be true or false"),
        ("OTEL_TRACES_SAMPLER", "some", "must be always_on or always_off or traceidratio or"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-4", "must be a whole number from 1"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE must be at most"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "99999", "must be at most OTEL_BSP_MAX_QUEUE_SIZE"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0", "must be a whole number from 1"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-3", "must be a whole number from 0"),
        ("OTEL_METRICS_EXEMPLAR_FILTER", "x", "must be always_on or always_off or trace_based"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team", "must be name=value"),
    ],
)
def test_a_wrong_value_is_one_line(name: str, value: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as failed:
        check_collector(HERE | {name: value})
    assert failed.value.message.startswith(f"{name}={value}: ")
    assert allowed in failed.value.message


def test_what_a_ratio_is_given_must_be_one() -> None:
    given = HERE | {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "half"}
    with pytest.raises(ConfigError, match="OTEL_TRACES_SAMPLER_ARG=half: must be a number from 0"):
        check_collector(given)


def test_no_secret_is_shown() -> None:
    for name, value in (
        ("OTEL_EXPORTER_OTLP_HEADERS", "Bearer sesame"),
        (ENDPOINT, "ftp://me:sesame@collector"),
    ):
        with pytest.raises(ConfigError) as failed:
            check_collector(HERE | {name: value})
        assert "sesame" not in failed.value.message


def test_what_is_sound_is_taken(tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    certificate.touch()
    check_collector(
        HERE
        | {
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2.5",
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20x, tenant=a,",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(certificate),
            "OTEL_TRACES_SAMPLER": "ParentBased_TraceIdRatio",
            "OTEL_TRACES_SAMPLER_ARG": "0.25",
            "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "none",
            "OTEL_BSP_MAX_QUEUE_SIZE": "4096",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1024",
            "OTEL_RESOURCE_ATTRIBUTES": "",
        }
    )


def test_without_a_collector_nothing_of_it_is_looked_at() -> None:
    check_collector({"OTEL_BSP_MAX_QUEUE_SIZE": "x"})
    check_collector(HERE | {"OTEL_SDK_DISABLED": "true", ENDPOINT: "nonsense"})


def test_what_the_environment_says_stands_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".env"
    file.write_text(f"{ENDPOINT}=http://file:4318\nOTEL_SERVICE_NAME=mine\nPORT=1\n")
    monkeypatch.setenv(ENDPOINT, "http://environment:4318")
    given = collector_variables(file)
    assert given[ENDPOINT] == "http://environment:4318"
    assert given["OTEL_SERVICE_NAME"] == "mine"
    assert "PORT" not in given
    assert names_collector(given)
