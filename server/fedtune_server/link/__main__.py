"""`python -m fedtune_server.link HOME`: Flower's link of a coordinator, behind its guard."""

from __future__ import annotations

import sys

from fedtune_server.link.serving import main

if __name__ == "__main__":
    main(sys.argv[1:])
