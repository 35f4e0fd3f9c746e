"""The long proof: hours of what CI does in minutes. Run `python -m scripts.soak --help`."""
