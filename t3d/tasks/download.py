"""Question sets: fetched from the Hugging Face hub (Gen-Verse/<name>) or copied from a file, checked row by row."""

import argparse
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from t3d.common.errors import UserError, run_main
from t3d.common.hub import unreachable
from t3d.common.jsonfiles import atomic_write
from t3d.common.paths import data_file, resolve
from t3d.data.rows import read_rows
from t3d.tasks import find_task
from t3d.tasks.problems import checked

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """A set of the hub: its split, the kind of its questions, and the sha256 of the copy used in our tests. The hub may
    hold a newer copy.
    """

    split: str
    data_type: str
    sha256: str | None = None


SETS = {
    "PrimeIntellect": Known("train", "code"),
    "MATH_train": Known("train", "math", "539028c708d30c18805c92329f0b7d4cedb29f99b25cfe7742772f57c6e8a961"),
    "MATH500": Known("test", "math", "ca87d63fab75d106facbff0a4c3d5a79b1da0b5770dde12e2e54a8833898b29e"),
    "MBPP": Known("test", "code", "b8d801362c4ad36d8de07d0416bee952a5fee96bfb57b6177e4d5b0f447b5b43"),
    "HumanEval": Known("test", "code", "e29c164598c4438466770646984174b2f6c0eb651720a9eede6c62f91d93f3e0"),
    "GSM8K": Known("test", "math", "ec0f51078da93e5a4d3628dd6e701ce975a181b538b680648d02a2c60f328b3e"),
}
ATTEMPTS = 4
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled before each further one


@dataclass
class QuestionSet:
    """The result of `check_questions` for a file."""

    rows: int
    fields: list[str]
    sha256: str


def check_questions(path: str | Path, data_type: str) -> QuestionSet:
    """Check that every row of a file has the fields of its kind. `UserError` names the first row that lacks one."""
    path, task, count = Path(path), find_task(data_type), 0
    names: dict[str, None] = {}
    for row in read_rows(path):
        names |= dict.fromkeys(checked(row, task, f"{path}: row {count}"))
        count += 1
    if not count:
        raise UserError(f"{path} has no rows", str(path))
    return QuestionSet(count, list(names), _digest(path, "sha256"))


def fetch_questions(
    dataset: str, output: str | Path, source: str | Path | None = None, sha256: str | None = None
) -> QuestionSet:
    """Bring a question set to `output`, from a local file of the same layout or from the hub (Gen-Verse/<dataset>).

    The rows are checked before the file gets its name. `UserError`: the hub cannot be reached, a row is wrong, or the
    file's checksum is not `sha256`.
    """
    source = source or download(dataset)
    found = check_questions(source, SETS[dataset].data_type)
    if sha256 and found.sha256 != sha256.lower():
        raise UserError(
            f"{source}: sha256 is {found.sha256}, not {sha256}; get another copy, or leave out --sha256", "--sha256"
        )
    with atomic_write(output) as file, open(source, encoding="utf-8", newline="") as original:
        shutil.copyfileobj(original, file)
    return found


def download(dataset: str) -> Path:
    """The hub's file of a set, in the hub's own cache, with the hub's progress bar.

    After a fault that may pass (an overloaded hub, a lost connection, a damaged copy) the download starts again. The
    wait doubles each time. Without a connection the cached copy is used, or the download ends at once.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    repo, name = f"Gen-Verse/{dataset}", f"{SETS[dataset].split}/{dataset}.json"
    if offline := unreachable():
        cached = try_to_load_from_cache(repo, name, repo_type="dataset")
        if isinstance(cached, str) and is_intact(Path(cached)):
            return Path(cached)
        raise _not_downloaded(repo, name, f"the hub cannot be reached ({offline})")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            path = Path(hf_hub_download(repo_id=repo, repo_type="dataset", filename=name))
            if is_intact(path):
                return path
            cause, final = "the file arrived damaged", False
            path.resolve().unlink()
        except (OSError, EntryNotFoundError) as error:  # the hub's network errors are OSErrors
            lost = isinstance(error, LocalEntryNotFoundError)
            cause = "the connection was lost" if lost else str(error).strip().split("\n")[0]
            final = isinstance(error, EntryNotFoundError | RepositoryNotFoundError) and not lost
        if final or attempt == ATTEMPTS:
            break
        wait = FIRST_WAIT * 2 ** (attempt - 1)
        log.warning("%s of %s: %s; attempt %d of %d in %g s", name, repo, cause, attempt + 1, ATTEMPTS, wait)
        time.sleep(wait)
    raise _not_downloaded(repo, name, cause)


def _not_downloaded(repo: str, name: str, cause: str) -> UserError:
    return UserError(
        f"cannot download {name} of {repo}: {cause}; check the connection (HF_HUB_OFFLINE, HF_ENDPOINT), "
        "or bring the file here and pass it with --from FILE",
        name,
    )


def is_intact(path: Path) -> bool:
    """Whether a file of the hub's cache has the content that the hub announced.

    The cache names content by the hub's checksum: the sha256 of large files, git's sha1 of small ones. A file with
    another name counts as intact.
    """
    name = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", name):
        return _digest(path, "sha256") == name
    if re.fullmatch("[0-9a-f]{40}", name):
        return _digest(path, "sha1", f"blob {path.stat().st_size}\0".encode()) == name
    return True


def _digest(path: Path, algorithm: str, prefix: bytes = b"") -> str:
    digest = hashlib.new(algorithm, prefix)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Bring the set that ``argv`` (None: the process's own arguments) names."""
    parser = argparse.ArgumentParser(
        description="Bring a question set to data/<name>.json, from the hub (Gen-Verse/<name>) or from a local file."
    )
    parser.add_argument("--dataset", required=True, choices=list(SETS), help="which set")
    parser.add_argument("--from", dest="source", metavar="FILE", help="copy a local JSON of this layout instead")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (default: data/<dataset>.json)")
    parser.add_argument("--sha256", metavar="SUM", help="accept the file with this checksum only")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)

    output, known = args.output or data_file(args.dataset), SETS[args.dataset]
    if output.exists() and not args.force:
        print(f"{output} is there already (--force replaces it)")
        found = check_questions(output, known.data_type)
    else:
        found = fetch_questions(args.dataset, output, args.source and resolve(args.source), args.sha256)
        print(f"{output} written")
    print(f"rows: {found.rows}\nfields: {', '.join(found.fields)}\nsha256: {found.sha256}")
    if known.sha256:
        same = "the copy" if found.sha256 == known.sha256 else "another copy than the one"
        print(f"{same} that this version was tested with")


if __name__ == "__main__":
    run_main(main)
