"""Loops compiled for this machine's CPU. Importing the package compiles nothing; see `machine`."""
