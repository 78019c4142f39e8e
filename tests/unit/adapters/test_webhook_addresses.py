"""Addresses to which no webhook is sent, in every form that a URL or a name can hide them."""

import socket
from ipaddress import ip_address
from typing import Any

import pytest

from reservation.adapters.webhooks.addresses import (
    GuardedResolver,
    RefusedAddress,
    check_url,
    is_allowed,
)

#: Refused whatever the settings are.
NEVER = (
    "0.0.0.0",
    "0.1.2.3",
    "169.254.169.254",
    "169.254.0.1",
    "100.100.100.200",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::ffff:169.254.169.254",
    "::ffff:0:169.254.169.254",
    "::169.254.169.254",
    "64:ff9b::169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "2002:a9fe:a9fe::1",
    "2001::1",
    "2001:db8::1",
    "100::1",
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
    "fd00:ec2::254",
)
#: Refused unless private addresses are allowed.
PRIVATE = (
    "10.0.0.1",
    "10.255.255.255",
    "127.0.0.1",
    "127.1.2.3",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "100.64.0.1",
    "::1",
    "fc00::1",
    "fd12:3456:789a::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::10.0.0.1",
    "2002:7f00:1::",
    "2002:c0a8:1::1",
)
PUBLIC = (
    "1.1.1.1",
    "8.8.8.8",
    "172.32.0.1",
    "2606:4700:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
)
#: Hosts that some resolvers read as an address, and ipaddress does not.
OTHER_FORMS = (
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "0177.0.0.1",
    "017700000001",
    "127.1",
    "10.1",
    "0",
    "0x0",
    "169.254.43518",
    "127.0.0.1.",
    "2852039166",
)


@pytest.mark.parametrize("address", NEVER)
def test_an_address_that_is_never_allowed_is_refused(address: str) -> None:
    assert not is_allowed(ip_address(address), allow_private=False)
    assert not is_allowed(ip_address(address), allow_private=True)


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_needs_the_setting(address: str) -> None:
    assert not is_allowed(ip_address(address), allow_private=False)
    assert is_allowed(ip_address(address), allow_private=True)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_allowed(address: str) -> None:
    assert is_allowed(ip_address(address), allow_private=False)


@pytest.mark.parametrize("host", OTHER_FORMS)
@pytest.mark.parametrize("allow_private", [False, True])
def test_a_host_that_hides_an_address_is_refused(host: str, *, allow_private: bool) -> None:
    with pytest.raises(RefusedAddress):
        check_url(f"https://{host}/hook", allow_private=allow_private)


@pytest.mark.parametrize(
    "url",
    [
        *(f"https://{one}/" for one in NEVER + PRIVATE if ":" not in one),
        *(f"https://[{one}]/" for one in NEVER + PRIVATE if ":" in one),
        "http://shop.example/",
        "https:///hook",
        "https://user@shop.example/",
        "https://shop.example/#fragment",
        "https://shop.example\\@127.0.0.1/",
        "file:///etc/passwd",
        "gopher://shop.example/",
        "https://shop.example:99999/",
        "https://shop.example/\n",
        f"https://shop.example/{'a' * 2_000}",
    ],
)
def test_a_url_that_is_not_allowed_is_refused(url: str) -> None:
    with pytest.raises(RefusedAddress):
        check_url(url, allow_private=False)


@pytest.mark.parametrize("url", ["https://shop.example/hook?a=b", "https://8.8.8.8:8443/hook"])
def test_a_usual_url_is_accepted(url: str) -> None:
    assert str(check_url(url, allow_private=False)) == url


async def test_one_refused_address_of_a_name_refuses_the_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(*_: Any, **__: Any) -> list[Any]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))
            for address in ("8.8.8.8", "169.254.169.254")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    with pytest.raises(RefusedAddress):
        await GuardedResolver(allow_private=True).resolve("shop.example", 443)


async def test_the_connection_is_made_to_the_checked_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def answer(host: str, *_: Any, **__: Any) -> list[Any]:
        calls.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 443))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    found = await GuardedResolver(allow_private=False).resolve("shop.example", 443)
    assert [one["host"] for one in found] == ["8.8.8.8"]
    assert found[0]["flags"] & socket.AI_NUMERICHOST
    assert calls == ["shop.example"]
