"""Feeds the frame parser and a whole link with bytes that no broker sends; see `__main__`."""
