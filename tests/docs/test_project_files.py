"""The files around the sources agree with them: release, licences, hosted checks, forms and containers."""

import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from moeport.cli.main import whole_command
from moeport.version import VERSION
from tests.docs.blocks import blocks, commands
from tests.docs.lines import moeport_faults

REPOSITORY = Path(__file__).parents[2]
WORKFLOWS = sorted(REPOSITORY.glob(".github/workflows/*.yml"))
FORMS = sorted(REPOSITORY.glob(".github/ISSUE_TEMPLATE/[0-9]*.yml"))
TAGGED = ("docs/containers.md", "examples/jobs/kubernetes.yaml")
"""Where images of the release are named."""
MAKE = shutil.which("make")
CONTAINERS = sorted(REPOSITORY.glob("containers/*/Containerfile"))


def text(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


def project():
    return tomllib.loads(text("pyproject.toml"))["project"]


def jobs():
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            yield pytest.param(job, id=f"{path.stem}-{name}")


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_a_release_is_cited_and_has_its_section():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["license"] == project()["license"]
    images = {tag for name in TAGGED for tag in re.findall(r"\bmoeport:(\d[\w.]*)-", text(name))}
    assert len(images) == 1
    if re.fullmatch(r"\d+\.\d+\.\d+", VERSION):
        assert {citation["version"]} == images == {VERSION}
        assert f"\n## [{VERSION}]" in text("CHANGELOG.md")


def test_the_readme_leads_to_every_page_beside_it_and_to_the_containers():
    beside = {path.name for path in REPOSITORY.glob("*.md")} - {"README.md"}
    links = re.findall(r"\]\(([^)#]+)\)", text("README.md"))
    assert sorted({*beside, "LICENSE", "CITATION.cff", "docs/containers.md"} - {*links}) == []


def test_the_readme_names_every_extra_that_is_for_users():
    (table,) = re.findall(r"^\| Extra \|.*\n((?:\|.*\n)+)", text("README.md"), re.MULTILINE)
    names = {name for row in table.splitlines() for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert names == project()["optional-dependencies"].keys() - {"dev", "docs", "notebook", "release"}


def test_the_licence_of_every_package_that_is_asked_for_is_listed():
    asked = {}
    for extra, requirements in {"moeport": project()["dependencies"], **project()["optional-dependencies"]}.items():
        for requirement in requirements:
            asked.setdefault(normal(re.match(r"[\w.-]+", requirement)[0]), set()).add(extra)
    del asked["moeport"]
    rows = re.findall(r"^\| ([\w.-]+) \| (.+?) \| (.+) \| (https?://\S+) \|$", text("THIRD_PARTY.md"), re.MULTILINE)
    listed = {name: sorted(extras.split(", ")) for name, extras, _, _ in rows}
    assert listed == {name: sorted(extras) for name, extras in asked.items()}, "run `make notices`"
    assert [name for name, _, licence, _ in rows if licence in ("UNKNOWN", "")] == []


def page_of(changelog, tag="v1.2.3"):
    notes = runpy.run_path(str(REPOSITORY / "docs/generate/release_notes.py"))
    return notes["as_page"](notes["section"](changelog, tag), "https://forge.example/o/n/blob/v1.2.3")


def test_the_page_of_a_release_has_its_section_with_a_line_for_each_paragraph_and_links_that_lead_somewhere():
    changelog = """# Changelog

## [1.2.4]

## [1.2.3] - 2026-01-02

See [one](docs/a.md#b),
[two](https://b.example) and [three](#c).

### Added

- `x
  --run`, for
  ranks.
- Another.

## [1.2.2] - 2026-01-01
"""
    assert page_of(changelog) == (
        "See [one](https://forge.example/o/n/blob/v1.2.3/docs/a.md#b), [two](https://b.example) and [three](#c).\n\n"
        "### Added\n\n- `x --run`, for ranks.\n- Another.\n"
    )
    changelog = text("CHANGELOG.md")
    heading, version = re.search(r"^## \[(\d[\w.]*)\].*", changelog, re.MULTILINE).group(0, 1)
    page = page_of(changelog.replace(heading, f"## [{version}] - 2026-01-02"), version)
    assert [line for line in page.splitlines()[1:] if line and not line.startswith(("#", "- "))] == []


@pytest.mark.parametrize(
    ("changelog", "said"),
    [
        ("## [1.2.2] - 2026-01-01\n\n- A.\n", "no section 1.2.3; expected a heading"),
        ("## [1.2.3] - not released yet\n\n- A.\n", r"\[1.2.3\] - not released yet; expected a date"),
    ],
)
def test_a_tag_that_the_changelog_does_not_describe_is_refused_before_it_is_published(changelog, said):
    with pytest.raises(SystemExit, match=said):
        page_of(changelog)
    build, *_ = yaml.safe_load(text(".github/workflows/release.yml"))["jobs"].values()
    assert any("docs/generate/release_notes.py" in step.get("run", "") for step in build["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_reads_only_and_is_replaced_or_queued(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert "github.ref" in workflow["concurrency"]["group"]
    assert "secrets." not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("job", list(jobs()))
def test_a_job_ends_in_time_with_pinned_actions_and_targets_that_exist(job):
    assert job["timeout-minutes"] <= 120
    for step in job["steps"]:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step["uses"])
        for target in re.findall(r"^make (\S+)$", step.get("run", ""), re.MULTILINE):
            assert re.search(rf"^{re.escape(target)}:", text("Makefile"), re.MULTILINE), target


def test_only_publishing_may_ask_for_an_identity_and_only_the_page_may_write():
    permissions = {param.id: param.values[0].get("permissions") for param in jobs()}
    assert {name: found for name, found in permissions.items() if found} == {
        "release-publish": {"id-token": "write"},
        "release-page": {"contents": "write"},
    }


def test_every_part_of_the_suite_is_checked():
    commands = {step.get("run") for param in jobs() for step in param.values[0]["steps"]}
    assert {"make check", "make test-ranks", "make test-npu", "make docs", "make sbom"} <= commands


@pytest.fixture(scope="module")
def command_line():
    return whole_command()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_the_version_by_commands_that_exist(command_line, path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(names)) == len(names)
    assert "versions" in names or path.stem.endswith("feature")
    for command in re.findall(r"`moeport ([^`]+)`", path.read_text(encoding="utf-8")):
        found = command_line
        for word in shlex.split(command):
            if hasattr(found, "commands") and not word.startswith("-"):
                found = found.commands[word]
            elif word.startswith("-"):
                assert word in {option for each in found.params for option in each.opts}, command


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.parent.name)
def test_an_image_has_a_pinned_base_a_user_without_rights_and_an_honest_label(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    defaults = dict(line.removeprefix("ARG ").split("=", 1) for line in lines if line.startswith("ARG "))
    assert [line for line in lines if line.startswith("FROM ")] == ["FROM ${BASE}"]
    tag = re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], defaults["BASE"]).rpartition(":")[2]
    assert re.match(r"\d+\.\d+\.\d+-", tag)
    *_, user = (line.removeprefix("USER ") for line in lines if line.startswith("USER "))
    assert re.fullmatch(r"[1-9]\d*", user)
    heading = " ".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    row = next(line for line in text("docs/containers.md").splitlines() if f"containers/{path.parent.name}/" in line)
    assert "stand-in for the base image" in heading
    assert "**base image replaced" in row
    if path.parent.name != "cpu":
        assert "Not run on hardware" in heading
        assert "not run on hardware**" in row


def test_the_extras_that_an_image_installs_exist():
    for path in CONTAINERS:
        (extras,) = re.findall(r"moeport-\*\.whl\)\[([\w,]+)\]", path.read_text(encoding="utf-8"))
        assert set(extras.split(",")) <= project()["optional-dependencies"].keys()


def started():
    """What the page on containers starts: the options of docker, and the words behind `moeport`."""
    for block in blocks("docs/containers.md", text("docs/containers.md")):
        for command in commands(block) if block.language == "console" else []:
            if command.line.startswith("docker run "):
                words = shlex.split(command.line)
                (image,) = (number for number, word in enumerate(words) if word.startswith("moeport:"))
                yield pytest.param(words[:image], words[image:], id=words[image + 1])


@pytest.mark.parametrize(("options", "image_and_words"), list(started()))
def test_a_command_in_a_container_exists_and_what_it_writes_stays(options, image_and_words):
    _, *words = image_and_words
    assert list(moeport_faults(words)) == []
    assert words == ["doctor"] or "$PWD:/work" in options, "--rm deletes what is written in the container"


def test_what_the_page_on_containers_builds_has_the_arguments_that_are_given():
    lines = [
        command.line
        for block in blocks("docs/containers.md", text("docs/containers.md"))
        for command in (commands(block) if block.language == "console" else [])
        if command.line.startswith("make image")
    ]
    built = set()
    for line in lines:
        given = dict(word.split("=", 1) for word in shlex.split(line)[2:])
        assert given.keys() <= {"IMAGE", "IMAGE_OPTIONS"}
        built.add(given.get("IMAGE", "cpu"))
        file = text(f"containers/{given.get('IMAGE', 'cpu')}/Containerfile")
        names = re.findall(r"--build-arg (\w+)=", given.get("IMAGE_OPTIONS", ""))
        assert set(names) <= set(re.findall(r"^ARG (\w+)=", file, re.MULTILINE))
    assert built == {path.parent.name for path in CONTAINERS}


@pytest.mark.skipif(not MAKE, reason="make is not installed")
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (["IMAGE=gpu"], "IMAGE=gpu: there is no containers/gpu/Containerfile; expected cann cpu cuda"),
        (["IMAGE=cuda"], "needs docker, podman or buildah, and none of them is installed; install one"),
    ],
)
def test_an_image_that_cannot_be_built_is_refused_before_anything_is_made(tmp_path, variables, said):
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [MAKE, "--no-print-directory", "image", *variables]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
