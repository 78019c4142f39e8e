"""Draw of test files: each is drawn at some time, and one seed draws the same ones again."""

from tests.support.draw import drawn

FILES = {f"tests/test_{number}.py" for number in range(30)}


def test_a_seed_draws_its_share_of_the_files() -> None:
    assert len(drawn(FILES, 3, "a")) == 10
    assert drawn(FILES, 3, "a") == drawn(set(FILES), 3, "a")
    assert drawn({"only.py"}, 3, "a") == {"only.py"}


def test_each_file_is_drawn_by_some_seed() -> None:
    assert set().union(*(drawn(FILES, 3, str(seed)) for seed in range(30))) == FILES
