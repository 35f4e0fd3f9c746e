"""Where a run's distortion table comes from: a file, or a measurement of the base at hand.

The coordinator has no torch and never loads the base, so it does not measure. It reads the file
that `plan.distortion` names, or asks whoever started it: `fedtune simulate` has the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedtune.plan.mixing import candidate_forms
from fedtune.records import DeviceProfile, DistortionTable, Event, MatrixForm
from fedtune.settings import PlanSection
from fedtune.wire.distortion import distortion_json, read_distortion
from fedtune_server.fleet import Emit
from fedtune_server.run_folder import RunFolder

Measure = Callable[[Sequence[MatrixForm], Emit], DistortionTable]
"""Measures the base in some forms; tells of its progress by events."""


def find_distortion(
    settings: PlanSection,
    profiles: Sequence[DeviceProfile],
    measure: Measure | None,
    folder: RunFolder,
    emit: Emit,
) -> DistortionTable | None:
    """The table, which the run folder then holds, too; None where there is none to be had.

    Raises:
        ProtocolError: the file cannot be read, or is no table.
    """
    if settings.distortion:
        table, source = read_distortion(Path(settings.distortion)), settings.distortion
    elif measure is not None:
        formats = {name for profile in profiles for name in profile.formats}
        forms = candidate_forms(formats, settings.correction_rank)
        if not forms:
            return None
        table, source = measure(forms, emit), "measured"
    else:
        return None
    folder.write_json("distortion.json", distortion_json(table))
    fields = {"source": source, "forms": len(table.forms), "matrices": len(table.errors)}
    emit(Event("distortion_found", fields))
    return table
