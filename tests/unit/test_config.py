"""Settings: what is taken, and the one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.policy.deployment import misspelt
from tidegate.settings import (
    GOOGLE_URL,
    PROVIDER_KEYS,
    SECRETS,
    ClassifierMode,
    Config,
    allowed,
    load,
    load_client,
    origins,
)
from tidegate.upstream.usage_api import ADMIN_KEYS
from tidegate.usual_models import EMULATORS_KEY

# Each setting that has wrong values, with some of them and a word of what the line must say.
WRONG = {
    "DATABASE_URL": (
        [
            *("mysql://db/x", "db:5432", "postgresql+asyncpg://db/x", "postgresql://[bad/x"),
            *("postgresql://u:p@db:port/x", "postgresql://u:p@a:5432,b:port/x"),
            *("postgresql:/x", "postgres:u@db/x", "postgresql:x"),
        ],
        "postgresql://",
    ),
    "REDIS_URL": (
        ["http://valkey", "valkey:6379", "redis://valkey:port/0", "redis+x://h"],
        "redis://",
    ),
    "DATA_DIR": ([__file__, "~nosuchuser/x"], "folder"),
    "KEY_FOLDER": ([__file__, "~nosuchuser/x"], "folder"),
    "BLOB_URL": (["ftp://bucket", "bucket", "s3://", "gs:///x", "s3://key:word@bucket"], "s3://"),
    "HOST": (["a b", "http://localhost", "-x", "1.2.3.4:80"], "IP address"),
    "PORT": (["abc", "-1", "65536", "80.5"], "from 0 to 65535"),
    "TIDEGATE_DEMO": (["perhaps", "2"], "1 or 0"),
    "VIEWERS_READ_BODIES": (["perhaps", "2"], "1 or 0"),
    "ADMIN_TOKEN": (["fifteen-letters", "sixteen letters and spaces"], "16 characters"),
    "OIDC_ISSUER": (["issuer.example", "http://issuer.example", "ftp://issuer"], "https:// URL"),
    "OIDC_ROLES": (["[]", "{", '{"groups=x": "root"}'], "JSON object"),
    "OPERATOR_LOG_DAYS": (["29", "a year"], "from 30 to 36500"),
    "JWT_ISSUER": (
        ["issuer.example", "http://issuer.example", "https://u@issuer.example", "https://a/?b=c"],
        "https:// URL",
    ),
    "CORS_ORIGINS": (
        [
            *("chat.example", "https://a.example/", "*", "ftp://a.example", "https://u@a.example"),
            *("https://*.a.example", "https://a.example:443", "http://a:80"),
            *("https://a.exämple", "https://", "https://a.example:", "https://a b"),
        ],
        "https://host",
    ),
    "ALLOWED_HOSTS": (["a b", "https://gate.example", "gate.example:443", "*"], "without ports"),
    "ALERT_WEBHOOK_URL": (["hooks.slack.com", "ftp://a", "https://", "https://a:b@c"], "https://"),
    "ALERT_FORMAT": (["teams"], "standard, slack"),
    "BODIES_OFF": (["a b", "acme,a|b"], "names of tenants"),
    "RECONCILE": (["gemini", "openai,mistral"], "openai, anthropic"),
    "AUTH": (["yes", "1"], "auto, on, off"),
    "AUTH_OUTAGE_MS": (["0", "10m"], "milliseconds"),
    "GEMINI_BASE_URL": (["upstream", "ftp://upstream", "http://"], "https://"),
    "CONNECT_TIMEOUT_MS": (["0", "5s", "86400001"], "from 1 to 86400000"),
    "FIRST_BYTE_TIMEOUT_MS": (["0", "soon"], "milliseconds"),
    "IDLE_TIMEOUT_MS": (["0", "soon"], "milliseconds"),
    "TOTAL_TIMEOUT_MS": (["0", "soon"], "milliseconds"),
    "FETCH_TIMEOUT_MS": (["0", "soon"], "milliseconds"),
    "RATE_LIMITS": (["5", "[]", "{text_only: 5}", '"{}"', "nan"], "text_only"),
    "TIDEGATE_POLICY": (["nowhere.toml", ".", "~nosuchuser/x"], "an existing file"),
    "SEMAPHORE_TIMEOUT": (["0", "0.1", "nan", "inf", "3s", "3601"], "from 0.2 to 3600"),
    "WHEN_VALKEY_AWAY": (["open"], "closed, local"),
    "ON_LOST": (["ignore"], "finish, cancel"),
    "ON_EXPIRY": (["forget"], "reuse, hold"),
    "CLASSIFIER": (["always"], "llm, auto, keywords"),
    "CLASSIFIER_TIMEOUT_MS": (["0", "soon"], "milliseconds"),
    "CLASSIFIER_LIMIT": (["0", "10001"], "from 1 to 10000"),
    "MAX_PROMPT_CHARS": (["0", "many"], "from 1 up"),
    "MAX_FILE_BYTES": (["0", "50MB"], "bytes"),
    "MAX_FILES": (["-1", "1001"], "from 0 to 1000"),
    "MAX_BODY_BYTES": (["0", "1GB"], "bytes"),
    "MAX_HELD_BYTES": (["0", "1GB"], "bytes"),
    "MAX_BATCH_FILES_BYTES": (["0", "10GB"], "bytes"),
    "RECEIVE_TIMEOUT_MS": (["0", "soon"], "milliseconds"),
    "STREAM_WAIT_MS": (["0", "soon"], "milliseconds"),
    "KEEP_ALIVE_AFTER_MS": (["-1", "soon"], "milliseconds"),
    "CACHE_WAIT_US_PER_TOKEN": (["-1", "60001", "a while"], "a whole number from 0 to 60000"),
    "STALLED_READER_MS": (["0", "soon"], "milliseconds"),
    "MAX_ATTEMPTS": (["0", "101"], "from 1 to 100"),
    "CLAIM_LEASE_MS": (["0", "soon"], "milliseconds"),
    # Moments that no calendar and no column has.
    "JOB_DEADLINE_MS": (["0", "none", "1000000000000000"], "from 1 to 31536000000"),
    "RETENTION_DAYS": (["0", "forever", "3000000000"], "days from 1 to 100000"),
    "WEBHOOK_SECRET": (
        (
            "whsec_QUFB",
            "A" * 32,
            "whsec_" + "A" * 28,
            "whsec_" + "A" * 88,
            "whsec_!",
            "xwhsec_QUFB",
            "whsec_" + "A" * 32 + ",",
            "whsec_" + "A" * 32 + "," + "A" * 32,
            ",".join(["whsec_" + "A" * 32] * 3),
        ),
        "whsec_",
    ),
    "WEBHOOK_ALLOW_PRIVATE": (("maybe",), "1 or 0"),
    "WEBHOOK_TIMEOUT_MS": (("0", "x"), "a whole number of milliseconds"),
    "PROVIDER_BATCH_GATHER_MS": (("0", "x"), "a whole number of milliseconds"),
    "BACKGROUND_POLL_MS": (("0", "x"), "a whole number of milliseconds"),
    "PROVIDER_BATCH_POLL_MS": (("0", "x"), "a whole number of milliseconds"),
    "PROVIDER_BATCH_WINDOW_MS": (("0", "x"), "a whole number of milliseconds"),
    "PROVIDER_BATCH_CANCEL_MS": (("0", "x"), "a whole number of milliseconds"),
    "FLEX_WITHIN_MS": (("0", "x"), "a whole number of milliseconds"),
    "SPILL_MAX_BYTES": (["-1", "1GB"], "bytes"),
    "AUDIT_FULL": (["lose"], "block, drop"),
    "RECORD_EXPORT": (["csv"], "off, jsonl, parquet"),
    "LEAVE_MS": (["-1", "soon"], "milliseconds"),
    "SHUTDOWN_GRACE_MS": (["0", "soon"], "milliseconds"),
    "MIGRATE_AT_START": (["perhaps"], "1 or 0"),
    "LOG_FORMAT": (["xml"], "auto, console, json"),
    "WORKER_PORT": (["some", "-1", "65536"], "from 0 to 65535"),
    "LOG_LEVEL": (["loud"], "debug, info, warning, error"),
    "TIDEGATE_URL": (
        ["localhost:8000", "ftp://gate", "http://", "https://me:word@gate", "http://gate/?a=b"],
        "http:// or https:// URL",
    ),
    "TIDEGATE_API_KEY": (["tg_a b", "tg_\u00e9"], "tidegate keys create"),
}
ANY_TEXT_WILL_DO = {
    *("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"),
    *("JWT_AUDIENCE", "JWT_TENANT_CLAIM", "OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET"),
    *("TEXT_MODEL", "MULTI_MODAL_MODEL", "IMAGE_MODEL", "CLASSIFIER_MODEL"),
}


def given(**environ: str) -> Config:
    return load(environ, dotenv=None)


def refusal(**environ: str) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        load(environ, dotenv=None)
    return refused.value


def test_without_any_variable_the_documented_defaults_hold() -> None:
    config = given()
    assert config.rate_limits == {"text_only": 5, "multi_modal": 3, "image_generation": 2}
    assert config.lease_ms == 3000
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.gemini_base_url == GOOGLE_URL
    assert config.classifier is ClassifierMode.AUTO
    assert config.when_valkey_away == "closed"
    assert config.embedded
    assert config.emulated


def test_every_setting_is_read_from_the_variable_of_its_name() -> None:
    environ = {
        "DATABASE_URL": "postgresql://db/x",
        "REDIS_URL": "redis://valkey",
        "GEMINI_API_KEY": "k",
        "GEMINI_BASE_URL": "http://upstream:1/",
        "RATE_LIMITS": '{"text_only": 7}',
        "SEMAPHORE_TIMEOUT": "0.5",
        "PORT": " 81 ",
        "LOG_LEVEL": "DEBUG",
        "TIDEGATE_DEMO": "1",
        "JOB_DEADLINE_MS": "",
        "ON_EXPIRY": "hold",
        "CLASSIFIER": "Keywords",
    }
    config = given(**environ)
    assert config.database_url is not None
    assert config.database_url.get_secret_value() == "postgresql://db/x"
    assert config.gemini_base_url == "http://upstream:1"
    assert config.rate_limits == {"text_only": 7, "multi_modal": 3, "image_generation": 2}
    assert config.lease_ms == 500
    assert (config.port, config.log_level, config.tidegate_demo) == (81, "debug", True)
    assert config.job_deadline_ms is None
    assert config.on_expiry == "hold"
    assert config.classifier is ClassifierMode.KEYWORDS
    assert not config.embedded
    assert not config.emulated


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [(name, value, word) for name, (values, word) in WRONG.items() for value in values],
)
def test_a_wrong_value_gives_one_line_with_variable_value_and_what_is_allowed(
    name: str, value: str, word: str
) -> None:
    partner = {"DATABASE_URL": "REDIS_URL", "REDIS_URL": "DATABASE_URL"}.get(name)
    sound = {"DATABASE_URL": "postgresql://db/x", "REDIS_URL": "redis://valkey"}
    beside = {partner: sound[partner]} if partner else {}
    line = str(refusal(**{name: value}, **beside))
    assert line.startswith(f"{name}=")
    assert word in line.partition(": ")[2]
    assert "\n" not in line
    if name in SECRETS:
        assert value not in line.partition(": ")[0]
    elif ":" not in value:
        assert line.startswith(f"{name}={value}: ")


def test_an_env_that_is_a_folder_is_a_mistake(tmp_path: Path) -> None:
    """Such as Docker makes of a mount whose file is missing: all settings would be left out."""
    (tmp_path / ".env").mkdir()
    for read in (load, load_client, origins):
        with pytest.raises(ConfigError, match=r"\.env=\(file\): must be a readable file"):
            read({}, tmp_path / ".env")


def test_the_table_of_wrong_values_leaves_no_setting_out() -> None:
    fields = {field.upper() for field in Config.model_fields}
    assert set(WRONG) | ANY_TEXT_WILL_DO == fields
    assert {field for field in fields if allowed(field.lower()) == "text"} == ANY_TEXT_WILL_DO


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"text": 5}, "unknown type 'text'"),
        ({"text_only": -1}, "text_only must be a whole number from 0"),
        ({"text_only": 100_001}, "to 100000"),
        ({"text_only": True}, "text_only must be a whole number"),
        ({"multi_modal": "3"}, "multi_modal must be a whole number"),
        ({"multi_modal": 2.0}, "multi_modal must be a whole number"),
    ],
)
def test_a_wrong_limit_is_named_by_its_type(limits: dict[str, object], said: str) -> None:
    raw = json.dumps(limits)
    line = str(refusal(RATE_LIMITS=raw))
    assert line.startswith(f"RATE_LIMITS={raw}: ")
    assert said in line


@pytest.mark.parametrize("name", ["DATA_DIR", "TIDEGATE_POLICY"])
def test_a_name_that_is_too_long_for_the_system_is_refused(name: str) -> None:
    assert str(refusal(**{name: "x" * 300})).startswith(f"{name}=xxx")


@pytest.mark.parametrize(
    "url",
    [
        *("postgresql:///x?host=/run/postgresql", "postgres://%2Frun%2Fpostgresql/x"),
        *("postgresql://u:p:w@[::1]:5432/x", "postgresql://u@a:1,b:2,c/x?sslmode=require"),
    ],
)
def test_urls_that_postgresql_takes_are_taken(url: str) -> None:
    config = given(DATABASE_URL=url, REDIS_URL="redis://valkey")
    assert config.database_url is not None
    assert config.database_url.get_secret_value() == url


def test_a_value_of_several_lines_is_shown_as_one_and_not_at_length() -> None:
    line = str(refusal(PORT="80\n" + "0" * 5000))
    assert len(line.splitlines()) == 1
    assert len(line) < 400


SECRET = "s3cr3t-w0rd"


@pytest.mark.parametrize(
    "environ",
    [
        {"DATABASE_URL": f"mysql://me:{SECRET}@db"},
        {"DATABASE_URL": f"postgresql://me:{SECRET}@db"},
        {"REDIS_URL": f"http://:{SECRET}@valkey", "DATABASE_URL": "postgresql://db"},
        {"REDIS_URL": f"redis://:{SECRET}@valkey:port", "DATABASE_URL": "postgresql://db"},
        {"GEMINI_API_KEY": SECRET, "PORT": "none"},
        {"GEMINI_BASE_URL": f"https://me:{SECRET}@upstream"},
        {"GEMINI_BASE_URL": f"https://upstream?key={SECRET}"},
        {"BLOB_URL": f"s3://id:{SECRET}@bucket"},
        {"BLOB_URL": f"id:{SECRET}@bucket"},
        {"BLOB_URL": f"bucket?secret={SECRET}"},
        {"ALERT_WEBHOOK_URL": f"https//hooks.example/services/{SECRET}"},
    ],
)
def test_no_secret_is_in_a_refusal_or_in_what_led_to_it(environ: dict[str, str]) -> None:
    error: BaseException | None = refusal(**environ)
    while error is not None:
        assert SECRET not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__


def test_no_secret_is_in_a_config_that_is_printed() -> None:
    config = given(
        DATABASE_URL=f"postgresql://me:{SECRET}@db/x",
        REDIS_URL=f"redis://:{SECRET}@valkey",
        GEMINI_API_KEY=SECRET,
    )
    shown = f"{config} {config!r} {config.model_dump()} {config.model_dump_json()}"
    assert SECRET not in shown


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_may_be_in_a_file(name: str, tmp_path: Path) -> None:
    values = {
        "DATABASE_URL": "postgresql://db/x",
        "REDIS_URL": "redis://valkey",
        **dict.fromkeys(PROVIDER_KEYS, "k"),
        "ADMIN_TOKEN": "a-token-of-some-length",
        "OIDC_CLIENT_SECRET": "s",
        "WEBHOOK_SECRET": "whsec_" + "A" * 32,
        "TIDEGATE_API_KEY": "tg_a_b",
        "ALERT_WEBHOOK_URL": "https://hooks.example/services/T0",
    }
    path = tmp_path / "secret"
    path.write_text(f"{values.pop(name)}\n")
    config = given(**values, **{f"{name}_FILE": str(path)})
    secret = getattr(config, name.lower())
    assert secret.get_secret_value() == path.read_text().strip()


def test_a_secret_given_twice_or_in_an_unreadable_or_empty_file_stops_the_start(
    tmp_path: Path,
) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    twice = refusal(GEMINI_API_KEY=SECRET, GEMINI_API_KEY_FILE=str(empty))
    assert str(twice).startswith("GEMINI_API_KEY_FILE=")
    assert "not both" in str(twice)
    assert SECRET not in str(twice)
    for path, said in [
        (empty, "not empty"),
        (binary, "not UTF-8"),
        (tmp_path / "missing", "No such file"),
        (tmp_path, "directory"),
    ]:
        line = str(refusal(GEMINI_API_KEY_FILE=str(path)))
        assert line.startswith(f"GEMINI_API_KEY_FILE={path}: ")
        assert said in line


def test_the_environment_wins_over_dotenv_and_dotenv_over_the_defaults(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("# a comment\nexport PORT=81\nTEXT_MODEL='one'\nLOG_LEVEL=\"error\"\n")
    config = load({"PORT": "82"}, dotenv)
    assert (config.port, config.text_model, config.log_level) == (82, "one", "error")
    assert load({}, tmp_path / "none").port == 8000


def test_a_dotenv_that_is_no_text_stops_the_start(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_bytes(b"PORT=\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load({}, dotenv)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        given().port = 1


def test_a_valkey_scheme_becomes_the_one_that_its_client_knows() -> None:
    for given_url, used in [
        ("valkey://h", "redis://h"),
        ("valkeys://h", "rediss://h"),
        ("valkey+sentinel://a:1,b:2/front", "redis+sentinel://a:1,b:2/front"),
        ("rediss+cluster://a:1,b:2", "rediss+cluster://a:1,b:2"),
    ]:
        config = given(REDIS_URL=given_url, DATABASE_URL="postgresql://db")
        assert config.redis_url is not None
        assert config.redis_url.get_secret_value() == used


def test_every_setting_is_described_in_a_sentence() -> None:
    for field, info in Config.model_fields.items():
        assert info.description, field
        assert info.description.endswith("."), field


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("RATE_LIMIT", "RATE_LIMITS"), ("GEMINI_KEY", "GEMINI_API_KEY")),
        *(("OPENAI_KEY", "OPENAI_API_KEY"), ("gemini_api_key", "GEMINI_API_KEY")),
        *(
            ("LOGLEVEL", "LOG_LEVEL"),
            ("DATABASE_URI", "DATABASE_URL"),
            ("TEXT_MODLE", "TEXT_MODEL"),
        ),
        ("ADMIN_TOKEN_FIEL", "ADMIN_TOKEN_FILE"),
        *((name, None) for name in ("HOSTNAME", "PATH", "HOME", "XDG_DATA_DIRS", "GROQ_API_KEY")),
        *((name, None) for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_TYPE")),
        *((name, None) for name in ("AZURE_OPENAI_API_KEY", "GOOGLE_API_KEY", "TIDEGATE_PORT")),
        *((name, None) for name in ADMIN_KEYS.values()),
        *((f"{name}_FILE", None) for name in ADMIN_KEYS.values()),
        *((name, None) for name in ("PORT", "REDIS_URL_FILE", "SHELL", "XAI_API_KEY", "AUTHOR")),
    ],
)
def test_a_name_that_is_nearly_a_setting_is_doubtful(
    name: str, meant: str | None, tmp_path: Path
) -> None:
    file = tmp_path / ".env"
    for place, environ in (("the environment", {name: "1"}), (str(file), {})):
        file.write_text("" if environ else f"{name}=1")
        found = misspelt(environ, file)
        assert [(one.place, one.near) for one in found] == [(place, meant)] * (meant is not None)


@pytest.mark.parametrize(
    ("keys", "text", "image"),
    [
        ({}, "gemini-2.5-flash", "gemini-2.5-flash-image"),
        ({"OPENAI_API_KEY": "k"}, "gpt-6-luna", "gpt-image-2.5-flare"),
        ({"ANTHROPIC_API_KEY": "k"}, "claude-haiku-5-5", "claude-haiku-5-5"),
        (
            {"ANTHROPIC_API_KEY": "k", "OPENAI_API_KEY": "k", "GEMINI_API_KEY": EMULATORS_KEY},
            *("gpt-6-luna", "gpt-image-2.5-flare"),
        ),
        (
            {"OPENAI_API_KEY": "k", "GEMINI_API_KEY": "k"},
            *("gemini-2.5-flash", "gemini-2.5-flash-image"),
        ),
        ({"OPENAI_API_KEY": "tg_of_this_gateway"}, "gemini-2.5-flash", "gemini-2.5-flash-image"),
        ({"OPENAI_API_KEY": "k", "TEXT_MODEL": "mine"}, "mine", "gpt-image-2.5-flare"),
    ],
)
def test_the_usual_models_are_of_the_account_that_there_is(
    keys: dict[str, str], text: str, image: str
) -> None:
    config = load(keys, None)
    assert (config.text_model, config.image_model) == (text, image)


@pytest.mark.parametrize("line", ["PORT 8124", "PORT: 8124", "'PORT'8124", 'PORT="8124'])
def test_a_line_of_env_that_says_nothing_is_named(line: str, tmp_path: Path) -> None:
    """Left out, its setting would have the default."""
    file = tmp_path / ".env"
    file.write_text(f"# a comment\nHOST=localhost\n\nexport AUTH=on\n{line}\n")
    with pytest.raises(ConfigError, match=r"env=\(line 5\): must be NAME=value") as failed:
        load({}, file)
    assert "8124" not in str(failed.value)  # it may be a key
    file.write_text("# a comment\nHOST=localhost\n\nexport AUTH=on\n")
    assert load({}, file).host == "localhost"


def test_a_folder_that_another_process_makes_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API and a worker that start together both look for it."""
    is_dir = Path.is_dir

    def is_dir_before_it_is_made(path: Path, **options: Any) -> bool:
        found = is_dir(path, **options)
        path.mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(Path, "is_dir", is_dir_before_it_is_made)
    assert load({"DATA_DIR": str(tmp_path / "data")}, None).data_dir == tmp_path / "data"
