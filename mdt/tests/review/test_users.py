"""Who may review: the file of the reviewers, and several of them at one server."""

import json
import os
import stat
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from gatewise_mdt.review import Review, Session
from gatewise_mdt.review.server import ReviewServer
from gatewise_mdt.review.session import By
from gatewise_mdt.review.users import OneUser, UserFile
from mdt_trees import TEXT, gout
from review_serving import Client, serving

from gatewise.errors import GatewiseError

NAMES = ("Ada", "Bea", "Carl", "Dora", "Eva", "Finn", "Gerd", "Hana")


@pytest.fixture
def users(tmp_path: Path) -> UserFile:
    return UserFile(tmp_path / "users.json")


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    (tmp_path / "trees.json").write_text(json.dumps([{"text": f"{TEXT} ({i})", "tree": gout()} for i in range(3)]))
    opened = Session.open(str(tmp_path / "trees.json"), reviewer="starter")
    yield opened
    opened.close()


# The file -------------------------------------------------------------------------------------------------------------


def test_a_token_says_who_asks_and_is_kept_nowhere(users: UserFile) -> None:
    tokens = {name: users.add(name) for name in ("Ada", "Bea", "王伟")}
    assert {name: users.who(token) for name, token in tokens.items()} == {name: name for name in tokens}
    assert all(len(token) == 32 for token in tokens.values())
    assert json.loads(users.path.read_text(encoding="utf-8")) == {
        name: sha256(token.encode()).hexdigest() for name, token in tokens.items()
    }
    for wrong in ("", "x", tokens["Ada"][:-1], users.read()["Ada"], "\ud800", tokens["Ada"] + " "):
        assert users.who(wrong) is None
    assert OneUser().who(tokens["Ada"]) is None
    one = OneUser()
    assert (one.who(one.token), one.who(one.token[1:])) == ("", None)


@pytest.mark.skipif(sys.platform == "win32", reason="modes are another thing there")
def test_the_file_is_its_owners_alone(users: UserFile) -> None:
    users.add("Ada")
    assert stat.S_IMODE(os.stat(users.path).st_mode) == 0o600
    users.path.chmod(0o644)
    users.add("Bea")
    assert stat.S_IMODE(os.stat(users.path).st_mode) == 0o600
    assert [path.name for path in users.path.parent.iterdir()] == ["users.json"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GatewiseError, match=r"users\.json"):
        UserFile(tmp_path / "file" / "users.json").add("Ada")


@pytest.mark.parametrize("name", ["Ada L", "ada l", " Ada  L", "ＡＤＡ L", "AdaL", "", "x" * 101, "a\nb", "a\x1b[2Jb", "\ud800"])
def test_a_name_that_is_taken_or_none_is_refused(users: UserFile, name: str) -> None:
    users.add("Ada L")
    before = users.path.read_bytes()
    with pytest.raises(GatewiseError, match=r"already|expected a name"):
        users.add(name)
    assert users.path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no list of reviewers"),
        ("[" * 100_000, "no list of reviewers"),
        ("[]", "no list of reviewers"),
        ('{"Ada": "secret"}', "no list of reviewers"),
        ('{"Ada": {"token": "x"}}', "no list of reviewers"),
    ],
)
def test_a_bad_file_is_one_sentence_and_lets_nobody_in(users: UserFile, content: str, said: str) -> None:
    users.path.write_text(content)
    for read in (users.read, lambda: users.who("x"), lambda: users.add("Zoe")):
        with pytest.raises(GatewiseError, match=said):
            read()
    assert users.path.read_text() == content


def test_no_file_lets_nobody_in(users: UserFile) -> None:
    with pytest.raises(GatewiseError, match="there is no such file"):
        users.who("x")


# The names ------------------------------------------------------------------------------------------------------------


def test_it_is_reached_under_allowed_names_by_http_and_https(session: Session, users: UserFile) -> None:
    token = users.add("Ada")
    with serving(Review(session), users, allowed=["review.clinic.example", "other.example:8443", "[fd00::1]"]) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/"
        for host in ("review.clinic.example", "REVIEW.clinic.example", "other.example:8443", "[fd00::1]:80", "localhost:1"):
            for scheme in ("http", "https"):
                assert Client(server.port, token, Host=host, Origin=f"{scheme}://{host}")("save")[0] == 200
        for host in ("clinic.example", "x.review.clinic.example", "review.clinic.example.", "review.clinic.example@evil.example"):
            assert Client(server.port, token, Host=host).get("session")[0] == 403
            assert Client(server.port, token, Host="review.clinic.example", Origin=f"https://{host}")("save")[0] == 403
        assert Client(server.port, token, Origin="null")("save")[0] == 403  # of a page in a sandbox


def test_other_machines_come_in_with_users_only(session: Session, users: UserFile) -> None:
    host = "0.0.0.0"
    with pytest.raises(GatewiseError, match=f"--host {host} lets other machines in: give --users FILE"):
        ReviewServer(Review(session), host=host)
    token = users.add("Ada")
    with serving(Review(session), users, host=host) as server:
        assert not server.is_local
        assert server.url == f"http://127.0.0.1:{server.port}/"
        assert Client(server.port, token).get("session")[0] == 200
        assert Client(server.port, token, Host=f"{host}:{server.port}").get("session")[0] == 403


# Several of them ------------------------------------------------------------------------------------------------------


def test_each_is_called_by_their_name(session: Session, users: UserFile) -> None:
    tokens = {name: users.add(name) for name in NAMES[:2]}
    with serving(Review(session), users) as server:
        ada, bea = (Client(server.port, token) for token in tokens.values())
        assert [one.get("session")[1]["you"] for one in (ada, bea)] == ["Ada", "Bea"]
        assert ada("approve", number=1, version=0, approved=True, comment="dose checked", reviewer="Bea")[0] == 200
        status, answer = bea("undo", number=1, version=0)
        assert (status, answer["since"][0]["reviewer"], answer["since"][0]["comment"]) == (409, "Ada", "dose checked")
        assert Client(server.port, "wrong").get("session")[0] == 401


def test_a_comment_is_kept_and_makes_no_page_an_older_one(session: Session, users: UserFile, tmp_path: Path) -> None:
    tokens = {name: users.add(name) for name in NAMES[:2]}
    with serving(Review(session), users) as server:
        ada, bea = (Client(server.port, token) for token in tokens.values())
        assert ada("comment", number=1, comment="is <b>this</b> the dose?", window="a")[0] == 200
        assert ada("comment", number=9, comment="x")[0] == 400
        status, answer = bea("approve", number=1, version=0, approved=True, comment="checked")  # of the version seen before it
        assert status == 200
        assert [(one["reviewer"], one["action"], one["comment"]) for one in answer["passage"]["history"]] == [
            ("starter", "come", ""),
            ("Ada", "comment", "is <b>this</b> the dose?"),
            ("Bea", "approve", "checked"),
        ]
        reviewed = answer["passage"]["reviewed"]
        assert (reviewed["by"], reviewed["comment"]) == ("Bea", "checked")
        lines = ada.get("session")[1]["passages"]
        assert [line["entries"] for line in lines] == [answer["passage"]["entries"], 1, 1] == [3, 1, 1]
        assert [line["reviewed"] for line in lines] == [reviewed, None, None]
        for i in range(120):
            session.comment(2, By("Ada", "", str(i)))
        shown = ada.get("passage?number=2")[1]
        assert (shown["entries"], len(shown["history"]), shown["history"][-1]["comment"], shown["version"]) == (121, 100, "119", 0)
    session.close()
    again = Session.open(str(tmp_path / "trees.json"), reviewer="starter")  # which replays the history
    assert [entry.comment for entry in again.history(again.passage(1))] == ["", "is <b>this</b> the dose?", "checked"]
    assert [passage.version for passage in again.passages] == [1, 0, 0]
    again.close()


def test_who_is_added_comes_in_at_once_and_who_is_taken_out_goes(
    session: Session, users: UserFile, capsys: pytest.CaptureFixture[str]
) -> None:
    ada = users.add("Ada")
    with serving(Review(session), users) as server:
        bea = users.add("Bea")
        assert [Client(server.port, token).get("session")[0] for token in (ada, bea)] == [200, 200]
        users.path.write_text(json.dumps({name: digest for name, digest in users.read().items() if name != "Ada"}))
        assert [Client(server.port, token).get("session")[0] for token in (ada, bea)] == [401, 200]
        users.path.write_text("{")  # nobody is let in by a file that cannot be read, and the terminal says why
        status, answer = Client(server.port, bea)("approve", number=1, version=0, approved=True)
        assert (status, str(users.path) in answer["error"]) == (503, False)
        assert f"nobody can be let in: {users.path} is no list of reviewers" in capsys.readouterr().err
        assert session.passage(1).version == 0
