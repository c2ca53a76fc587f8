"""`python -m lcx.cli` is `lcx`."""

from lcx.cli.main import main

main()
