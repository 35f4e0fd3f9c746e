"""`python -m fedtune`, for where the `fedtune` command is not on the path."""

from __future__ import annotations

from fedtune.cli.main import main

raise SystemExit(main())
