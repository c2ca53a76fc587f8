"""The version of lcx."""

VERSION = "0.1.0"
