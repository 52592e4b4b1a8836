"""Attacks behind one interface; `guardbench.attacks.build` makes them by name, without torch."""
