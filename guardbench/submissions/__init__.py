"""Distilled sets that come from outside: the form, hostile files, the check, the score, the pack."""
