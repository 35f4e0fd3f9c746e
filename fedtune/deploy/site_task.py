"""What a site is told of a run beside its messages: how rows become samples, and how to compute.

It travels in Flower's run configuration, under two keys, so that every message comes with it and a
device that was started anew knows it, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, ValidationError

from fedtune.errors import ProtocolError, one_line
from fedtune.records import ComputeName, GraphUse, TaskName
from fedtune.sections.section import Section
from fedtune.settings import DataSection, RunConfig

RUN_KEY = "fedtune-run"
"""Key of a Flower run's configuration that holds the run's name."""
TASK_KEY = "fedtune-task"
"""Key that holds a `SiteTask` as JSON."""

_MOST_BYTES = 65_536


class SiteTask(Section):
    """A run as its sites see it.

    Attributes:
        name: of the run, as operators call it.
        data: how a row becomes tokens; its files are the site's own, and are not named here.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(ge=0, lt=2**32)
    task: TaskName
    data: DataSection
    compute: ComputeName
    cuda_graph: GraphUse
    tune_allocator: bool


def site_task(config: RunConfig) -> SiteTask:
    """What the sites of a run are told."""
    nothing_of_ours: dict[str, object] = {"train": "", "sites": {}, "test": ""}
    return SiteTask(
        name=config.run.name,
        seed=config.run.seed,
        task=config.model.task,
        data=config.data.model_copy(update=nothing_of_ours),
        compute=config.train.compute,
        cuda_graph=config.train.cuda_graph,
        tune_allocator=config.train.tune_allocator,
    )


def flower_config(config: RunConfig) -> dict[str, str]:
    """The run configuration that Flower carries."""
    return {RUN_KEY: config.run.name, TASK_KEY: site_task(config).model_dump_json()}


def read_site_task(run_config: Mapping[str, object]) -> SiteTask:
    """The task of a Flower run.

    Raises:
        ProtocolError: the run is not one of fedtune's, or its task is malformed.
    """
    text = run_config.get(TASK_KEY)
    if not isinstance(text, str):
        raise ProtocolError(
            f"expected a run of fedtune, with {TASK_KEY} in its configuration; found none: "
            "nothing is done for it"
        )
    if len(text.encode("utf-8")) > _MOST_BYTES:
        raise ProtocolError(f"{TASK_KEY}: expected at most {_MOST_BYTES} bytes, found more")
    try:
        return SiteTask.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(one_line(f"{TASK_KEY}: {key}: {first['msg']}", 300)) from None
