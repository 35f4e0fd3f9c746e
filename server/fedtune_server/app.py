"""The Flower ServerApp: a coordinator that is handed Flower's grid."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


def make_server_app(job: Callable[[Grid], None]) -> ServerApp:
    """Build the app that runs beside Flower's link, or in a simulation.

    Args:
        job: the coordinator's whole work on a grid; its exceptions end the run.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        job(grid)

    return app
