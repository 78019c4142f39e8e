"""The blocking client is generated from the asyncio client, so that the two cannot differ."""

from scripts.sync_client import TARGET, generate


def test_the_blocking_client_is_the_one_that_make_client_writes() -> None:
    assert TARGET.read_text() == generate()
