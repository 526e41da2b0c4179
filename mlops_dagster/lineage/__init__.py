"""Where things come from and what they touch: the request index, traces, affected work, quarantine, checkouts."""
