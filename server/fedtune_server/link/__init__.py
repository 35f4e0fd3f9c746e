"""Flower's link behind a guard: what sites and operators reach of it, and how often."""
