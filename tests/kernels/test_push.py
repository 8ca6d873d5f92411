import io
import json
import shutil
import zipfile

import pytest

from kitlib.errors import KernelError
from kitlib.kernels.build import build_kernel
from kitlib.kernels.push import push, push_dataset
from kitlib.kernels.pushed import read_pushed
from kitlib.kernels.spec import read_spec
from tests.small_kernels import make_submission, make_training, make_wheel

pytestmark = pytest.mark.usefixtures("no_settings")

KERNEL = "somebody/small-test-kernel"
WHEELS, WEIGHTS = f"{KERNEL}-wheels", f"{KERNEL}-weights"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    spec = read_spec(make_submission(folder / "spec", "print(1)"), owner="somebody")
    build_kernel(spec, folder / "out", [make_wheel(folder / "wheels", "kit_extra", "1.2")])
    return folder / "out"


def pushed(out):
    return push(out, wait_s=5, poll_s=0.01)


def test_datasets_are_created_then_the_kernel_is_pushed(kaggle, out):
    result = pushed(out)
    assert (result.version, result.url) == (3, f"https://www.kaggle.com/code/{KERNEL}")
    assert result.datasets == {WHEELS: "created", WEIGHTS: "created"}
    assert (result.kernel, result.bundles, result.competition) == (KERNEL, ("effnet-fold0",), "siim-covid19-detection")
    assert (result.fused_run, result.rules, result.status) == ("", "", "") and read_pushed(out) == result
    wheels, weights = kaggle.requests("CreateDataset")
    assert [wheels["title"], wheels["licenseName"], wheels["isPrivate"]] == ["Small test kernel wheels", "other", True]
    assert sorted(file["token"] for file in weights["files"]) == ["token of effnet-fold0.zip", "token of weights.json"]
    # The metadata file is not uploaded; all else arrives as it was built, a bundle's folder as a zip that Kaggle unpacks.
    assert kaggle.uploads["weights.json"] == (out / "weights" / "weights.json").read_bytes()
    with zipfile.ZipFile(io.BytesIO(kaggle.uploads["effnet-fold0.zip"])) as opened:
        bundle = opened.read("weights.safetensors")
    assert bundle == (out / "weights" / "effnet-fold0" / "weights.safetensors").read_bytes()
    (kernel,) = kaggle.requests("SaveKernel")
    assert kernel["slug"] == KERNEL
    assert [kernel["enableGpu"], kernel["enableInternet"], kernel["machineShape"]] == [True, False, "NvidiaTeslaT4"]
    assert kernel["datasetDataSources"] == [WEIGHTS, WHEELS]
    assert kernel["competitionDataSources"] == ["siim-covid19-detection"]
    assert json.loads(kernel["text"])["cells"][-1]["source"] == "print(1)"
    # Each dataset was polled until it was ready (once before, twice while unpacking, once ready); then the kernel was sent.
    names = [name for name, _ in kaggle.asked]
    assert names[-1] == "SaveKernel"
    assert names[names.index("CreateDataset") :].count("GetDatasetStatus") >= 3


def test_a_dataset_that_is_there_gets_a_version_and_the_kernel_waits_for_it(kaggle, out):
    kaggle.datasets = {WHEELS: 4, WEIGHTS: 7}
    kaggle.files[WHEELS] = {"kit_extra-1.1-py3-none-any.whl": 100}
    shown = iter([7, 7, 7, 8])  # the older version is ready from the start
    kaggle.answers["GetDataset"] = lambda body: (
        200,
        {"currentVersionNumber": next(shown) if body["datasetSlug"].endswith("weights") else kaggle.datasets[WHEELS]},
    )
    assert pushed(out).datasets == {WHEELS: "new version", WEIGHTS: "new version"}
    assert next(shown, None) is None
    assert not kaggle.requests("CreateDataset")
    assert [body["body"]["versionNotes"] for body in kaggle.requests("CreateDatasetVersion")] == ["built by the kit"] * 2


def test_a_dataset_of_which_kaggle_says_forbidden_is_created(kaggle, out):
    """Kaggle answers so for missing datasets, too."""
    answers = iter([(403, {"code": 403, "message": "Forbidden"})])
    kaggle.answers["GetDatasetStatus"] = lambda body: next(answers, None) or kaggle._GetDatasetStatus(body)
    assert pushed(out).datasets == {WHEELS: "created", WEIGHTS: "created"}


def test_wheels_that_are_there_are_left_alone(kaggle, out):
    kaggle.datasets = {WHEELS: 4}
    wheel = next((out / "wheels").glob("*.whl"))
    kaggle.files[WHEELS] = {wheel.name: wheel.stat().st_size}
    assert pushed(out).datasets == {WHEELS: "unchanged", WEIGHTS: "created"}
    assert wheel.name not in kaggle.uploads


def test_a_publication_is_a_private_dataset_of_the_tokens_owner(kaggle, out, tmp_path):
    shutil.copytree(out / "weights", tmp_path / "publication")
    assert push_dataset(WEIGHTS, tmp_path / "publication", wait_s=5, poll_s=0.01) == "created"
    (created,) = kaggle.requests("CreateDataset")
    assert created["isPrivate"] is True and not kaggle.requests("SaveKernel")
    assert push_dataset(WEIGHTS, tmp_path / "publication", wait_s=5, poll_s=0.01) == "new version"
    with pytest.raises(KernelError, match="the dataset is 'else/x', but the token belongs to 'somebody'"):
        push_dataset("else/x", tmp_path / "publication")


def test_a_kernel_without_weights_pushes_its_wheels_alone(kaggle, tmp_path):
    spec = read_spec(make_training(tmp_path / "spec", kernel_sources=["earlier-kernel"], internet=True))
    build_kernel(spec, tmp_path / "out", [make_wheel(tmp_path / "wheels", "kit_extra", "1.2")])
    result = pushed(tmp_path / "out")
    assert (result.datasets, result.bundles, result.competition) == ({WHEELS: "created"}, (), "")
    (kernel,) = kaggle.requests("SaveKernel")
    assert kernel["kernelDataSources"] == ["somebody/earlier-kernel"]
    assert kernel["enableInternet"] is True


@pytest.mark.parametrize(
    ("field", "source", "message"),
    [
        ("invalidDatasetSources", WHEELS, "datasets that do not exist or that the kernel may not use: "),
        ("invalidCompetitionSources", "siim-covid19-detection", "competitions .* whose rules you have not accepted: "),
        ("invalidKernelSources", "somebody/earlier-kernel", "kernels that do not exist or that have never run: "),
        ("invalidModelSources", "somebody/model", "models that do not exist or that the kernel may not use: "),
        ("invalidTags", "pneumonia", "tags that do not exist: "),
    ],
)
def test_a_source_that_kaggle_rejects_is_an_error(kaggle, out, field, source, message):
    url = f"https://www.kaggle.com/code/{KERNEL}"
    kaggle.answers["SaveKernel"] = (200, {"url": url, "versionNumber": 3, field: [source]})
    with pytest.raises(KernelError, match=f"(?s)started the kernel {KERNEL} .version 3., but .*{message}{source}"):
        pushed(out)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"error": "Notebook is too large"}, f"{KERNEL} was not pushed: Kaggle answered Notebook is too large"),
        ({"url": f"https://www.kaggle.com/code/{KERNEL}"}, "no version number"),
        ({"url": "https://www.kaggle.com/code/somebody/kernel2", "versionNumber": 1}, "URL is .*somebody/kernel2"),
    ],
)
def test_an_unexpected_answer_for_a_kernel_is_an_error(kaggle, out, answer, message):
    kaggle.answers["SaveKernel"] = (200, answer)
    with pytest.raises(KernelError, match=f"(?s){message}"):
        pushed(out)


@pytest.mark.parametrize(
    ("before", "after", "printed"),
    [
        ("Small test kernel", "Kernel of another name", "title does not resolve to the specified id"),
        ("NvidiaTeslaT4", "NvidiaTeslaP100", "'NvidiaTeslaP100' is retired"),  # printed on standard error
    ],
)
def test_what_the_client_only_prints_before_it_pushes_is_an_error(kaggle, out, tmp_path, before, after, printed):
    out = shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("pushed*.json"))
    metadata = out / "kernel" / "kernel-metadata.json"
    metadata.write_text(metadata.read_text().replace(before, after))
    with pytest.raises(KernelError, match=f"(?s)but reported problems.*{printed}"):
        pushed(out)
    assert not (out / "pushed.json").exists()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"status": "Error", "error": "Title is in use"}, "dataset .*-wheels: Kaggle answered Title is in use"),
        ({"status": "Ok", "invalidTags": ["lungs"]}, r"Kaggle answered invalid tags \['lungs'\]"),
        ({}, "Kaggle answered nothing"),
    ],
)
def test_a_dataset_that_kaggle_does_not_take_is_an_error_and_no_kernel_is_pushed(kaggle, out, answer, message):
    kaggle.answers["CreateDataset"] = (200, answer)
    with pytest.raises(KernelError, match=message):
        pushed(out)
    assert not kaggle.requests("SaveKernel")


@pytest.mark.parametrize("status", [400, 503])
def test_a_file_that_cannot_be_uploaded_is_an_error_and_nothing_is_published(kaggle, out, status):
    kaggle.upload_status = status
    with pytest.raises(KernelError, match=r"pushing the dataset .*-wheels: .*Upload unsuccessful: kit_extra-1\.2"):
        pushed(out)
    assert not kaggle.requests("CreateDataset")
    assert not kaggle.requests("SaveKernel")


@pytest.mark.parametrize(
    ("status", "advice"), [("FAILED", "its status is 'failed'"), ("BLOBS_RECEIVED", r"not ready after 0\.1 s")]
)
def test_a_dataset_that_is_never_ready_is_an_error(kaggle, out, status, advice):
    kaggle.datasets = {WHEELS: 1}
    kaggle.answers["GetDatasetStatus"] = (200, {"status": status})
    with pytest.raises(KernelError, match=f"{WHEELS} was uploaded, but .*{advice}"):
        push(out, wait_s=0.1, poll_s=0.01)


@pytest.mark.parametrize(
    ("request_name", "status", "message"),
    [
        ("GetDatasetStatus", 401, "Unauthorized; the token is invalid or has expired"),
        ("StartBlobUpload", 403, "Permission denied; access is denied"),
        ("CreateDataset", 403, "Permission denied; access is denied"),
        ("SaveKernel", 403, "Permission denied; access is denied"),
        ("SaveKernel", 404, "Not found; it does not exist"),
        ("SaveKernel", 500, "Oh no$"),
    ],
)
def test_an_http_error_is_reported_with_kaggles_message(kaggle, out, request_name, status, message):
    kaggle.answers[request_name] = (status, {"code": status, "message": message.split(";")[0].rstrip("$")})
    with pytest.raises(KernelError, match=f"Kaggle answered {message}"):
        pushed(out)


def test_a_server_error_without_a_message_is_an_error(kaggle, out):
    kaggle.answers["GetDatasetStatus"] = (502, {})
    with pytest.raises(KernelError, match=r"asking for the dataset .*-wheels: Kaggle answered 502 Server Error"):
        pushed(out)
    assert not kaggle.uploads


def test_a_kernel_of_another_owner_is_refused_before_anything_is_sent(kaggle, out):
    kaggle.user = "Other"
    with pytest.raises(
        KernelError, match=f"the kernel is '{KERNEL}', but the token belongs to 'Other'; build with --owner other"
    ):
        pushed(out)
    assert {name for name, _ in kaggle.asked} == {"IntrospectToken"}


def test_a_token_that_kaggle_does_not_know_is_an_error(kaggle, out, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "old")
    with pytest.raises(
        KernelError, match=r"no valid Kaggle token was found\. Create one at https://www\.kaggle\.com/settings"
    ):
        pushed(out)


def test_an_older_key_serves_too(kaggle, out, monkeypatch, tmp_path):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    (tmp_path / "home" / ".kaggle").mkdir()
    (tmp_path / "home" / ".kaggle" / "kaggle.json").write_text('{"username": "somebody", "key": "abc"}')
    assert pushed(out).version == 3


def test_no_network_is_an_error(kaggle, out):
    kaggle.close()
    with pytest.raises(KernelError, match="signing in: Kaggle cannot be reached"):
        pushed(out)


def test_without_a_token_the_error_tells_how_to_get_one(out):
    with pytest.raises(KernelError, match=r"signing in: no valid Kaggle token.*access_token.*KAGGLE_USERNAME"):
        pushed(out)


def test_pushing_without_a_build_is_an_error(tmp_path):
    with pytest.raises(KernelError, match=r"kernel-metadata\.json does not exist; build the kernel first"):
        push(tmp_path)
