"""`python -m drctl.cli`: the same as the console script."""

from drctl.cli.app import main

if __name__ == "__main__":
    main()
