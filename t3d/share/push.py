"""`t3d push`: upload a student, or with --dataset a set of trajectories, to the hub, in one commit.

    t3d push experiments/SDAR-1.7B-Chat/math/mine/2026-05-01_10-00-00 owner/name --dry-run

A new repository is private unless --public. The folder must be complete, with the card of `t3d card`; otherwise
nothing is uploaded.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from t3d.common import paths
from t3d.common.errors import UserError, run_main
from t3d.common.hub import unreachable
from t3d.data.shards import shard_files
from t3d.models.loading import CARD, WEIGHT_FILES, WEIGHTS, WEIGHTS_INDEX
from t3d.share.student import CONFIG, RESULTS, TRAINING, trained_folder

# Errors of the HTTP client, whose package depends on the release; OSError; and RuntimeError for a file that broke off.
LOST = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, RuntimeError))
UNITS = ("B", "kB", "MB", "GB", "TB")


def student_files(folder: Path) -> list[Path]:
    """The files of a student's folder, below it. Raises UserError if the folder lacks one that a model needs."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    names = {path.relative_to(folder).as_posix() for path in found}
    weights = {WEIGHTS}
    if WEIGHTS_INDEX in names:
        weights = set(json.loads((folder / WEIGHTS_INDEX).read_text())["weight_map"].values())
    needed = {"config.json", "tokenizer_config.json", *weights}
    needed |= {f"{TRAINING}/{name}" for name in (CONFIG, RESULTS)}
    refuse_incomplete(folder, needed - names)
    return found


def trajectory_files(folder: Path) -> list[Path]:
    """The files of a set of trajectories."""
    refuse_incomplete(folder, set())
    others = (folder / name for name in (CARD, "settings.json"))
    return [*(path for path in others if path.is_file()), *shard_files(folder)]


def refuse_incomplete(folder: Path, lacking: set[str]) -> None:
    """Raises UserError if files are lacking, or if the card is none of ours."""
    if lacking - {f"{TRAINING}/{name}" for name in (CONFIG, RESULTS)}:
        raise UserError(f"{folder}: it lacks {', '.join(sorted(lacking))}; export the student again", "folder")
    card = folder / CARD
    if lacking or not card.is_file():
        raise UserError(f"{folder}: it has no card; write it with t3d card {folder}", CARD)
    try:
        tags = ModelCard.load(card).data.to_dict().get("tags") or []
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{card}: not readable as a card ({str(error).splitlines()[0]}); correct it", CARD) from error
    if "t3d" not in tags:
        raise UserError(
            f"{card}: the card of another model, such as the teacher's; run t3d card {folder} --force", CARD
        )


def check_name(repo: str) -> None:
    """Raises UserError for a name that the hub cannot have."""
    try:
        validate_repo_id(repo)
        reason = None if repo.count("/") == 1 else "it has no owner"
    except HFValidationError as error:
        reason = str(error).splitlines()[0].rstrip(".")
    if reason:
        raise UserError(f"{repo}: no name for the hub ({reason}); write owner/name", "repo")


def upload(folder: Path, files: Sequence[Path], repo: str, kind: str, public: bool) -> str:
    """Upload files in one commit; returns their address. Weights of an earlier upload that are no longer there go.

    Args:
        kind: "model" or "dataset". public: a private repository is never made public, and vice versa.

    Raises:
        UserError: no connection, no right to write, or a repository that is public without ``public``.
    """
    if cause := unreachable():
        raise UserError(f"{repo}: the hub cannot be reached ({cause}); check HF_HUB_OFFLINE and HF_ENDPOINT", "hub")
    api = HfApi()
    with hub_faults(repo):
        url = api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
        there = api.repo_info(repo, repo_type=kind)
        if not (public or there.private):
            raise UserError(f"{repo}: it exists and is public; add --public, or choose another name", "--public")
        names = {path.relative_to(folder).as_posix(): path for path in files}
        old = [file.rfilename for file in getattr(there, "siblings", None) or () if file.rfilename not in names]
        gone = [name for name in old if any(fnmatch(name, pattern) for pattern in (*WEIGHT_FILES, "shard-*.jsonl"))]
        api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, path) for name, path in names.items()),
                *map(CommitOperationDelete, gone),
            ],
            commit_message="Upload by t3d push",
            repo_type=kind,
        )
    return str(url)


@contextmanager
def hub_faults(repo: str) -> Iterator[None]:
    """Turn the hub's errors into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error)).strip().splitlines()[0].rstrip(".")
        if status == 401:
            state = "refuses the token" if get_token() else "needs a token"
            raise UserError(f"{repo}: the hub {state}; log in with hf auth login, or set HF_TOKEN", "token") from error
        if status == 403:
            remedy = "use a token with write access, and a name whose owner you are"
            raise UserError(f"{repo}: the hub does not allow it ({said}); {remedy}", "token") from error
        raise UserError(
            f"{repo}: the hub answers {status} ({said}); try again, or choose another name", "hub"
        ) from error
    except ValueError as error:  # metadata that the hub refuses
        raise UserError(f"{repo}: {' '.join(str(error).split())}; correct {CARD}", CARD) from error
    except LOST as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"{repo}: the upload broke off ({reason}); start the same command again", "hub") from error


def listing(folder: Path, files: Sequence[Path]) -> str:
    """One line per file with its size, and the sum."""
    sizes = [path.stat().st_size for path in files]
    lines = [f"{_size(n):>9}  {path.relative_to(folder)}" for path, n in zip(files, sizes, strict=True)]
    return "\n".join([*lines, f"{_size(sum(sizes)):>9}  in {len(files)} files"])


def _size(number: float) -> str:
    power = 0
    while number >= 1000 and power < len(UNITS) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.{min(power, 1)}f} {UNITS[power]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Upload a folder. ``argv``: None = the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog="t3d push",
        description="Upload a student with its card, configuration and results to the hub, or a set of trajectories.",
    )
    parser.add_argument("folder", help="a training run's folder, a student's, or with --dataset a rollout's shards")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the name on the hub")
    parser.add_argument("--dataset", action="store_true", help="the folder holds trajectories")
    parser.add_argument("--public", action="store_true", help="everybody may see it; else a new repository is private")
    parser.add_argument("--dry-run", action="store_true", help="list the files with their sizes; upload nothing")
    asked = parser.parse_args(argv)
    check_name(asked.repo)
    folder = paths.resolve(asked.folder)
    if bool(shard_files(folder)) != asked.dataset:
        remedy = "give a folder with shard-*.jsonl" if asked.dataset else "add --dataset to upload trajectories"
        raise UserError(f"{asked.folder}: {'no' if asked.dataset else 'a set of'} trajectories; {remedy}", "--dataset")
    folder = folder if asked.dataset else trained_folder(folder)
    files = trajectory_files(folder) if asked.dataset else student_files(folder)
    print(listing(folder, files))
    if not asked.dry_run:
        print(upload(folder, files, asked.repo, "dataset" if asked.dataset else "model", asked.public))


if __name__ == "__main__":
    run_main(main)
