"""Stage 2: check a model's rollouts and write data/<model>-<dataset>_renamed.json, with `full_output` as `answer`.

Reads data/<model>-<dataset>.json; with --project the rollouts in <project>/temp_data/; with --input any file of this
layout or a folder of shards.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from t3d.common import paths
from t3d.common.errors import UserError, run_main
from t3d.common.jsonfiles import atomic_write, read_json_array
from t3d.common.paths import data_file, json_file, model_name, resolve, rollout_stem
from t3d.data.release import prepare_training_file
from t3d.data.rows import read_rows
from t3d.data.shards import finished_ids, shard_files


def sources(args: argparse.Namespace, name: str) -> list[Path]:
    """The files or shard folders to read. If they are missing, `UserError` names the command to run."""
    if args.project:
        return project_rollouts(args)
    path = resolve(args.input) if args.input else data_file(name)
    if not path.exists():
        first = "run sample/sdar_sample.py first, then pass its experiment.project as --project, or a file as --input"
        raise UserError(f"{path} does not exist: {'check --input' if args.input else first}", "--input")
    return [path]


def project_rollouts(args: argparse.Namespace) -> list[Path]:
    """The file of a project's rollouts, their shards if the rollouts have not ended, or the file of every node.

    `UserError` if only a part would be read: files of one machine and of several, a node without a file, a file older
    than its shards.
    """
    stem = rollout_stem(args.project, args.model_name, args.dataset)
    single = [path for path in (json_file(stem), stem) if path.is_file() or shard_files(path)]
    of_node = re.compile(rf"outputs-(\d+)-{re.escape(stem.name.removeprefix('outputs-'))}(\.json)?")
    nodes = {int(match[1]): path for path in stem.parent.glob("outputs-*") if (match := of_node.fullmatch(path.name))}
    if single and nodes:
        raise UserError(
            f"{single[0]} and {nodes[min(nodes)]}: rollouts of one machine and of several; move away the files that "
            "training must not use",
            str(single[0]),
        )
    if not nodes:
        if not single:
            keys = f"experiment.project={args.project} evaluation.eval_dataset={args.dataset}"
            raise UserError(
                f"{json_file(stem)} does not exist: run sample/sdar_sample.py with {keys} first", str(json_file(stem))
            )
        if single[0].is_file():
            check_complete(single[0], stem)
        return single[:1]
    stems = [rollout_stem(args.project, args.model_name, args.dataset, 2, k) for k in range(max(nodes) + 1)]
    for index, stem in enumerate(stems):
        if not json_file(stem).is_file():
            raise UserError(
                f"{json_file(stem)} does not exist: finish node {index}'s rollouts by starting them again, with "
                f"evaluation.node_index={index}",
                "evaluation.node_index",
            )
        check_complete(json_file(stem), stem)
    return [json_file(stem) for stem in stems]


def check_complete(file: Path, folder: Path) -> None:
    """`UserError` if rollouts were started again after `file` was written, and have not ended."""
    if all(shard.stat().st_mtime <= file.stat().st_mtime for shard in shard_files(folder)):
        return
    if more := len(finished_ids(folder) - {id for row in read_json_array(file) for id in row.get("id", [])}):
        raise UserError(
            f"{folder} holds {more} newer answers that {file.name} lacks: start the rollouts again to finish them, "
            "or pass one of the two as --input",
            "--input",
        )


def refuse_to_overwrite(output: Path, origin: str) -> None:
    """`UserError` if `output` exists and was not made from `origin`: a project's folder, or an input."""
    noted = origin_file(output)
    made_from = noted.read_text(encoding="utf-8") if noted.is_file() else "something else"
    if output.exists() and made_from != origin:
        raise UserError(
            f"--output {output}: made from {made_from}, this would be from {origin}; choose another --output, or pass "
            "--force to replace it",
            "--output",
        )


def origin_file(output: Path) -> Path:
    """The hidden file that holds the origin of a prepared file."""
    return output.with_name(f".{output.stem}.origin")


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare a training file. ``argv``: None = the process's own arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True, help="the rollouts' model, e.g. SDAR-4B-Chat (any name)")
    parser.add_argument("--dataset", required=True, help="the rollouts' question set, e.g. MATH_train")
    parser.add_argument("--input", metavar="F", help="a JSON in the release's layout, or a folder of shards")
    parser.add_argument("--project", metavar="P", help="experiment.project of the rollouts")
    parser.add_argument("--output", type=Path, metavar="F", help="default: data/<model>-<dataset>_renamed.json")
    parser.add_argument("--force", action="store_true", help="replace a file that was made from something else")
    args = parser.parse_args(argv)

    name = f"{model_name(args.model_name)}-{args.dataset}"
    found = sources(args, name)
    output = args.output or data_file(f"{name}_renamed")
    origin = str(paths.output(args.project) if args.project else found[0])
    if not args.force:
        refuse_to_overwrite(output, origin)
    # Shards hold only the question. The row's other fields come from the question set, if it is there.
    questions = data_file(args.dataset)
    shards = any(path.is_dir() for path in found)
    rows = list(read_rows(questions)) if shards and questions.exists() else None
    for path in found:
        print(f"read: {path}")
    result = prepare_training_file(found, output, rows)
    with atomic_write(origin_file(output)) as file:
        file.write(origin)
    print("\n".join([*result.lines(), f"written: {output}"]))


if __name__ == "__main__":
    run_main(main)
