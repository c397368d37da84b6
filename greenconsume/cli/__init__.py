"""Owns the command line: its commands, its options, its words and its exit codes.

It composes a runtime from what the user names, and must hold nothing that a program of one's own would miss.
Read `main` first.
"""
