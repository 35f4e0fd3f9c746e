"""A coordinator of some devices joins as one device of the next level; `docs/hierarchy.md`.

SubCoordinator   what the level above asks, asked of the devices below and joined
make_group_app   the Flower ClientApp around it
"""

from fedtune_server.hierarchy.app import make_group_app
from fedtune_server.hierarchy.sub_coordinator import Group, SubCoordinator

__all__ = ["Group", "SubCoordinator", "make_group_app"]
