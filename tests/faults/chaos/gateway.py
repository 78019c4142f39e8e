"""Stand-in PG on a host of its own: `python -m tests.faults.chaos.gateway DIR HOST PORT URL`.

Its webhooks go to the URL, which is the service's as the PG reaches it.
"""

import sys
from pathlib import Path

import uvicorn

from reservation.sandbox import SandboxConfig, create_sandbox


def main() -> None:
    """Serve until SIGTERM. The journal in the folder survives a kill."""
    folder, host, port, url = sys.argv[1:]
    app = create_sandbox(
        SandboxConfig(journal_dir=Path(folder), webhook_urls=(f"{url}/v1/payments/toss/webhooks",))
    )
    uvicorn.run(app, host=host, port=int(port), log_config=None, access_log=False)


if __name__ == "__main__":
    main()
