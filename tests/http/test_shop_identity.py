"""The shop's name, footer and picture origins on the storefront."""

from collections.abc import Iterator

import pytest

from tests.support.service import Served, running_service

pytestmark = pytest.mark.system

PAGES = ("/", "/sales/any", "/result")
NAME = "Mug & <Sons>"
SETTINGS = {
    "RESERVATION_SHOP_NAME": NAME,
    "RESERVATION_SHOP_URL": "https://shop.example",
    "RESERVATION_SHOP_FOOTER": "대표 홍길동\\n사업자등록번호 <123>",
    "RESERVATION_IMAGE_ORIGINS": "https://img.example.com,https://cdn.example.com",
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running_service(tmp_path_factory.mktemp("shop"), settings=SETTINGS) as served:
        yield served


@pytest.mark.parametrize("path", PAGES)
def test_each_page_has_the_shop_s_name_and_footer(shop: Served, path: str) -> None:
    page = shop.http.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<span>Mug &amp; &lt;Sons&gt;</span>" in page.text
    assert '<a href="https://shop.example">Mug &amp; &lt;Sons&gt;</a>' in page.text
    assert "대표 홍길동<br>사업자등록번호 &lt;123&gt;" in page.text


@pytest.mark.parametrize("path", PAGES)
def test_pictures_load_from_the_own_origin_and_the_named_ones_alone(
    shop: Served, path: str
) -> None:
    policy = shop.http.get(path).headers["content-security-policy"]
    images = "img-src 'self' https://img.example.com https://cdn.example.com data:"
    assert images in policy.split("; ")


def test_the_console_has_no_name_of_the_shop(shop: Served) -> None:
    assert "Mug &amp;" not in shop.http.get("/ops").text


@pytest.mark.parametrize("path", PAGES)
def test_a_service_without_these_settings_has_no_footer(served: Served, path: str) -> None:
    page = served.http.get(path)
    assert "<footer" not in page.text
    assert "img-src 'self' data:" in page.headers["content-security-policy"].split("; ")
