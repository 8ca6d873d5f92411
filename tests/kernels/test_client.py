"""Signing in to Kaggle, and what becomes of the errors and printed lines of Kaggle's own client. No request is sent."""

import sys

import pytest
import requests

from kitlib.errors import KaggleUnreachable, KernelError
from kitlib.kernels import client as kaggle_client
from kitlib.kernels.client import KaggleClient, poll

pytestmark = pytest.mark.usefixtures("no_settings")


def sign_in(home, user) -> KaggleClient:
    """Sign in with an older key; unlike a token, it is not checked with a request."""
    (home / ".kaggle").mkdir()
    (home / ".kaggle" / "kaggle.json").write_text(f'{{"username": "{user}", "key": "abc"}}')
    return KaggleClient()


@pytest.fixture
def client(tmp_path) -> KaggleClient:
    return sign_in(tmp_path / "home", "Somebody")


def http_error(status: int | None) -> requests.HTTPError:
    response = None
    if status is not None:
        response = requests.Response()
        response.status_code = status
    return requests.HTTPError(f"status {status}", response=response)


def test_a_key_without_a_user_name_is_no_token(tmp_path):
    with pytest.raises(KernelError, match="no valid Kaggle token was found"):
        sign_in(tmp_path / "home", "")


def test_the_owner_must_be_the_user_in_lower_case(client):
    client.check_owner("dataset", "somebody/data-set")
    for name in ("else/somebody", "some/body", "Somebody/data-set"):
        with pytest.raises(KernelError, match=f"the dataset is {name!r}, but the token belongs to 'Somebody'"):
            client.check_owner("dataset", name)


def test_only_what_the_last_call_printed_is_quoted(client):
    with client.calling("first"):
        print("a long line of the first call")
        print("another line", file=sys.stderr)
    assert client.complaints() == ["a long line of the first call", "another line"]
    with client.calling("second"):
        print("  short  \n\n\nRequest failed: Connection aborted. Retrying in 2 seconds (attempt 1 of 3)")
        print("Warning: Looks like you're using an outdated version of `kaggle`", file=sys.stderr)
    assert client.complaints() == ["short"]
    assert client.quote_output().split("\n")[1:] == ["  Kaggle's client printed: short"]
    with pytest.raises(KernelError, match=r"third: .*(\n.*)*printed: in the third$") as raised, client.calling("third"):
        print("in the third")
        raise ValueError("no")
    assert "short" not in str(raised.value)
    with client.calling("fourth"):
        pass
    assert client.complaints() == [] and client.quote_output() == ""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (http_error(400), KernelError),
        (http_error(401), KernelError),
        (http_error(404), KernelError),
        (http_error(429), KaggleUnreachable),
        (http_error(499), KernelError),
        (http_error(500), KaggleUnreachable),
        (http_error(503), KaggleUnreachable),
        (http_error(None), KernelError),
        (requests.ConnectionError("no route"), KaggleUnreachable),
        (requests.Timeout("too slow"), KaggleUnreachable),
        (SystemExit(1), KernelError),
        (ValueError("odd"), KernelError),
        (KeyError("odd"), KernelError),
        (TypeError("odd"), KernelError),
        (FileNotFoundError("odd"), KernelError),
    ],
    ids=repr,
)
def test_an_error_is_the_kits_and_only_what_may_pass_can_be_repeated(client, error, kind):
    with pytest.raises(KernelError, match=r"^asking: ") as raised, client.calling("asking"):
        raise error
    assert type(raised.value) is kind and raised.value.__cause__ is error


def test_the_kits_own_errors_and_unexpected_ones_pass_through(client):
    for error in (KernelError("its own"), KaggleUnreachable("its own"), ZeroDivisionError("unexpected")):
        with pytest.raises(type(error)) as raised, client.calling("asking"):
            raise error
        assert raised.value is error


def test_polling_ends_with_the_first_answer_even_if_it_is_false():
    answers = iter([None, KaggleUnreachable("gone"), None, False, True])

    def ask():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert poll(ask, wait_s=5, poll_s=0) is False
    assert list(answers) == [True]


def test_polling_asks_at_least_once_and_ends_with_none():
    asked = []
    assert poll(lambda: asked.append("asked"), wait_s=-1, poll_s=0) is None
    assert asked == ["asked"]


@pytest.mark.parametrize(("failures", "answered"), [(["gone"] * 2, True), (["gone", None] * 4, True), (["gone"] * 4, False)])
def test_polling_gives_up_if_kaggle_stays_unreachable(monkeypatch, failures, answered):
    """Kaggle is asked two and a half times while it may be unreachable; the time is made up."""
    now, answers, step_s = [0.0], iter([*failures, "answer"]), kaggle_client.PATIENCE_S / 2.5
    monkeypatch.setattr(kaggle_client.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(kaggle_client.time, "sleep", lambda seconds: now.append(now.pop() + seconds))

    def ask():
        if (answer := next(answers)) == "gone":
            raise KaggleUnreachable("gone")
        return answer

    if answered:
        assert poll(ask, 100 * step_s, step_s) == "answer"
    else:
        with pytest.raises(KaggleUnreachable):
            poll(ask, 100 * step_s, step_s)
