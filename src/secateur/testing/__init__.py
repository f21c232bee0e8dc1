"""Tiny models and inheritable contract tests, for us and for authors of plug-ins."""
