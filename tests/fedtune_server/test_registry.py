"""The registry: who is let in, over all orders of events, processes and restarts."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedtune.deploy.certificates import fingerprint, make_authority, make_node_key
from fedtune.deploy.tokens import new_token
from fedtune.errors import AccessError, DeploymentError
from fedtune_server.registry import EMPTY_REGISTRY, Registry

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime(2026, 11, 27, 12, tzinfo=datetime.UTC)
KEYS = [make_node_key().public for _ in range(4)]
AUTHORITY = make_authority("test").certificate


def lay_out(home: Path) -> Registry:
    (home / "pki").mkdir(parents=True)
    (home / "pki" / "ca.crt").write_bytes(AUTHORITY)
    (home / "sites.json").write_bytes(EMPTY_REGISTRY)
    return Registry(home / "sites.json")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return lay_out(tmp_path / "home")


def test_an_invited_site_joins_and_is_known_by_key_token_and_node(registry: Registry) -> None:
    code = registry.invite("north")
    assert code.authority == fingerprint(AUTHORITY)[:15]
    assert registry.site("north").state == "invited"
    enrolled = registry.enrol(code.secret, KEYS[0])
    registry.set_node("north", 2**64 - 1)
    by_key, by_token = registry.by_public_key(KEYS[0]), registry.by_token(enrolled.token)
    assert enrolled.name == "north"
    assert by_key is not None
    assert by_key == by_token == registry.site("north")
    assert (by_key.state, by_key.node_id) == ("enrolled", 2**64 - 1)
    assert registry.name_of_node(2**64 - 1) == "north"
    assert registry.by_public_key(KEYS[1]) is None
    assert registry.by_token(new_token()) is None
    assert registry.by_token("") is None
    assert registry.by_public_key("") is None


def test_a_lost_answer_may_be_asked_for_again_and_voids_the_first_token(registry: Registry) -> None:
    code = registry.invite("north")
    first = registry.enrol(code.secret, KEYS[0])
    registry.set_node("north", 7)
    second = registry.enrol(code.secret, KEYS[0])
    assert second.node_id == 7
    assert registry.by_token(first.token) is None
    assert registry.by_token(second.token) is not None
    with pytest.raises(AccessError, match=r"used already, with another key.*server revoke north"):
        registry.enrol(code.secret, KEYS[1])


def test_an_expired_and_a_replaced_code_let_nobody_in(registry: Registry) -> None:
    code = registry.invite("north", days=2, now=NOW)
    late = NOW + 2 * DAY + datetime.timedelta(seconds=1)
    with pytest.raises(AccessError, match=r"code of north expired at 2026-11-29 12:00 UTC"):
        registry.enrol(code.secret, KEYS[0], now=late)
    fresh = registry.invite("north", days=2, now=late)
    with pytest.raises(AccessError, match="this join code is unknown"):
        registry.enrol(code.secret, KEYS[0], now=late)
    assert registry.enrol(fresh.secret, KEYS[0], now=late).name == "north"
    # What was good once is not good for ever: the repetition ends with the code.
    with pytest.raises(AccessError, match="expired"):
        registry.enrol(fresh.secret, KEYS[0], now=late + 3 * DAY)


def test_a_revoked_site_has_no_right_left_and_its_key_tells_why(registry: Registry) -> None:
    code = registry.invite("north")
    token = registry.enrol(code.secret, KEYS[0]).token
    registry.set_node("north", 7)
    registry.revoke("north")
    registry.set_node("north", 7)
    site = registry.by_public_key(KEYS[0])
    assert site is not None
    assert site.state == "revoked"
    assert registry.by_token(token) is None
    assert registry.retired_nodes() == (7,)
    registry.forget_node(7)
    assert registry.retired_nodes() == ()
    with pytest.raises(AccessError, match="join code is unknown"):
        registry.enrol(code.secret, KEYS[0])
    with pytest.raises(AccessError, match="revoked already"):
        registry.revoke("north")
    with pytest.raises(AccessError, match=r"north is revoked already; .* invite north --again"):
        registry.invite("north")


def test_a_site_that_joins_anew_keeps_its_key_until_the_new_one_is_there(
    registry: Registry,
) -> None:
    registry.enrol(registry.invite("north").secret, KEYS[0])
    registry.set_node("north", 7)
    with pytest.raises(AccessError, match="enrolled already"):
        registry.invite("north")
    code = registry.invite("north", again=True)
    assert registry.site("north").state == "enrolled"
    with pytest.raises(AccessError, match="this key was enrolled before"):
        registry.enrol(code.secret, KEYS[0])
    anew = registry.enrol(code.secret, KEYS[1])
    assert (anew.name, anew.node_id) == ("north", None)
    assert registry.by_public_key(KEYS[0]) is None
    assert registry.retired_nodes() == (7,)


def test_wrong_names_and_days_are_refused(registry: Registry) -> None:
    registry.invite("north")
    for name in ("", "../x", "a/b", ".hidden", "con", "COM1.txt", "a" * 65, "a\n", "ä"):
        with pytest.raises(DeploymentError, match="expected a site's name"):
            registry.invite(name)
    with pytest.raises(DeploymentError, match="differs from 'north' by case alone"):
        registry.invite("North")
    for days in (0, -1, 91, float("nan")):
        with pytest.raises(DeploymentError, match="expected days in 0 to 90"):
            registry.invite("south", days)
    with pytest.raises(AccessError, match="'nroth' is unknown; did you mean north"):
        registry.revoke("nroth")
    with pytest.raises(AccessError, match="'nroth' is unknown; did you mean north"):
        registry.invite("nroth", again=True)


def test_two_sites_never_share_a_key(registry: Registry) -> None:
    registry.enrol(registry.invite("north").secret, KEYS[0])
    code = registry.invite("south")
    with pytest.raises(AccessError, match="enrolled before, for north"):
        registry.enrol(code.secret, KEYS[0])
    assert registry.site("south").state == "invited"


def test_a_key_of_another_kind_is_refused(registry: Registry) -> None:
    code = registry.invite("north")
    for key in (b"", b"junk", AUTHORITY):
        with pytest.raises(DeploymentError, match="expected the public key of a site"):
            registry.enrol(code.secret, key)


def test_what_another_process_changes_is_known_at_once(registry: Registry, tmp_path: Path) -> None:
    other = Registry(tmp_path / "home" / "sites.json")
    token = registry.enrol(other.invite("north").secret, KEYS[0]).token
    assert other.by_token(token) is not None
    registry.revoke("north")
    assert other.by_token(token) is None


def test_a_missing_or_damaged_registry_lets_nobody_in(registry: Registry, tmp_path: Path) -> None:
    token = registry.enrol(registry.invite("north").secret, KEYS[0]).token
    path = tmp_path / "home" / "sites.json"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DeploymentError, match=r"is damaged .* nobody is let in"):
        registry.by_token(token)
    path.unlink()
    with pytest.raises(DeploymentError, match=r"cannot be read .* nobody is let in"):
        registry.by_token(token)


def test_nothing_secret_lies_in_the_file(registry: Registry, tmp_path: Path) -> None:
    code = registry.invite("north")
    token = registry.enrol(code.secret, KEYS[0]).token
    path = tmp_path / "home" / "sites.json"
    assert token not in path.read_text()
    assert code.secret.hex() not in path.read_text()
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o777 == 0o600


INVITES = """
import sys
from pathlib import Path
from fedtune_server.registry import Registry
registry = Registry(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    registry.invite(f"site-{sys.argv[2]}-{i}")
"""


def test_processes_that_change_it_together_lose_nothing(registry: Registry, tmp_path: Path) -> None:
    path = str(tmp_path / "home" / "sites.json")
    commands = [[sys.executable, "-c", INVITES, path, str(i)] for i in range(2)]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for command in commands
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(registry.sites()) == 80


class Doors(RuleBasedStateMachine):
    """A model of who may enter, beside the registry, over any order of events."""

    @initialize(folder=st.uuids())
    def start(self, folder: object) -> None:
        self.home = FOLDER / str(folder)
        shutil.rmtree(self.home, ignore_errors=True)
        self.registry = lay_out(self.home)
        self.now = NOW
        self.codes: list[tuple[str, bytes, datetime.datetime]] = []
        self.good_code: dict[str, bytes] = {}
        self.used_by: dict[bytes, bytes] = {}
        self.tokens: dict[str, str] = {}
        self.all_tokens: set[str] = set()
        self.keys: dict[str, bytes] = {}
        self.revoked: set[str] = set()

    @rule(name=st.sampled_from("abc"), again=st.booleans(), days=st.sampled_from([1.0, 5.0]))
    def invite(self, name: str, again: bool, days: float) -> None:
        known = name in self.keys or name in self.revoked
        try:
            code = self.registry.invite(name, days, again=again, now=self.now)
        except AccessError:
            assert known != again or (again and name not in self.good_code)
            return
        if name in self.revoked:  # joins from nothing
            self.revoked.discard(name)
        self.good_code[name] = code.secret
        self.codes.append((name, code.secret, self.now + days * DAY))

    @rule(pick=st.integers(0, 20), key=st.sampled_from(KEYS), flip=st.booleans())
    def enrol(self, pick: int, key: bytes, flip: bool) -> None:
        if not self.codes:
            return
        name, secret, end = self.codes[pick % len(self.codes)]
        if flip:
            secret = bytes([secret[0] ^ 1, *secret[1:]])
        first = self.used_by.get(secret)
        allowed = (
            self.good_code.get(name) == secret
            and self.now <= end
            and (first == key or (first is None and key not in self.keys.values()))
        )
        try:
            enrolled = self.registry.enrol(secret, key, now=self.now)
        except AccessError:
            assert not allowed
            return
        assert allowed
        assert enrolled.name == name
        self.used_by[secret] = key
        self.keys[name] = key
        self.tokens[name] = enrolled.token
        self.all_tokens.add(enrolled.token)

    @rule(name=st.sampled_from("abc"))
    def revoke(self, name: str) -> None:
        try:
            self.registry.revoke(name)
        except AccessError:
            assert name in self.revoked or name not in self.good_code
            return
        self.revoked.add(name)
        self.tokens.pop(name, None)
        self.good_code[name] = b""

    @rule(days=st.sampled_from([1.5, 4.0]))
    def wait(self, days: float) -> None:
        self.now += days * DAY

    @rule()
    def restart(self) -> None:
        self.registry = Registry(self.home / "sites.json")

    @invariant()
    def only_good_tokens_and_keys_open(self) -> None:
        if not hasattr(self, "registry"):
            return
        good = {token: name for name, token in self.tokens.items()}
        for token in self.all_tokens:
            site = self.registry.by_token(token)
            assert (site.name if site else None) == good.get(token)
        for key in KEYS:
            site = self.registry.by_public_key(key)
            enrolled = site is not None and site.state == "enrolled"
            assert enrolled == (key in [self.keys[name] for name in self.tokens])

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "home", FOLDER / "none"), ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("doors")


FOLDER = Path()
Doors.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestNoOrderOfEventsOpensAWrongDoor = Doors.TestCase
