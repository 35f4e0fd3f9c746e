"""A coordinator of some devices joins as one device of the next level; `docs/hierarchy.md`.

SubCoordinator   what the level above asks, asked of the devices below and joined
make_group_app   the Flower ClientApp around it, where one process is both levels
answer_above     the ServerApp's work of the level below, where each level has its own process
"""

from fedtune_server.hierarchy.app import make_group_app
from fedtune_server.hierarchy.below import answer_above
from fedtune_server.hierarchy.sub_coordinator import Group, SubCoordinator

__all__ = ["Group", "SubCoordinator", "answer_above", "make_group_app"]
