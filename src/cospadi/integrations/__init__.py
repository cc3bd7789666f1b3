"""Bridges to other libraries, each importable by itself."""
