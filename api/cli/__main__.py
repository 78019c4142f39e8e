"""`python -m api.cli`."""

from api.cli.app import main

if __name__ == "__main__":
    main()
