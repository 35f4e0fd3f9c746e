"""What a site's `policy.toml` may say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fedtune.deploy.policy_file import (
    PolicySettings,
    policy_example,
    policy_template,
    read_policy,
)
from fedtune.errors import PolicyError


def test_a_new_policy_changes_nothing_and_names_every_key(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(policy_template(), encoding="utf-8")
    assert read_policy(file) == PolicySettings()
    named = tomllib.loads(policy_example())
    assert set(named) == set(PolicySettings.model_fields)
    # What the text shows as defaults are the defaults.
    assert PolicySettings.model_validate(named) == PolicySettings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"hours = ['22-06']", "hours.0"),
        (b"hours = ['25:00-06:00']", "hours.0"),
        (b"weekdays = ['monday']", "weekdays.0"),
        (b"memory = 'much'", "memory"),
        (b"allowed_base_digests = ['abc']", "allowed_base_digests.0"),
        (b"minimum_battery_percent = 101", "minimum_battery_percent"),
        (b"allow_all = true", "allow_all"),
        (b"memory =", "is not valid TOML"),
        (b"\xff", "is not valid TOML"),
    ],
)
def test_a_policy_that_is_not_right_refuses_everything(
    tmp_path: Path, text: bytes, words: str
) -> None:
    file = tmp_path / "policy.toml"
    file.write_bytes(text)
    with pytest.raises(PolicyError, match=re.escape(words)) as caught:
        read_policy(file)
    assert "this site accepts nothing" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_that_is_not_there_or_too_large_refuses_everything(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        read_policy(tmp_path / "policy.toml")
    (tmp_path / "policy.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(PolicyError, match="larger than"):
        read_policy(tmp_path / "policy.toml")
