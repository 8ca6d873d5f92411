"""A fake of the program `docker`, which runs the command of a container in the kit's own sandbox."""

import sys
from pathlib import Path

from tests import PROJECT

PROGRAM = f"""#!{sys.executable}
import csv, json, os, subprocess, sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(PROJECT)!r})
from kitlib.kernels.kaggle_environment import create_environment, link_kaggle_packages
from kitlib.kernels.sandbox import sandbox_command

arguments = sys.argv[1:]
with Path(__file__).with_name("calls.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
if arguments[:2] == ["image", "inspect"]:
    pulled = arguments[2] in Path(__file__).with_name("images").read_text().split()
    sys.exit("" if pulled else f"Error response from daemon: No such image: {{arguments[2]}}") if not pulled else sys.exit(0)
if arguments[0] == "rm":
    sys.exit(0)
assert arguments[0] == "run"
read_only, writable, variables, folder, at = {{}}, {{}}, {{}}, "/", 1
while arguments[at].startswith("-"):
    option, _, value = arguments[at].partition("=")
    if option in ("--mount", "--env"):
        at, value = at + 1, arguments[at + 1]
    if option == "--mount":
        (fields,) = csv.reader([value])
        mount = dict(field.partition("=")[::2] for field in fields)
        assert mount["type"] == "bind" and os.path.exists(mount["source"])
        (read_only if "readonly" in mount else writable)[mount["target"]] = mount["source"]
    elif option == "--env":
        name, equals, text = value.partition("=")
        variables[name] = text if equals else os.environ[name]
    elif option == "--workdir":
        folder = value
    at += 1
with tempfile.TemporaryDirectory() as name:
    for part in ("root", "tmp/home"):
        Path(name, part).mkdir(parents=True)
    create_environment(Path(name, "environment"), "/image")
    writable |= {{"/tmp": f"{{name}}/tmp", "/environment": f"{{name}}/environment"}}
    mounts = (f"{{name}}/root", read_only | {{"/image": link_kaggle_packages()}}, writable, [{str(PROJECT)!r}], folder)
    variables |= {{"PATH": "/environment/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp/home"}}
    sys.exit(subprocess.run(sandbox_command(arguments[at + 1 :], *mounts), env=variables).returncode)
"""


def install_docker(folder, images=()) -> Path:
    """Write the program `docker` into the new folder `folder`, with the pulled `images`; return its file of calls."""
    folder.mkdir()
    (folder / "docker").write_text(PROGRAM)
    (folder / "docker").chmod(0o755)
    (folder / "images").write_text(" ".join(images))
    return folder / "calls.jsonl"
