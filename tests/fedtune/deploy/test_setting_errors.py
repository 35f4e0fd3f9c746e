"""Wrong settings files of coordinators and sites."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.deploy.homes import SiteHome
from fedtune.deploy.policy_file import read_policy
from fedtune.errors import DeploymentError, PolicyError

SITE = '[site]\nname = "a"\nserver = "h:1"\nservice = "h:2"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[device]\nmemroy = 3\n", r"unknown key device.memroy; did you mean memory\?"),
        ("[devcie]\nmemory = 3\n", r"unknown key devcie; did you mean device\?"),
        ("[base]\nx = 3\n", "unknown key base.x; expected one of folders, download"),
        ("[device]\nthreads = -1\n", "device.threads: .*greater than or equal to 0; found -1"),
    ],
)
def test_a_wrong_key_of_a_site_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "client.toml").write_text(SITE + text)
    with pytest.raises(DeploymentError, match=words):
        SiteHome(tmp_path).settings()


def test_a_policy_with_an_unknown_key_accepts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('hour = ["20:00-06:00"]\n')
    with pytest.raises(PolicyError, match=r"unknown key hour; did you mean hours\?, so this site"):
        read_policy(path)
