"""Run `lcx` as `python -m lcx.cli`."""

from lcx.cli.main import main

main()
