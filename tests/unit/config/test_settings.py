"""Settings: values that are accepted or refused; no error message contains a secret."""

import multiprocessing
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reservation.config.redis_address import AddressKind, parse_redis_url
from reservation.config.secrets import SecretsError, load_or_create, load_secrets
from reservation.config.settings import (
    SANDBOX_CLIENT_KEY,
    SANDBOX_SECRET_KEY,
    ClientSettings,
    Rate,
    Settings,
    SettingsError,
    require_given_secrets,
)

LONG = "0123456789abcdef0123456789abcdef"

PRODUCTION = {
    "RESERVATION_ENV": "production",
    "RESERVATION_AUTH": "guest",
    "RESERVATION_ADMIN_API_KEY": "admin-" + LONG,
    "RESERVATION_SIGNING_KEYS": f"new-{LONG},old-{LONG}",
    "RESERVATION_ORDER_ID_KEY": "order-" + LONG,
    "RESERVATION_JWT_SECRET": "jwt-" + LONG,
    "RESERVATION_TOSS_API_URL": "https://api.tosspayments.com",
    "RESERVATION_TOSS_SECRET_KEY": "live_gsk_abc",
    "RESERVATION_TOSS_CLIENT_KEY": "live_gck_abc",
    "RESERVATION_PUBLIC_URL": "https://shop.example",
}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(**given: str) -> Settings:
        environ = {"RESERVATION_DATA_DIR": str(tmp_path / "var")}
        environ |= {f"RESERVATION_{name}": value for name, value in given.items()}
        return Settings.load(environ, dotenv_path=None)

    return load


def production(**changes: str) -> Settings:
    environ = PRODUCTION | {f"RESERVATION_{name}": value for name, value in changes.items()}
    return Settings.load(environ, dotenv_path=None)


def test_production_drains_before_it_stops(load: Any) -> None:
    assert load().drain_seconds == 0
    assert production().drain_seconds == 5
    assert production(DRAIN_SECONDS="0").drain_seconds == 0
    with pytest.raises(SettingsError, match="RESERVATION_DRAIN_SECONDS must be a whole number"):
        load(DRAIN_SECONDS="301")


def test_an_empty_environment_gives_the_documented_defaults(load: Any) -> None:
    settings = load()
    assert (settings.host, settings.port, settings.workers >= 1) == ("127.0.0.1", 8000, True)
    assert settings.public_url == "http://127.0.0.1:8000"
    assert settings.redis_url == settings.database_url == settings.toss_api_url == ""
    assert settings.toss_secret_key == SANDBOX_SECRET_KEY
    assert settings.toss_client_key == SANDBOX_CLIENT_KEY
    assert settings.prepare_rate == Rate(20, 1)
    assert settings.guest_rate == Rate(60, 60)
    assert settings.cors_origins == settings.trusted_proxies == ()
    assert (settings.auth, settings.key_prefix, settings.env) == ("guest", "rsv", "development")


def test_the_default_data_directory_is_an_absolute_path_to_var() -> None:
    settings = Settings.load(PRODUCTION, dotenv_path=None)
    assert settings.data_dir == Path.cwd() / "var"


def test_an_empty_variable_counts_as_unset(load: Any) -> None:
    assert load(PORT="", CORS_ORIGINS=" ").port == 8000


def test_each_setting_has_a_description_for_the_reference_page() -> None:
    for field in msgspec.inspect.type_info(Settings).fields:  # type: ignore[union-attr]
        meta = field.type
        assert isinstance(meta, msgspec.inspect.Metadata), field.name
        assert meta.extra_json_schema is not None
        assert meta.extra_json_schema["description"].endswith(".")
        assert meta.extra is not None
        assert meta.extra["default"]


def test_the_internal_port_is_off_or_beside_the_public_one(load: Any) -> None:
    off = load()
    assert (off.internal_port, off.internal_url, off.operator_url) == (0, "", off.public_url)
    on = load(HOST="10.0.0.5", INTERNAL_PORT="9000")
    assert (on.internal_host, on.internal_url) == ("10.0.0.5", "http://10.0.0.5:9000")
    apart = load(HOST="10.0.0.5", INTERNAL_PORT="9000", INTERNAL_HOST="::1")
    assert apart.internal_url == apart.operator_url == "http://[::1]:9000"
    elsewhere = load(INTERNAL_URL="http://api.internal:9000")
    assert elsewhere.operator_url == "http://api.internal:9000"
    with pytest.raises(SettingsError, match="RESERVATION_INTERNAL_PORT must be another port"):
        load(PORT="9000", INTERNAL_PORT="9000")


def test_the_default_public_url_uses_host_and_port_and_brackets_ipv6(load: Any) -> None:
    assert load(HOST="::1", PORT="81").public_url == "http://[::1]:81"
    assert load(PUBLIC_URL="https://shop.example/").public_url == "https://shop.example"


@pytest.mark.parametrize(
    ("text", "rate"),
    [("5/s", Rate(5, 1)), ("60/min", Rate(60, 60)), ("9/h", Rate(9, 3600)), ("0", None)],
)
def test_a_rate_is_parsed_as_a_count_per_period(load: Any, text: str, rate: Rate | None) -> None:
    assert load(PREPARE_RATE=text).prepare_rate == rate


def test_lists_are_split_at_commas(load: Any) -> None:
    settings = load(
        CORS_ORIGINS="https://a.example, http://localhost:3000/",
        TRUSTED_PROXIES="10.0.0.0/8,::1",
        SIGNING_KEYS="new,old",
    )
    assert settings.cors_origins == ("https://a.example", "http://localhost:3000")
    assert settings.trusted_proxies == ("10.0.0.0/8", "::1/128")
    assert settings.signing_keys == ("new", "old")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENV", "prodcution"),
        ("REDIS_URL", "http://127.0.0.1"),
        ("REDIS_URL", "redis://"),
        ("REDIS_URL", "unix://relative"),
        ("REDIS_URL", "redis://h:99999"),
        ("DATABASE_URL", "mysql://h/db"),
        ("DATABASE_URL", "sqlite:///x.db"),
        ("HOST", "http://127.0.0.1"),
        ("HOST", "a b"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("PORT", "8000.0"),
        ("PORT", "9" * 5000),
        ("WORKERS", "0"),
        ("WORKERS", "257"),
        ("PUBLIC_URL", "shop.example"),
        ("PUBLIC_URL", "https://shop.example/?a=1"),
        ("PUBLIC_URL", "https://user@shop.example"),
        ("TOSS_API_URL", "ftp://h"),
        ("STOREFRONT_URL", "javascript:alert(1)"),
        ("CORS_ORIGINS", "*"),
        ("CORS_ORIGINS", "https://a.example/path"),
        ("CORS_ORIGINS", "null"),
        ("PREPARE_RATE", "20"),
        ("PREPARE_RATE", "0/s"),
        ("PREPARE_RATE", "20/day"),
        ("GUEST_RATE", "-1/s"),
        ("AUTH", "none"),
        ("JWKS_URL", "file:///etc/passwd"),
        ("TOSS_CHECKOUT_URL", "//h"),
        ("TRUSTED_PROXIES", "proxy.example"),
        ("KEY_PREFIX", "a{b"),
        ("KEY_PREFIX", "x" * 33),
        ("SIGNING_KEYS", ","),
        ("ADMIN_API_KEY", "two words"),
        ("TOSS_SECRET_KEY", "\ufefftest_sk_x"),
        ("TOSS_SECRET_KEY", "live_sk_x"),
    ],
)
def test_an_invalid_value_is_refused_in_one_line_with_its_name(
    load: Any, name: str, value: str
) -> None:
    with pytest.raises(SettingsError, match=f"^RESERVATION_{name} must be ") as refused:
        load(**{name: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("redis+sentinel://h:26379", "service name"),
        ("redis+sentinel://h:26379/", "service name"),
        ("redis+sentinel://h:26379?tls=true", "service name"),
        ("redis+sentinel://h:26379/st ock", "redis\\+sentinel://HOST:PORT"),
        ("redis+sentinel://h:26379/stock/x", "database number"),
        ("redis+sentinel://h:0/stock", "ports from 1 to 65535"),
        ("redis+sentinel://h:70000/stock", "ports from 1 to 65535"),
        ("redis+sentinel://h,,g/stock", "hosts as HOST:PORT"),
        ("redis+sentinel:///stock", "hosts as HOST:PORT"),
        ("redis+sentinel://h/stock?tls=yes", "tls=true or tls=false"),
        ("redis+sentinel://h/stock?ssl_ca_certs=ca.pem", "tls=true together with"),
        ("redis+sentinel://h/stock?tls=true&tls=true", "each option at most once"),
        ("redis+sentinel://h/stock?timeout=3", "each option at most once"),
        ("redis+sentinel://h/stock?tls", "NAME=VALUE"),
        ("redis+sentinel://h/stock#x", "without a fragment"),
        ("redis+cluster://", "hosts as HOST:PORT"),
        ("redis+cluster://h:6379/1", "only database 0"),
        ("redis+cluster://h:6379?sentinel_user=x", "each option at most once"),
    ],
)
def test_an_address_of_several_servers_is_refused_with_its_fault(
    load: Any, url: str, named: str
) -> None:
    with pytest.raises(SettingsError, match=f"^RESERVATION_REDIS_URL must be .*{named}") as refused:
        load(REDIS_URL=url)
    assert "\n" not in str(refused.value)


def test_a_sentinel_address_has_hosts_service_users_and_tls() -> None:
    found = parse_redis_url(
        "redis+sentinel://app:p%40ss@s1.example:26380,[::1],10.0.0.3:26381/stock/2"
        "?tls=true&ssl_ca_certs=/etc/ca.pem&sentinel_user=watch&sentinel_password=s%26t"
    )
    assert found.kind is AddressKind.SENTINEL
    assert found.hosts == (("s1.example", 26380), ("::1", 26379), ("10.0.0.3", 26381))
    assert (found.service, found.database) == ("stock", 2)
    assert (found.username, found.password) == ("app", "p@ss")
    assert (found.sentinel_username, found.sentinel_password) == ("watch", "s&t")
    assert found.tls == {"ssl_ca_certs": "/etc/ca.pem"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", "redis://user:pw@h:6379/0"),
        ("REDIS_URL", "rediss://h"),
        ("REDIS_URL", "unix:///run/valkey.sock?db=1"),
        ("REDIS_URL", "redis+sentinel://:pw@s1:26379,s2:26379/stock"),
        ("REDIS_URL", "redis+cluster://user:pw@n1:7000,n2?tls=true&ssl_ca_certs=/ca.pem"),
        ("DATABASE_URL", "postgresql://postgres:@/postgres?host=/tmp/pg"),
        ("DATABASE_URL", "postgresql://u:p@h:5432/db"),
        ("HOST", "shop-1.example"),
        ("PORT", "0"),
    ],
)
def test_a_valid_value_is_accepted(load: Any, name: str, value: str) -> None:
    assert str(getattr(load(**{name: value}), name.lower())) == value


def test_keep_alive_defaults_to_75_seconds_and_fast_path_to_on(load: Any) -> None:
    assert (load().keep_alive_seconds, load().fast_path) == (75, True)
    assert load(FAST_PATH="off").fast_path is False
    for name, value in (("FAST_PATH", "yes"), ("KEEP_ALIVE_SECONDS", "0")):
        with pytest.raises(SettingsError, match=f"RESERVATION_{name}"):
            load(**{name: value})


def test_a_misspelt_name_is_refused_with_a_suggestion(load: Any) -> None:
    with pytest.raises(SettingsError, match="did you mean RESERVATION_WORKERS"):
        load(WORKRES="2")
    with pytest.raises(SettingsError, match="RESERVATION_port is not a setting"):
        load(port="1")


def test_unrelated_variables_are_ignored(tmp_path: Path) -> None:
    unrelated = {"PATH": "/bin", "MY_RESERVATION_PORT": "x", "RESERVATIONS": "x"}
    Settings.load({"RESERVATION_DATA_DIR": str(tmp_path / "var"), **unrelated}, None)


def test_the_environment_overrides_dotenv(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(
        "# a comment\n"
        "\n"
        "export RESERVATION_PORT=81  # with a reason\n"
        'RESERVATION_KEY_PREFIX="quoted" # too\n'
        "RESERVATION_ADMIN_API_KEY='has#hash'\n"
        "RESERVATION_JWT_SECRET=has#hash\n"
        "RESERVATION_HOST=::1\n"
        "OTHER=thing\n"
    )
    environ = {"RESERVATION_DATA_DIR": str(tmp_path / "var"), "RESERVATION_HOST": "127.0.0.2"}
    settings = Settings.load(environ, dotenv)
    assert (settings.port, settings.key_prefix, settings.host) == (81, "quoted", "127.0.0.2")
    assert settings.admin_api_key == settings.jwt_secret == "has#hash"


@pytest.mark.parametrize("line", ["RESERVATION_PORT", "a b=1", 'RESERVATION_PORT="81'])
def test_a_malformed_line_of_dotenv_is_refused(tmp_path: Path, line: str) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"#\n{line}\n")
    with pytest.raises(SettingsError, match="line 2 must"):
        Settings.load(PRODUCTION, dotenv)


def test_a_misspelt_name_in_dotenv_is_refused(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("RESERVATION_ADMIN_KEY=x\n")
    with pytest.raises(SettingsError, match="did you mean RESERVATION_ADMIN_API_KEY"):
        Settings.load(PRODUCTION, dotenv)


def test_production_accepts_complete_settings_and_generates_no_keys(tmp_path: Path) -> None:
    settings = production(DATA_DIR=str(tmp_path / "var"))
    assert settings.production
    assert not (tmp_path / "var").exists()


@pytest.mark.parametrize("name", sorted(set(PRODUCTION) - {"RESERVATION_ENV"}))
def test_production_refuses_missing_settings(name: str) -> None:
    environ = {key: value for key, value in PRODUCTION.items() if key != name}
    with pytest.raises(SettingsError, match=f"^{name} must be given in production$"):
        Settings.load(environ, dotenv_path=None)


def test_production_lists_all_missing_settings_at_once() -> None:
    with pytest.raises(SettingsError, match=r"AUTH, .*ADMIN_API_KEY, .*PUBLIC_URL must be given"):
        Settings.load({"RESERVATION_ENV": "production"}, dotenv_path=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PUBLIC_URL", "http://shop.example"),
        ("STOREFRONT_URL", "http://shop.example"),
        ("TOSS_API_URL", "http://api.tosspayments.com"),
        ("TOSS_API_URL", "https://evil-tosspayments.com"),
        ("JWKS_URL", "http://shop.example/jwks"),
        ("TOSS_SECRET_KEY", SANDBOX_SECRET_KEY),
        ("TOSS_SECRET_KEY", "live_gck_abc"),
        ("TOSS_CLIENT_KEY", "live_ck_abc"),
        ("TOSS_CLIENT_KEY", "live_gsk_abc"),
        ("ADMIN_API_KEY", "short"),
        ("SIGNING_KEYS", f"{LONG},short"),
        ("ORDER_ID_KEY", "short"),
        ("JWT_SECRET", "short"),
    ],
)
def test_production_refuses_unsafe_settings(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^RESERVATION_{name} must be ") as refused:
        production(**{name: value})
    assert value not in str(refused.value)


def test_production_refuses_test_keys_of_the_pg() -> None:
    with pytest.raises(SettingsError, match="must be a live_ key in production"):
        production(TOSS_SECRET_KEY="test_gsk_abc", TOSS_CLIENT_KEY="test_gck_abc")


def test_production_with_the_shops_public_keys_needs_no_shared_secret() -> None:
    environ = PRODUCTION | {
        "RESERVATION_AUTH": "jwt",
        "RESERVATION_JWKS_URL": "https://shop.example/jwks",
    }
    del environ["RESERVATION_JWT_SECRET"]
    assert Settings.load(environ, dotenv_path=None).jwt_secret == ""


def test_production_warns_if_any_audience_or_issuer_is_accepted() -> None:
    shop = PRODUCTION | {"RESERVATION_AUTH": "jwt"}
    warnings = Settings.load(shop, dotenv_path=None).warnings
    assert [line.partition(" ")[0] for line in warnings] == [
        "RESERVATION_JWT_AUDIENCE",
        "RESERVATION_JWT_ISSUER",
    ]
    strict = shop | {"RESERVATION_JWT_AUDIENCE": "shop", "RESERVATION_JWT_ISSUER": "https://id"}
    assert Settings.load(strict, dotenv_path=None).warnings == ()
    assert Settings.load(PRODUCTION, dotenv_path=None).warnings == ()


def test_the_sandboxs_key_is_never_sent_to_the_real_pg(load: Any) -> None:
    with pytest.raises(SettingsError, match="RESERVATION_TOSS_SECRET_KEY"):
        load(TOSS_API_URL="https://api.tosspayments.com")


def test_printed_settings_hide_secrets(load: Any) -> None:
    settings = load(ADMIN_API_KEY="hunter2", REDIS_URL="redis://u:hunter2@h")
    assert "hunter2" not in f"{settings!r} {settings} {list(settings.__rich_repr__())}"
    assert "..." in repr(load_or_create(settings.data_dir))


def test_generated_keys_are_stored_and_given_keys_override_them(load: Any) -> None:
    first = load()
    again = load(ADMIN_API_KEY="given")
    assert again.admin_api_key == "given"
    assert again.order_id_key == first.order_id_key
    assert again.signing_keys == first.signing_keys
    keys = {first.admin_api_key, *first.signing_keys, first.order_id_key, first.jwt_secret}
    assert len(keys) == 4
    assert all(len(key) >= 32 for key in keys)


def test_generated_keys_are_readable_only_by_their_owner(load: Any) -> None:
    path = load().data_dir / "secrets.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["secrets.json"]
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="accessible to other users"):
        load()


@pytest.mark.parametrize("content", ["", "{", '{"admin_api_key":"x"}', "[]"])
def test_a_damaged_key_file_is_reported_and_left_unchanged(tmp_path: Path, content: str) -> None:
    path = tmp_path / "secrets.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(SecretsError, match="damaged"):
        load_or_create(tmp_path)
    assert path.read_text() == content


def _race(data_dir: Path, barrier: Any, results: Any) -> None:
    barrier.wait(30)
    results.put(msgspec.json.encode(load_or_create(data_dir)))


def test_concurrent_first_starts_agree_on_one_set_of_keys(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    racers = [
        context.Process(target=_race, args=(tmp_path / "new" / "var", barrier, results))
        for _ in range(8)
    ]
    for racer in racers:
        racer.start()
    seen = {results.get(timeout=150) for _ in racers}
    for racer in racers:
        racer.join(30)
    assert len(seen) == 1
    assert [entry.name for entry in (tmp_path / "new" / "var").iterdir()] == ["secrets.json"]


def test_roles_on_several_machines_require_given_secrets() -> None:
    with pytest.raises(SettingsError, match=r"ADMIN_API_KEY, .*JWT_SECRET must be given with"):
        require_given_secrets({}, dotenv_path=None)
    require_given_secrets(PRODUCTION, dotenv_path=None)


def test_client_settings_read_address_and_key_and_create_no_file(tmp_path: Path) -> None:
    data_dir = tmp_path / "var"
    environ = {"RESERVATION_DATA_DIR": str(data_dir), "RESERVATION_PORT": "81"}
    client = ClientSettings.load(environ, dotenv_path=None)
    assert (client.public_url, client.admin_api_key) == ("http://127.0.0.1:81", "")
    assert not data_dir.exists()
    made = load_or_create(data_dir)
    assert load_secrets(data_dir) == made
    assert ClientSettings.load(environ, dotenv_path=None).admin_api_key == made.admin_api_key
    assert made.admin_api_key not in repr(ClientSettings.load(environ, dotenv_path=None))
