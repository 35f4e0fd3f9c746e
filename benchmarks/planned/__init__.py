"""Plans that are run for real beside what was predicted of them."""
