"""Distillers: one module a family."""
