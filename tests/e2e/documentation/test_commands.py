"""Commands of README, tutorial, how-tos and runbook do as documented."""

import re
from pathlib import Path

import pytest

from reservation.domain.levels import HIGHEST_LEVEL
from tests.support.databases import running_postgres
from tests.support.pages import ROOT, Place, blocks_of
from tests.support.sandbox import running_sandbox
from tests.support.service import free_port

pytestmark = [pytest.mark.e2e]

#: The pages of which every shell line is run here.
README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
RUNBOOK = ROOT / "docs" / "operations.md"
HOW_TOS = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PAGES = [README, TUTORIAL, RUNBOOK, *HOW_TOS]

#: The lines that are not run, by their beginning, and the reason. No other line is left out.
NOT_RUN = {
    "make test ": "it would run itself",
    "docker compose up -d": "needs Docker; test_compose.py starts what it would",
}


#: A crowd takes a while: it has its own test.
LONG = (".venv/bin/reservation demo ", "reservation demo ")


#: Starts the service after a restore, and ends it once it names the restore.
START_AND_STOP = """
.venv/bin/reservation serve >pending.log 2>&1 &
service=$!
until curl -s http://127.0.0.1:8000/health/ready | grep restore-pending; do
  kill -0 "$service"; sleep 0.2
done
stop_service
"""


def runnable(page: Path) -> str:
    """The page's lines without those that cannot run here."""
    lines = "".join(blocks_of(page)).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith((*NOT_RUN, *LONG)))


def test_the_list_of_lines_not_run_is_exact() -> None:
    lines = [line for page in PAGES for block in blocks_of(page) for line in block.splitlines()]
    used = {start for start in NOT_RUN for line in lines if f"{line} ".startswith(start)}
    assert used == set(NOT_RUN)
    assert len(lines) > 100


def test_each_page_of_docs_is_tested_or_exempt() -> None:
    with_lines = {page for page in ROOT.glob("docs/**/*.md") if blocks_of(page)}
    assert with_lines <= set(PAGES)


def test_the_readme_starts_the_service_and_buys_one_unit(place: Place) -> None:
    script = runnable(README)
    last = re.findall(r"^curl (?:.*\\\n)+.*\n", script, re.MULTILINE)[-1]
    printed = place.run(script + last)
    assert '"status": "HELD"' in printed
    assert printed.count('"status": "CONFIRMED"') == 2, "the last line again says so again"
    assert "consistent" in printed


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, TUTORIAL], ids=lambda page: page.stem)
def test_the_demo_of_the_page_ends_clean(place: Place, page: Path) -> None:
    [line] = [line for line in "".join(blocks_of(page)).splitlines() if line.startswith(LONG)]
    printed = place.run(f'make run\nexport PATH="$PWD/.venv/bin:$PATH"\n{line}')
    assert "clean" in printed


@pytest.mark.slow
def test_the_tutorial_leads_to_a_sale_with_own_keys(place: Place) -> None:
    printed = place.run(runnable(TUTORIAL))
    assert '"status": "HELD"' in printed
    assert '"status": "CONFIRMED"' in printed
    assert "consistent" in printed
    assert "REFUNDED" in printed


@pytest.mark.slow
def test_only_tokens_of_the_shop_are_accepted(place: Place) -> None:
    place.replaced["8900"] = str(free_port())
    printed = place.run(runnable(ROOT / "docs" / "how-to" / "shop-jwt.md"))
    assert '"status": "HELD"' in printed
    assert "404\n" in printed
    assert '"code": "unauthenticated"' in printed
    assert '"mine": 1' in printed


@pytest.mark.slow
def test_orders_go_to_postgresql(place: Place) -> None:
    with running_postgres() as server:
        place.finds(server.programs)
        for user in ("postgres", "reservation:change-me"):
            place.replaced[f"{user}@127.0.0.1:5432/"] = f"{user}@/"
        place.replaced["/postgres "] = f"/postgres?host={server.home} "
        place.replaced["/reservation\n"] = f"/reservation?host={server.home}\n"
        place.replaced["/reservation \\"] = f"/reservation?host={server.home} \\"
        printed = place.run(runnable(ROOT / "docs" / "how-to" / "postgresql.md"))
    assert re.search(r"\| HELD +\| +12000", printed)
    assert "consistent" in printed


@pytest.mark.slow
def test_the_stock_is_kept_in_an_external_redis(place: Place) -> None:
    place.replaced["6390"] = str(free_port())
    printed = place.run(runnable(ROOT / "docs" / "how-to" / "managed-redis.md"))
    assert '"status":"ok"' in printed
    assert "mug" in printed


@pytest.mark.slow
def test_a_backup_is_restored_compared_and_opened(place: Place, tmp_path: Path) -> None:
    script = runnable(ROOT / "docs" / "how-to" / "backup-and-restore.md")
    # The steps that the page describes in words: the service stops, and starts before the opening.
    script = script.replace("mkdir lost\n", "stop_service\nrm service.log\nmkdir lost\n")
    rebuild, opening = ".venv/bin/reservation rebuild\n", "--reason 'compared with the gateway'\n"
    script = script.replace(rebuild, rebuild + START_AND_STOP)
    script = script.replace(opening, f"{opening}make run\n")
    with running_sandbox(tmp_path) as sandbox:
        printed = place.run(script, RESERVATION_TOSS_API_URL=sandbox.url)
    assert "backups/monday.zip: 1 sales and 0 orders" in printed
    assert "The sales stay closed." in printed
    assert '"restore-pending"' in printed
    assert '"status":"ok"' in printed
    assert "consistent" in printed
    assert "The sales are open" in printed


@pytest.mark.slow
def test_going_live_is_ready_before_the_first_payment(place: Place) -> None:
    printed = place.run(runnable(ROOT / "docs" / "how-to" / "going-live.md"))
    assert '"status":"ok"' in printed
    assert printed.endswith("200\n")


@pytest.mark.slow
def test_the_upgrade_prints_the_migrations_and_raises_the_level(place: Place) -> None:
    printed = place.run(runnable(ROOT / "docs" / "how-to" / "upgrading.md"))
    assert "Pending migrations: " in printed
    assert f"the level is {HIGHEST_LEVEL}." in printed
