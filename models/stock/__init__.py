"""Gradient-boosted trees on daily bars of stocks: which will rise within days, under a precision constraint."""
