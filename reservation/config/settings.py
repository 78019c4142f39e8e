"""Parses the environment (and `.env`) into one frozen struct."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from reservation.config import parsing as environment
from reservation.config.gateway_keys import (
    SANDBOX_CLIENT_KEY,
    SANDBOX_SECRET_KEY,
    check_toss_keys,
)
from reservation.config.given import given_settings
from reservation.config.parsing import PREFIX, Rate, SettingsError, refusal, variable_of
from reservation.config.production import (
    GENERATED_SECRETS,
    refuse_missing,
    refuse_unsafe,
    required_in_production,
)
from reservation.config.secrets import SecretsError, load_or_create, load_secrets

__all__ = [
    "PREFIX",
    "SANDBOX_CLIENT_KEY",
    "SANDBOX_SECRET_KEY",
    "ClientSettings",
    "Rate",
    "Settings",
    "SettingsError",
    "require_given_secrets",
]

#: Longest drain: load balancers notice within some probes, and orchestrators kill after minutes.
_DRAIN_SECONDS_MAX: Final = 300
#: More replicas than a hold can reasonably wait for.
_ACK_REPLICAS_MAX: Final = 9
#: Return tokens are readable for 30 days, and the PG's idempotency keys for 15.
_RETENTION_DAYS_MIN: Final = 31
_RETENTION_DAYS_MAX: Final = 36_500
#: The environments with the rules of production.
_STRICT: Final = ("staging", "production")
_ENVIRONMENTS: Final = (
    "`development`, `production`, or `staging`: the rules of production, and the PG's test keys "
    "are allowed."
)
#: Above it a limit on unpaid orders has no effect.
_UNPAID_ORDERS_MAX: Final = 1_000_000


def _row(description: str, default: str) -> Meta:
    """A setting's row in docs/reference/settings.md (`make reference`)."""
    return Meta(description=description, extra={"default": default})


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of the service; its variable is the prefix and the field's name.

    An empty address selects the built-in part: embedded Valkey, SQLite in the data directory, the
    sandbox, the built-in storefront.
    """

    data_dir: Annotated[Path, _row("Directory for all data that outlives the process.", "`var`")]
    redis_url: Annotated[
        str,
        _row(
            "`redis://`, `rediss://`, `unix://`, "
            "`redis+sentinel://HOST:PORT[,HOST:PORT...]/SERVICE` or "
            "`redis+cluster://HOST:PORT[,HOST:PORT...]`.",
            "an embedded Valkey in the data directory",
        ),
    ]
    redis_ack_replicas: Annotated[
        int,
        _row(
            "Least number of replicas that acknowledge a change before it is answered, 0 to 9.",
            "`0` for a single server, `1` with Sentinel or a cluster",
        ),
    ]
    database_url: Annotated[str, _row("`postgresql://`.", "SQLite in the data directory")]
    host: Annotated[str, _row("The address to listen on.", "`127.0.0.1`")]
    port: Annotated[int, _row("The port to listen on; 0 lets the system choose.", "`8000`")]
    internal_port: Annotated[
        int,
        _row(
            "Port of `/metrics`, `/health/*`, `/ops`, `/docs`, `/schema` and `/v1/admin`, which "
            "then leave the public port; `/health/live` is on both.",
            "empty: the public port serves all",
        ),
    ]
    internal_host: Annotated[
        str, _row("The address to listen on with the internal port.", "that of `RESERVATION_HOST`")
    ]
    internal_url: Annotated[
        str,
        _row(
            "Base URL of the internal port, as reached by the commands.",
            "`http://INTERNAL_HOST:INTERNAL_PORT`, if the port is set",
        ),
    ]
    workers: Annotated[int, _row("API processes.", "one per CPU that the process may use")]
    drain_seconds: Annotated[
        int,
        _row(
            "Seconds between SIGTERM and closing the port; meanwhile the service is not "
            "ready but serves.",
            "`0`; `5` in production and staging",
        ),
    ]
    public_url: Annotated[
        str, _row("Base of successUrl and failUrl, as reached by buyers.", "`http://HOST:PORT`")
    ]
    toss_api_url: Annotated[
        str,
        _row(
            "Base URL of the PG; the real one is `https://api.tosspayments.com`.",
            "the bundled sandbox",
        ),
    ]
    toss_secret_key: Annotated[str, _row("The PG's secret key. A secret.", "the sandbox's")]
    toss_client_key: Annotated[str, _row("The PG's client key, for browsers.", "the sandbox's")]
    admin_api_key: Annotated[
        str, _row("Bearer token of operators. A secret.", "generated at first start")
    ]
    signing_keys: Annotated[
        tuple[str, ...],
        _row(
            "Keys of the service's tokens, comma-separated: the first signs, all verify. A secret.",
            "generated at first start",
        ),
    ]
    order_id_key: Annotated[
        str,
        _row(
            "Key from which order ids and customer keys are derived; must never change. A secret.",
            "generated at first start",
        ),
    ]
    storefront_url: Annotated[
        str,
        _row(
            "Page to which the success and fail URLs redirect browsers.", "the built-in storefront"
        ),
    ]
    cors_origins: Annotated[
        tuple[str, ...], _row("Allowed CORS origins, comma-separated.", "empty")
    ]
    shop_name: Annotated[str, _row("The shop's name on the built-in storefront.", "empty")]
    shop_url: Annotated[
        str, _row("The shop's website, to which the storefront's footer links.", "empty")
    ]
    shop_footer: Annotated[
        str,
        _row(
            "Plain text below each page of the storefront, such as the business registration; "
            "`\\n` begins a new line.",
            "empty",
        ),
    ]
    image_origins: Annotated[
        tuple[str, ...],
        _row(
            "Origins from which the storefront may load pictures of items, comma-separated.",
            "empty",
        ),
    ]
    prepare_rate: Annotated[
        Rate | None,
        _row(
            "Burst limit of a buyer's prepares, such as `20/s`; `0` disables the sustained "
            "limit as well.",
            "`20/s`",
        ),
    ]
    prepare_sustained: Annotated[
        Rate | None,
        _row(
            "Sustained limit of a buyer's prepares in one sale, such as `20/min`; `0` disables it.",
            "`20/min`",
        ),
    ]
    unpaid_orders: Annotated[
        int,
        _row(
            "Maximum unpaid orders of one buyer in one sale; beyond it 429 `too_many_orders`. "
            "`0` disables the limit.",
            "`20`",
        ),
    ]
    auth: Annotated[
        str,
        _row("`guest` issues buyer tokens, `jwt` verifies the shop's tokens.", "`guest`"),
    ]
    jwt_secret: Annotated[
        str,
        _row(
            "Signs guest tokens, or verifies the shop's tokens. A secret.",
            "generated at first start",
        ),
    ]
    jwks_url: Annotated[
        str, _row("URL of the shop's public keys (JWKS), instead of a shared secret.", "empty")
    ]
    jwt_audience: Annotated[
        str,
        _row(
            "Required `aud` claim of the shop's tokens.", "empty: any except the guests' audience"
        ),
    ]
    jwt_issuer: Annotated[str, _row("Required `iss` claim of the shop's tokens.", "empty: any")]
    toss_checkout_url: Annotated[
        str,
        _row(
            "Base URL of the PG's payment page, for `payment.checkoutUrl`.",
            "empty; the sandbox sets it",
        ),
    ]
    guest_rate: Annotated[
        Rate | None,
        _row(
            "Rate limit of new guests per address, such as `60/min`; `0` disables it.", "`60/min`"
        ),
    ]
    trusted_proxies: Annotated[
        tuple[str, ...],
        _row(
            "Addresses or networks whose forwarding headers are trusted, comma-separated.", "empty"
        ),
    ]
    retention_days: Annotated[
        int,
        _row(
            "Days after its retirement from which `reservation purge` takes a sale; at least 31.",
            "empty: every sale is kept",
        ),
    ]
    metrics_port: Annotated[
        int,
        _row("Port of `/metrics` for `--role worker`; 0 disables it.", "`0`"),
    ]
    redis_trust: Annotated[
        tuple[str, ...],
        _row(
            "Names of Redis checks to waive, comma-separated (docs/operations.md).",
            "empty",
        ),
    ]
    key_prefix: Annotated[str, _row("Prefix of every key in Redis.", "`rsv`")]
    keep_alive_seconds: Annotated[
        int,
        _row("Keep-alive timeout of client connections; must exceed the load balancer's.", "`75`"),
    ]
    rebuild: Annotated[
        str,
        _row(
            "`auto`: from level 2 on, a worker rebuilds a sale that lost data; else an operator.",
            "`auto` with Sentinel and Cluster; else `manual`",
        ),
    ]
    fast_path: Annotated[bool, _row("`off` routes every prepare through the framework.", "`on`")]
    webhook_allow_private: Annotated[bool, _row("`1`: webhooks to private addresses.", "`0`")]
    env: Annotated[str, _row(_ENVIRONMENTS, "`development`")]

    @property
    def production(self) -> bool:
        """Whether the strict rules of production apply: in staging as well."""
        return self.env in _STRICT

    @property
    def operator_url(self) -> str:
        """Where all endpoints are, those of operators included."""
        return self.internal_url or self.public_url

    @property
    def warnings(self) -> tuple[str, ...]:
        """Valid but unusual settings, in sentences for the log at start."""
        if not self.production or self.auth != "jwt":
            return ()
        return tuple(
            f"{variable_of(name)} is empty: every token of the shop's issuer is accepted as a "
            "buyer's, whatever its purpose"
            for name in ("jwt_audience", "jwt_issuer")
            if not getattr(self, name)
        )

    def __repr__(self) -> str:
        # The struct's own repr would put every secret into a log line or a traceback.
        return f"Settings(env={self.env!r}, data_dir={str(self.data_dir)!r}, ...)"

    def __rich_repr__(self) -> Any:
        yield "env", self.env
        yield "data_dir", str(self.data_dir)

    @classmethod
    def load(
        cls, environ: Mapping[str, str], dotenv_path: str | os.PathLike[str] | None = ".env"
    ) -> "Settings":
        """Read, check and complete the settings.

        Args:
            environ: wins over `.env`; an empty value counts as not set.
            dotenv_path: may be missing; None reads none.

        Raises:
            SettingsError: the first error.
        """
        given = _given(environ, dotenv_path)
        values = {name: read(name, given) for name, read in _READERS.items()}
        if values["env"] in _STRICT:
            refuse_missing(given, required_in_production(given), f"in {values['env']}")
        elif missing := [name for name in GENERATED_SECRETS if not values[name]]:
            try:
                generated = load_or_create(values["data_dir"])
            except SecretsError as error:
                raise SettingsError(str(error)) from error
            values.update({name: getattr(generated, name) for name in missing})
        settings = cls(**values)
        if settings.internal_port and settings.internal_port == settings.port:
            raise refusal("internal_port", "another port than RESERVATION_PORT")
        check_toss_keys(
            secret_key=settings.toss_secret_key,
            client_key=settings.toss_client_key,
            api_url=settings.toss_api_url,
            production=settings.production,
        )
        if settings.production:
            refuse_unsafe(values)
        return settings


class ClientSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a command that only calls a running service."""

    public_url: str
    #: Where the operators' endpoints are: the internal port if there is one.
    operator_url: str
    #: Empty if none is set or stored.
    admin_api_key: str

    def __repr__(self) -> str:
        return f"ClientSettings(public_url={self.public_url!r}, ...)"

    @classmethod
    def load(
        cls, environ: Mapping[str, str], dotenv_path: str | os.PathLike[str] | None = ".env"
    ) -> "ClientSettings":
        """Read the variables that the service reads; generate and require nothing else."""
        given = _given(environ, dotenv_path, ("admin_api_key", "public_url", "internal_url"))
        key = environment.text("admin_api_key", given)
        if not key:
            try:
                kept = load_secrets(environment.directory("data_dir", given))
            except SecretsError as error:
                raise SettingsError(str(error)) from error
            key = kept.admin_api_key if kept else ""
        public_url = _public_url("public_url", given)
        internal_url = _internal_url("internal_url", given)
        return cls(
            public_url=public_url, operator_url=internal_url or public_url, admin_api_key=key
        )


def require_given_secrets(
    environ: Mapping[str, str], dotenv_path: str | os.PathLike[str] | None = ".env"
) -> None:
    """Refuse generated secrets where several machines must share them.

    Raises:
        SettingsError: naming every secret that is not given.
    """
    given = _given(environ, dotenv_path)
    required = [name for name in required_in_production(given) if name in GENERATED_SECRETS]
    refuse_missing(given, required, "with --role: all machines must share it")


def _given(
    environ: Mapping[str, str],
    dotenv_path: str | os.PathLike[str] | None,
    read: Collection[str] | None = None,
) -> dict[str, str]:
    """The given settings, by field name; files are read for the settings of `read`, or all."""
    return given_settings(
        environ, dotenv_path, known=_READERS, read=_READERS if read is None else read
    )


def _public_url(name: str, given: Mapping[str, str]) -> str:
    host, port = _READERS["host"]("host", given), _READERS["port"]("port", given)
    return environment.web_address(name, given) or _address(host, port)


def _internal_host(name: str, given: Mapping[str, str]) -> str:
    return environment.host(name if name in given else "host", given)


def _internal_url(name: str, given: Mapping[str, str]) -> str:
    host = _internal_host("internal_host", given)
    port = _READERS["internal_port"]("internal_port", given)
    return environment.web_address(name, given) or (_address(host, port) if port else "")


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _drain_seconds(name: str, given: Mapping[str, str]) -> int:
    default = 5 if given.get("env") in _STRICT else 0
    return environment.whole_number(0, _DRAIN_SECONDS_MAX, lambda: default)(name, given)


def _ack_replicas(name: str, given: Mapping[str, str]) -> int:
    default = environment.default_ack_replicas(given.get("redis_url", ""))
    return environment.whole_number(0, _ACK_REPLICAS_MAX, lambda: default)(name, given)


def _rebuild(name: str, given: Mapping[str, str]) -> str:
    several = given.get("redis_url", "").startswith(("redis+sentinel://", "redis+cluster://"))
    words = ("auto", "manual") if several else ("manual", "auto")
    return environment.one_of(*words)(name, given)


#: The parser of each field; the order decides which of several errors is reported.
_READERS: Final[dict[str, environment.Reader]] = {
    "env": environment.one_of("development", "staging", "production"),
    "data_dir": environment.directory,
    "redis_url": environment.redis_url,
    "redis_ack_replicas": _ack_replicas,
    "database_url": environment.database_url,
    "host": environment.host,
    "port": environment.whole_number(0, 65_535, lambda: 8000),
    "internal_port": environment.whole_number(0, 65_535, lambda: 0),
    "internal_host": _internal_host,
    "internal_url": _internal_url,
    "workers": environment.whole_number(1, environment.WORKERS_MAX, environment.cores),
    "drain_seconds": _drain_seconds,
    "public_url": _public_url,
    "toss_api_url": environment.web_address,
    "toss_secret_key": environment.text_or(SANDBOX_SECRET_KEY),
    "toss_client_key": environment.text_or(SANDBOX_CLIENT_KEY),
    "admin_api_key": environment.text,
    "signing_keys": environment.texts,
    "order_id_key": environment.text,
    "storefront_url": environment.web_address,
    "cors_origins": environment.origins,
    "shop_name": environment.shown(100),
    "shop_url": environment.web_address,
    "shop_footer": environment.shown(2_000),
    "image_origins": environment.origins,
    "prepare_rate": environment.rate(Rate(20, 1)),
    "prepare_sustained": environment.rate(Rate(20, 60)),
    "unpaid_orders": environment.whole_number(0, _UNPAID_ORDERS_MAX, lambda: 20),
    "auth": environment.one_of("guest", "jwt"),
    "jwt_secret": environment.text,
    "jwks_url": environment.web_address,
    "jwt_audience": environment.text,
    "jwt_issuer": environment.text,
    "toss_checkout_url": environment.web_address,
    "guest_rate": environment.rate(Rate(60, 60)),
    "trusted_proxies": environment.networks,
    "retention_days": environment.whole_number(_RETENTION_DAYS_MIN, _RETENTION_DAYS_MAX, lambda: 0),
    "metrics_port": environment.whole_number(0, 65_535, lambda: 0),
    "redis_trust": environment.words,
    "key_prefix": environment.key_prefix,
    "keep_alive_seconds": environment.whole_number(1, 3_600, lambda: 75),
    "rebuild": _rebuild,
    "fast_path": environment.switch(default=True),
    "webhook_allow_private": environment.zero_or_one,
}
