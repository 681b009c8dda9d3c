"""Every method on an embedded benchmark, at the same budget: rollouts, training, evaluation, a page in docs/.

    python -m studies.storymath.tables [--domain StoryCode]
        [--methods "A;B"] [--ablations] [--conversion] [--seeds 1,2,3] [--blocks 4,8] [--steps N] [--rollouts N]

Every stage is the command that a real run uses; each is printed before it runs. A finished (method, seed, block) writes
its figures to docs/results/tables/ (StoryCode: a folder in it) and does not run again. So the work can be stopped, and
spread over processes and machines. The page shows all figures in that folder. --page only writes the page. --analysis
measures the loss of a step of the trained students.
"""

import argparse
import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from studies.domains import DOMAINS, Domain, named
from studies.storymath.demo import command
from studies.storymath.estimates import plain, read_figures
from studies.storymath.page import write_page
from t3d.common.errors import UserError, run_main
from t3d.common.jsonfiles import atomic_write
from t3d.common.paths import ROOT

DOCS = ROOT / "docs"
SPLITS = ("test", "long")  # of every evaluation: the test set and the harder one
BATCH = 32  # sequences of an optimizer step, over all processes
KEPT: tuple[str, ...] = (
    "dataset",
    "strategy",
    "tokens_per_step",
    "n",
    "accuracy",
    "ci_low",
    "ci_high",
    "measured_tokens_per_step",
)
KEPT += ("tokens_per_forward", "mean_length")


class Method(NamedTuple):
    """A row of the tables: a training configuration (None: the teacher is only decoded), overrides of each stage, and
    its description on the page. after: the row whose student, of the same block and seed, replaces the teacher.
    converted: the teacher is the embedded autoregressive model, converted. steps, questions: of this row's training, in
    place of --steps and --rollouts.
    """

    config: str | None = None
    after: str | None = None
    converted: bool = False
    steps: int | None = None
    questions: int | None = None
    training: tuple[str, ...] = ()
    rollouts: tuple[str, ...] = ()
    decoding: tuple[str, ...] = ()
    told: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Method":
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        return cls(**values)


# --analysis measures their factorisation error
ANALYSED = ("naive_td", "t3d", "block_likelihood", "best", "best, again")

METHODS, ABLATIONS, CONVERSION = (
    {name: Method.of(row) for name, row in rows.items()}
    for rows in yaml.safe_load(Path(__file__).with_name("methods.yaml").read_text()).values()
)
ROWS = METHODS | ABLATIONS | CONVERSION
AUTOREGRESSIVE = "autoregressive"  # the row that decodes token by token, in blocks of 1


# ---------------------------------------------------------------------------------------------------------------------
# One run


def teacher(domain: Domain, output: Path, block: int) -> str:
    """The embedded teacher. For a block other than 4, SFT at that block converts it from its own weights."""
    if block == 4:
        return domain.teacher
    folder = output / "teachers" / Path(domain.teacher).name / domain.data_type / "teacher" / f"block{block}"
    if not (folder / "ckpt" / "optimized" / "config.json").exists():
        command("python", "-m", domain.package, "--data", str(output / "data"), "--sft")
        command(
            *("python", "train/self_ddo_sdar_full.py", f"config={domain.config}", "experiment.resume=auto"),
            *(f"model.pretrained_model={domain.teacher}", f"training.block_size={block}"),
            *(f"dataset.optimization_data={data_file('sft', domain, output)}", "training.tokens_per_batch=2048"),
            *(f"experiment.output_root={output / 'teachers'}", f"experiment.run_name=block{block}"),
        )
    return str(folder / "ckpt" / "optimized")


def converted(output: Path, block: int) -> str:
    """The embedded autoregressive model as a block-diffusion model, untrained."""
    folder = output / "converted" / f"block{block}"
    if not folder.exists():
        command(
            *("python", "-m", "t3d", "convert", "model.pretrained_model=models/embedded-autoregressive"),
            *(f"convert.output={folder}", f"convert.block_size={block}"),
        )
    return str(folder)


def budget_of(name: str, args) -> tuple[int, int]:
    """The optimizer steps and the questions of a row's training."""
    method = ROWS[name]
    return method.steps or args.steps, method.questions or args.rollouts


def start(method: Method, block: int, args) -> str:
    """The model that a row decodes and trains, unless it comes after another row."""
    return converted(args.output, block) if method.converted else teacher(args.domain, args.output, block)


def data_file(split: str, domain: Domain, output: Path) -> Path:
    """The file of a domain's split."""
    return output / "data" / f"{domain.split(split)}.json"


def roll_out(source: str, split: str, limit: int, block: int, seed: int, method: Method, args) -> Path:
    """The source's trajectories at full steps, checked: token by token where it is the autoregressive model as it is.
    Methods with the same source, overrides, block and seed share the ones for training.
    """
    output, overrides = args.output, method.rollouts
    as_it_is = method.converted and not method.after
    by = [plain(method.after)] if method.after else ["autoregressive"] * as_it_is
    written = 1 if as_it_is else block  # tokens of a decoded block, and its steps
    name = "-".join([f"block{block}-seed{seed}-n{limit}", *by, *overrides]).replace("rollout.", "")
    project = output / ("rollouts" if split == "train" else f"rollouts-{args.domain.split(split)}") / name
    trajectories = project / "trajectories.json"
    if not trajectories.exists():
        command(
            *("python", "sample/sdar_sample.py", "config=configs/demo/sample.yaml", f"experiment.project={project}"),
            *(f"evaluation.checkpoint_path={source}", f"evaluation.limit={limit}", f"rollout.seed={seed}"),
            *(f"evaluation.eval_dataset={data_file(split, args.domain, output)}", f"rollout.block_size={written}"),
            f"evaluation.data_type={args.domain.data_type}",
            *(f"rollout.denoising_steps_per_block={written}", f"rollout.num_processes={args.processes}", *overrides),
        )
        command(
            *("python", "data/rename_key.py", "--model_name", Path(source).name, "--dataset", args.domain.split(split)),
            *("--project", str(project), "--output", str(trajectories)),
        )
    return trajectories


def train_line(name: str, data: Path, source: str, block: int, seed: int, args, folder: Path) -> list[str]:
    """The overrides of one training: the same data, optimizer steps and batch for every method."""
    method, (steps, questions) = ROWS[name], budget_of(name, args)
    return [
        f"config={method.config}",
        f"model.pretrained_model={source}",
        f"dataset.optimization_data={data}",
        f"dataset.data_type={args.domain.data_type}",
        f"dataset.limit={questions}",
        f"training.block_size={block}",
        f"training.seed={seed}",
        f"training.max_steps={steps}",
        f"training.batch_size_lm={BATCH // args.processes}",
        "training.tokens_per_batch=2048",  # batches by length: the same losses in less time
        f"experiment.output_root={folder}",
        "experiment.project=run",
        "experiment.run_name=run",
        "experiment.resume=auto",
        *(override.format(questions=data_file("train", args.domain, args.output)) for override in method.training),
    ]


def evaluation_lines(name: str, checkpoint: str, folder: Path, block: int, seed: int, args) -> list[list[str]]:
    """The overrides of every evaluation of one student: 1, 2, 4, ... tokens per step on both splits, and dynamic."""
    common = [
        "config=configs/demo/eval.yaml",
        f"experiment.project={folder}",
        f"evaluation.checkpoint_path={checkpoint}",
        f"evaluation.data_type={args.domain.data_type}",
        f"evaluation.method={name.replace(', ', '-').replace(' ', '_')}",
        f"rollout.block_size={block}",
        f"rollout.seed={seed}",
        *ROWS[name].decoding,
    ]
    if args.problems:
        common.append(f"evaluation.limit={args.problems}")
    data = [f"evaluation.eval_dataset={data_file(split, args.domain, args.output)}" for split in SPLITS]
    steps = [block >> k for k in range(block.bit_length())]
    lines = [[*common, where, f"rollout.denoising_steps_per_block={s}"] for where in data for s in steps]
    dynamic = ["rollout.remasking_strategy=low_confidence_dynamic", "rollout.dynamic_threshold=0.9"]
    return [*lines, [*common, data[0], f"rollout.denoising_steps_per_block={block}", *dynamic]]


def train(name: str, block: int, seed: int, args) -> tuple[str, dict[str, object]]:
    """Train a method's student, after the row in ``after``. Returns the student's folder and its budget."""
    from t3d.common.options import load
    from t3d.training.settings import TrainConfig

    method = ROWS[name]
    folder = model_folder(name, block, seed, args)
    source = student(method.after, block, seed, args)[0] if method.after else start(method, block, args)
    if name == "sft":
        data = data_file("train", args.domain, args.output)
    else:
        data = roll_out(source, "train", budget_of(name, args)[1], block, seed, method, args)
    launch = ["python"]
    if args.processes > 1:
        launch = ["accelerate", "launch", "--config_file", "accelerate_configs/2_cpu_processes.yaml"]
        launch += ["--num_processes", str(args.processes)]
    line = train_line(name, data, source, block, seed, args, folder)
    command(*launch, "train/self_ddo_sdar_full.py", *line)
    run = run_folder(folder)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    budget = {
        "learning_rate": load(TrainConfig, line).optimizer.params.learning_rate,
        "tokens": sum(step["tokens"] for step in log),  # tokens seen in training, clean and noisy copies
    }
    return str(run / "ckpt" / "optimized"), budget


def student(name: str, block: int, seed: int, args) -> tuple[str, dict[str, object]]:
    """``train`` of a row that another row needs; waits if another process trains it."""
    with claimed(model_folder(name, block, seed, args), wait=True):
        return train(name, block, seed, args)


def run_one(name: str, block: int, seed: int, args) -> None:
    """Train and evaluate one method, and write its figures."""
    from t3d.common.options import load
    from t3d.evaluation.run import evaluate
    from t3d.evaluation.settings import EvalConfig

    method = ROWS[name]
    if method.config:
        checkpoint, budget = train(name, block, seed, args)
    elif method.after:
        checkpoint, budget = student(method.after, block, seed, args)
    else:
        checkpoint, budget = start(method, block, args), {}
    folder = model_folder(name, block, seed, args)
    rows = []
    for line in evaluation_lines(name, checkpoint, folder, block, seed, args):
        print(f"\n$ {shlex.join(['python', 'eval.py', *line])}", flush=True)
        rows += json.loads(evaluate(load(EvalConfig, line)).read_text())
    figures = {
        **{"method": name, "block_size": block, "seed": seed},
        **made_with(name, args),
        **budget,
        "rows": [{key: row[key] for key in KEPT} for row in rows],
    }
    with atomic_write(figures_file(name, block, seed, args)) as file:
        file.write(json.dumps(figures, indent=1) + "\n")


def made_with(name: str, args) -> dict[str, object]:
    """The settings of a run's figures. Runs in one table must share them."""
    method = ROWS[name]
    given: dict[str, object] = {
        "config": method.config,
        "training": [],
        "rollouts": [],
        "decoding": list(method.decoding),
    }
    given["after"] = made_with(method.after, args) if method.after else None
    if method.config:
        given |= {"training": list(method.training), "rollouts": list(method.rollouts)}
        steps, questions = budget_of(name, args)
        given |= {"steps": steps, "questions": questions}
    return given | {"problems": args.problems}


def analyse(name: str, block: int, seed: int, args) -> None:
    """Measure the loss of a step of the trained student and of its teacher, at states of held-out answers."""
    target = analyses(args) / figures_file(name, block, seed, args).name
    if target.exists():
        return
    folder = model_folder(name, block, seed, args)
    student = run_folder(folder) / "ckpt" / "optimized"
    if not student.exists():
        print(f"{name}, block {block}, seed {seed}: no student below {folder}; run it first (without --analysis)")
        return
    source = teacher(args.domain, args.output, block)
    trajectories = roll_out(source, "val", 500, block, seed, Method(), args)
    command(
        *(
            "python",
            "-m",
            "t3d.evaluation.analysis",
            f"teacher={source}",
            f"student={student}",
            f"trajectories={trajectories}",
        ),
        *("limit=200", f"output={folder / 'analysis.json'}"),
        f"tokens_per_step={[block >> k for k in range(block.bit_length() - 1)][::-1]}",
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "analysis.json", target)


def finished(name: str, block: int, seed: int, args) -> bool:
    """Whether the run has its figures. UserError if they come from other settings."""
    file = figures_file(name, block, seed, args)
    if not file.exists():
        return False
    figures = read_figures(file)
    for key, asked in made_with(name, args).items():
        if figures.get(key) != asked:
            what = f"{key}: {file} was made with {figures.get(key)}, this asks for {asked}"
            raise UserError(f"{what}; ask for that, or move the file away", key)
    return True


@contextmanager
def claimed(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the folder is ours inside the block. If another process works in it: wait for it, or False."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def run_folder(folder: Path) -> Path:
    """The training below a run's folder, under its teacher's name. The path may not exist yet."""
    return next(folder.glob("*/*/run/run"), folder / "none")


def figures_folder(args) -> Path:
    """The folder of all figures."""
    return args.docs / "results" / "tables" / args.domain.results


def figures_file(name: str, block: int, seed: int, args) -> Path:
    """The file of a run's figures."""
    return figures_folder(args) / f"{plain(name)}-block{block}-seed{seed}.json"


def analyses(args) -> Path:
    """The folder of the losses of a step."""
    return args.docs / "results" / "analysis" / args.domain.results


def model_folder(name: str, block: int, seed: int, args) -> Path:
    """The folder of a run's student and its answers, for this budget only."""
    steps, questions = budget_of(name, args)
    return args.output / f"{figures_file(name, block, seed, args).stem}-steps{steps}-n{questions}"


def count(text: str) -> int:
    """A command line's whole number, from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return int(text)


def counts(text: str) -> list[int]:
    """A command line's whole numbers, separated by commas, each once."""
    found = [count(part.strip()) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: give each once")
    return found


def block_sizes(text: str) -> list[int]:
    """A command line's block sizes."""
    found = counts(text)
    if odd := [block for block in found if block < 2 or block & (block - 1)]:
        raise argparse.ArgumentTypeError(
            f"{odd[0]}: blocks of 2, 4, 8, ... (tokens per step double up to a whole block)"
        )
    return found


def chosen_rows(args) -> list[str]:
    """The names of the rows to run. Raises UserError for one that is not known, or that the domain has no model for."""
    every = [*METHODS, *(ABLATIONS if args.ablations else ()), *(CONVERSION if args.conversion else ())]
    chosen = args.methods.split(";") if args.methods else every
    if unknown := [name for name in chosen if name not in ROWS]:
        raise UserError(f"--methods {unknown[0]}: not known; {'; '.join(ROWS)}", "--methods")
    if args.domain.name != "StoryMath" and (rows := [name for name in chosen if ROWS[name].converted]):
        raise UserError(
            f"--methods {rows[0]}: {args.domain.name} has no autoregressive model; leave it out", "--methods"
        )
    return chosen


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", type=named, default="StoryMath", help=f"one of {', '.join(DOMAINS)}")
    parser.add_argument("--methods", help=f"some of: {'; '.join(ROWS)} (separated by ;)")
    parser.add_argument("--ablations", action="store_true", help="the ablations too")
    parser.add_argument("--conversion", action="store_true", help="the rows from an autoregressive model too")
    parser.add_argument("--seeds", type=counts, default=[1, 2, 3])
    parser.add_argument("--blocks", type=block_sizes, default=[4])
    parser.add_argument("--steps", type=count, default=600, help="optimizer steps of 32 sequences")
    parser.add_argument("--rollouts", type=count, default=4000, help="questions to learn from")
    parser.add_argument("--processes", type=count, default=2, help="processes of rollouts and training, one core each")
    parser.add_argument("--problems", type=count, help="problems per evaluation; default all")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of models and rollouts; default experiments/tables, StoryCode: a folder in it",
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page and of results/")
    parser.add_argument(
        "--analysis", action="store_true", help=f"only measure the loss of a step: {', '.join(ANALYSED)}"
    )
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    args.output = args.output or args.domain.runs
    os.chdir(ROOT)  # as in the stages' processes; printed paths are relative to it
    if BATCH % args.processes:
        raise UserError(f"--processes {args.processes}: {BATCH} sequences a step do not divide by it", "--processes")
    chosen = chosen_rows(args)
    if args.analysis:
        for name, block in product(ANALYSED, args.blocks):
            analyse(name, block, args.seeds[0], args)
    elif not args.page:
        every = product(args.blocks, args.seeds, chosen)
        wanted = dict.fromkeys((name, 1 if name == AUTOREGRESSIVE else block, seed) for block, seed, name in every)
        runs = [run for run in wanted if not finished(*run, args)]
        if runs and not data_file(SPLITS[0], args.domain, args.output).exists():
            command("python", "-m", args.domain.package, "--data", str(args.output / "data"))
        for number, run in enumerate(runs, 1):
            print(f"\n=== {number} of {len(runs)}: {run[0]}, block {run[1]}, seed {run[2]}", flush=True)
            with claimed(model_folder(*run, args)) as ours:
                if not ours:
                    print("another process works on it")
                elif not finished(*run, args):
                    run_one(*run, args)
    methods, ablations, conversion = (
        {name: method.told for name, method in some.items()} for some in (METHODS, ABLATIONS, CONVERSION)
    )
    page = args.docs / args.domain.page
    write_page(args.domain, figures_folder(args), analyses(args), page, methods, ablations, conversion, SPLITS, BATCH)


if __name__ == "__main__":
    run_main(main)
