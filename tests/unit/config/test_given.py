"""Settings given as files, and the environment `staging`."""

import re
from pathlib import Path

import msgspec
import pytest

from reservation.config.given import may_be_a_file
from reservation.config.settings import (
    ClientSettings,
    Settings,
    SettingsError,
    require_given_secrets,
)

SECRET = "0123456789abcdef0123456789abcdef"
SECRETS = ("ADMIN_API_KEY", "SIGNING_KEYS", "ORDER_ID_KEY", "JWT_SECRET")
STAGING = {
    "RESERVATION_ENV": "staging",
    "RESERVATION_AUTH": "guest",
    **{f"RESERVATION_{name}": SECRET for name in SECRETS},
    "RESERVATION_TOSS_API_URL": "https://api.tosspayments.com",
    "RESERVATION_TOSS_SECRET_KEY": "test_gsk_abc",
    "RESERVATION_TOSS_CLIENT_KEY": "test_gck_abc",
    "RESERVATION_PUBLIC_URL": "https://shop.example",
}


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"RESERVATION_DATA_DIR": str(tmp_path / "var")}


def kept(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_each_secret_and_each_address_may_be_a_file() -> None:
    for field in msgspec.inspect.type_info(Settings).fields:  # type: ignore[union-attr]
        description = field.type.extra_json_schema["description"]
        secret = description.endswith("A secret.")
        assert may_be_a_file(field.name) or not (secret or field.name.endswith("_url"))
    assert not may_be_a_file("key_prefix")
    assert not may_be_a_file("data_dir")


@pytest.mark.parametrize(
    ("name", "content", "value"),
    [
        ("ADMIN_API_KEY", "secret", "secret"),
        ("ADMIN_API_KEY", "secret\n", "secret"),
        ("ADMIN_API_KEY", "secret\r\n", "secret"),
        ("SIGNING_KEYS", "new,old\n", ("new", "old")),
        ("DATABASE_URL", "postgresql://u:p@h/db\n", "postgresql://u:p@h/db"),
        ("REDIS_URL", "redis://:pw@h:6379/0", "redis://:pw@h:6379/0"),
        ("PUBLIC_URL", "https://shop.example/\n", "https://shop.example"),
        ("TOSS_SECRET_KEY", "test_gsk_abc\n", "test_gsk_abc"),
    ],
)
def test_the_value_of_a_file_lacks_one_trailing_newline(
    tmp_path: Path, environ: dict[str, str], name: str, content: str, value: object
) -> None:
    environ[f"RESERVATION_{name}_FILE"] = kept(tmp_path / "value", content)
    assert getattr(Settings.load(environ, None), name.lower()) == value


def test_a_second_trailing_newline_is_part_of_the_value(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    environ["RESERVATION_ADMIN_API_KEY_FILE"] = kept(tmp_path / "value", "secret\n\n")
    with pytest.raises(SettingsError, match=r"^RESERVATION_ADMIN_API_KEY must be 1 to 512"):
        Settings.load(environ, None)


def test_dotenv_may_name_a_file(tmp_path: Path, environ: dict[str, str]) -> None:
    path = kept(tmp_path / "value", "secret\n")
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"RESERVATION_JWT_SECRET_FILE={path}\n")
    assert Settings.load(environ, dotenv).jwt_secret == "secret"
    environ["RESERVATION_JWT_SECRET"] = "other"
    with pytest.raises(SettingsError, match="must not both be given"):
        Settings.load(environ, dotenv)


def test_an_empty_variable_counts_as_unset_beside_its_file(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    environ["RESERVATION_ADMIN_API_KEY"] = ""
    environ["RESERVATION_JWT_SECRET_FILE"] = " "
    environ["RESERVATION_ADMIN_API_KEY_FILE"] = kept(tmp_path / "value", "secret")
    assert Settings.load(environ, None).admin_api_key == "secret"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "is empty"),
        ("\n", "is empty"),
        (b"\xff\xfe" + SECRET.encode(), "cannot be read as text"),
        (SECRET * 3000, "is longer than 65536 bytes"),
    ],
)
def test_an_unusable_file_is_refused_in_one_line_without_its_content(
    tmp_path: Path, environ: dict[str, str], content: str | bytes | None, reason: str
) -> None:
    path = tmp_path / "value"
    if content is not None:
        kept(path, content)
    environ["RESERVATION_ADMIN_API_KEY_FILE"] = str(path)
    line = f"the file of RESERVATION_ADMIN_API_KEY_FILE {reason}"
    with pytest.raises(SettingsError, match=f"^{re.escape(line)}$"):
        Settings.load(environ, None)


def test_a_secret_in_place_of_its_path_is_not_printed(environ: dict[str, str]) -> None:
    for value in (SECRET, f"{SECRET}\0", SECRET * 200):
        environ["RESERVATION_ADMIN_API_KEY_FILE"] = value
        with pytest.raises(SettingsError, match="RESERVATION_ADMIN_API_KEY_FILE") as refused:
            Settings.load(environ, None)
        assert SECRET not in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_directory_is_not_a_value(tmp_path: Path, environ: dict[str, str]) -> None:
    environ["RESERVATION_REDIS_URL_FILE"] = str(tmp_path)
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        Settings.load(environ, None)


def test_a_setting_given_in_both_ways_is_refused_without_its_value(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    environ["RESERVATION_ADMIN_API_KEY"] = SECRET
    environ["RESERVATION_ADMIN_API_KEY_FILE"] = kept(tmp_path / "value", SECRET)
    message = "RESERVATION_ADMIN_API_KEY and RESERVATION_ADMIN_API_KEY_FILE must not both be given"
    with pytest.raises(SettingsError, match=f"^{message}$"):
        Settings.load(environ, None)


@pytest.mark.parametrize("name", ["PORT_FILE", "WORKERS_FILE", "KEY_PREFIX_FILE", "FILE"])
def test_other_settings_have_no_file(environ: dict[str, str], name: str) -> None:
    with pytest.raises(SettingsError, match=f"^RESERVATION_{name} is not a setting"):
        Settings.load(environ | {f"RESERVATION_{name}": "/value"}, None)


def test_production_takes_every_secret_from_a_file(tmp_path: Path) -> None:
    environ = {name: value for name, value in STAGING.items() if value != SECRET}
    for name in SECRETS:
        environ[f"RESERVATION_{name}_FILE"] = kept(tmp_path / name, f"{SECRET}\n")
    require_given_secrets(environ, None)
    settings = Settings.load(environ, None)
    assert settings.signing_keys == (SECRET,)
    assert settings.order_id_key == settings.jwt_secret == settings.admin_api_key == SECRET


def test_a_command_reads_no_file_but_its_own(tmp_path: Path, environ: dict[str, str]) -> None:
    environ["RESERVATION_ORDER_ID_KEY_FILE"] = str(tmp_path / "missing")
    environ["RESERVATION_ADMIN_API_KEY_FILE"] = kept(tmp_path / "key", "secret\n")
    environ["RESERVATION_INTERNAL_URL_FILE"] = kept(tmp_path / "url", "http://api:9000\n")
    settings = ClientSettings.load(environ, None)
    assert (settings.admin_api_key, settings.operator_url) == ("secret", "http://api:9000")


def test_staging_has_the_rules_of_production_and_test_keys() -> None:
    settings = Settings.load(STAGING, None)
    assert settings.production
    assert settings.drain_seconds == 5


def test_staging_takes_live_keys_too() -> None:
    live = {
        "RESERVATION_TOSS_SECRET_KEY": "live_gsk_abc",
        "RESERVATION_TOSS_CLIENT_KEY": "live_gck_abc",
    }
    assert Settings.load(STAGING | live, None).toss_secret_key == "live_gsk_abc"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ORDER_ID_KEY", "", "must be given in staging"),
        ("PUBLIC_URL", "", "must be given in staging"),
        ("PUBLIC_URL", "http://shop.example", "must be an https:// address in staging"),
        ("TOSS_API_URL", "https://sandbox.example", "must be https://api.tosspayments.com"),
        ("TOSS_SECRET_KEY", "test_gsk_sandbox", "must be your own key"),
        ("TOSS_CLIENT_KEY", "live_gck_abc", "must be the pair of"),
        ("ADMIN_API_KEY", "short", "must be at least 32 bytes in staging"),
    ],
)
def test_staging_refuses_what_production_refuses(name: str, value: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=f"^RESERVATION_{name} {reason}"):
        Settings.load(STAGING | {f"RESERVATION_{name}": value}, None)
