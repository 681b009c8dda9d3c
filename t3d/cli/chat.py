"""Ask a model questions in a terminal and watch it unmask its answer, block by block.

    python -m t3d.cli.chat --model models/embedded-teacher
    python -m t3d.cli.chat --model TEACHER --student STUDENT     both answer, the student in fewer steps
    echo "..." | python -m t3d.cli.chat --model DIR              questions from a pipe, one a line

Every question stands for itself: earlier ones are not part of the prompt.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import names, strategy_named
from t3d.common.errors import UserError, run_main
from t3d.common.options import fault
from t3d.data.prompts import DATA_TYPES, render
from t3d.data.trajectory import Trajectory
from t3d.decode.protocol import Engine, Request, Step
from t3d.grading.math import extract_answer

MASK = "\N{LIGHT SHADE}"
PLAIN, FRESH, MASKED = "", "\033[1;32m", "\033[2m"  # settled text, just unmasked (bold green), not yet decided (dim)
RESET, HIDE_CURSOR, SHOW_CURSOR = "\033[0m", "\033[?25l", "\033[?25h"


# ---------------------------------------------------------------------------------------------------------------------
# Drawing: styled characters -> rows of the terminal -> escape codes

Cell = tuple[str, str]  # a character and its style


def wrap(cells: list[Cell], columns: int) -> list[list[Cell]]:
    """Break at newlines and, word by word, at ``columns``; words longer than a row are cut.

    No cell is lost: the newline or the blanks at which a row ends are its last cells, and may stand beyond its width.
    """
    rows: list[list[Cell]] = [[]]
    for cell in cells:
        row = rows[-1]
        if cell[0] not in " \n" and sum(width(character) for character, _ in row) + width(cell[0]) > columns:
            word = next((i + 1 for i in reversed(range(len(row))) if row[i][0] == " "), len(row))
            rows[-1], row = row[:word], row[word:]
            rows.append(row)
        row.append(cell)
        if cell[0] == "\n":
            rows.append([])
    return rows


def width(character: str) -> int:
    """The columns that a terminal gives a character."""
    if unicodedata.category(character) in ("Mn", "Me"):  # marks on the character before
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def paint(row: list[Cell]) -> str:
    """A row as the terminal takes it. Control characters that a model may write are not passed on."""
    painted, current = "", PLAIN
    while row and row[-1][0] in " \n":
        row = row[:-1]
    for character, style in row:
        if style != current:
            painted += RESET + style
            current = style
        painted += character if character.isprintable() else " "
    return painted + (RESET if current else "")


@dataclass
class Canvas:
    """A text that is redrawn in place at the end of the terminal.

    Rows that cannot change any more are printed for good and left alone, so an answer may be longer than the screen.
    """

    out: TextIO
    printed: int = 0  # characters of the settled text in rows printed for good
    live: int = 0  # rows below them, the last one without a newline

    def draw(self, settled: str, pending: list[Cell] | None = None) -> None:
        """Show ``settled``, which only ever grows, and behind it what may still change."""
        columns = max(10, shutil.get_terminal_size().columns - 1)  # the last column would start a pending line feed
        fixed = [(character, PLAIN) for character in settled[self.printed :]]
        rows = wrap(fixed + (pending or []), columns)
        up = f"\033[{self.live - 1}A" if self.live > 1 else ""
        self.out.write(f"\r{up}\033[J" + "\r\n".join(paint(row) for row in rows))
        self.out.flush()
        # The word that did not fit decides where a row ends: once that word's row is settled, the row above is final.
        ends, self.live = 0, len(rows)
        for row, below in zip(rows, rows[1:], strict=False):
            ends += len(row)
            if ends + len(below) > len(fixed):
                break
            self.printed += len(row)
            self.live -= 1

    def close(self) -> None:
        self.out.write("\r\n")
        self.live = self.printed = 0


# ---------------------------------------------------------------------------------------------------------------------
# One model answering


@dataclass
class Speaker:
    """A model with its tokenizer and the settings it answers with.

    positions: that the model has, prompt included. mask_id, stop_ids: as in t3d.models.loading.SpecialIds.
    """

    name: str
    engine: Engine
    tokenizer: Any
    settings: DecodeSettings
    positions: int
    mask_id: int
    stop_ids: tuple[int, ...]
    seed: int = 0

    def answer(self, prompt_ids: list[int], settings: DecodeSettings, on_step=None) -> Trajectory:
        request = Request("chat", 0, tuple(prompt_ids))
        (trajectory,) = self.engine.generate([request], settings, self.seed, on_step)
        trajectory.text = self.text(trajectory.response_ids[: trajectory.length])
        return trajectory

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def settings_for(self, prompt_ids: list[int]) -> DecodeSettings:
        """The settings, with no longer an answer than the model has positions for; UserError if there are none."""
        room = self.positions // self.settings.block_size * self.settings.block_size - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"the question has {len(prompt_ids)} tokens, the model {self.positions} positions; shorten it"
            )
        return replace(self.settings, max_token=min(self.settings.max_token, room))


def load_speaker(name: str, source: str, steps: int | None, args: argparse.Namespace) -> Speaker:
    """Load a model and let it decode a little, so that its first answer's time is not that of starting up.

    Args:
        name: of its option on the command line, too.
        steps: a block; None = all.

    Raises:
        UserError: no such model, or settings that it cannot decode with.
    """
    from t3d.models.decoder import load_decoder
    from t3d.models.generation import checked

    decoder = load_decoder(source, key=f"--{name}", max_active=1)
    block = decoder.model.config.block_size if args.block_size is None else args.block_size
    settings = DecodeSettings(
        block_size=block,
        denoising_steps_per_block=block if steps is None else steps,
        remasking_strategy=args.strategy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_token=args.max_token,
        self_verify=args.self_verify,
    )
    if args.threshold is not None:
        if (threshold := strategy_named(checked(settings).remasking_strategy).threshold) is None:
            raise fault("--threshold", args.threshold, f"{args.strategy} has none; leave it out")
        settings = replace(settings, **{threshold: args.threshold})
    checked(settings)
    ids = decoder.ids
    speaker = Speaker(
        name, decoder.engine, decoder.tokenizer, settings, decoder.positions, ids.mask_id, ids.stop_ids, args.seed
    )
    speaker.answer([ids.pad_id] * block, replace(settings, max_token=1))
    return speaker


@dataclass
class Watch:
    """The observer of one answer: draws every step, and knows how much of the time went into that."""

    speaker: Speaker
    canvas: Canvas
    prompt_length: int
    max_token: int
    delay: float = 0.0
    seconds: float = field(default=0.0, init=False)
    settled: str = field(default="", init=False)  # the text of all complete blocks
    begin: int = field(default=0, init=False)  # of the current block in the response

    def __post_init__(self) -> None:
        block = self.speaker.settings.block_size
        self.canvas.draw("", [(MASK, MASKED)] * (block - self.prompt_length % block))

    def __call__(self, step: Step) -> None:
        began = time.perf_counter()
        ids, stops = step.response_ids[: self.max_token], self.speaker.stop_ids
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        pending = self._block(ids[:end], set(step.unmasked))
        if step.block_complete and end == len(ids) < self.max_token:
            pending += [(MASK, MASKED)] * self.speaker.settings.block_size  # the block that comes next
        self.canvas.draw(self.settled, pending)
        if step.block_complete:
            # A character may begin in this block's last token and end in the next block.
            self.settled = self.speaker.text(ids[:end]).rstrip("\N{REPLACEMENT CHARACTER}")
            self.begin = len(ids)
        time.sleep(self.delay)
        self.seconds += time.perf_counter() - began

    def _block(self, ids: list[int], fresh: set[int]) -> list[Cell]:
        """The current block: neighbouring tokens of one style are decoded together, a mask is one sign."""
        runs: list[tuple[str, list[int]]] = []
        for i in range(self.begin, len(ids)):
            style = MASKED if ids[i] == self.speaker.mask_id else FRESH if i in fresh else PLAIN
            if not runs or runs[-1][0] != style:
                runs.append((style, []))
            runs[-1][1].append(ids[i])
        texts = [(MASK * len(run) if style == MASKED else self.speaker.text(run), style) for style, run in runs]
        return [(character, style) for text, style in texts for character in text]


# ---------------------------------------------------------------------------------------------------------------------
# The session


def ask(
    question: str, speaker: Speaker, data_type: str, out: TextIO, *, drawn: bool, delay: float
) -> tuple[Trajectory, float]:
    """Let one model answer, show the answer and its figures. Returns the answer and the seconds it took to decode.

    Raises:
        UserError: a question that the model cannot take.
    """
    try:
        question.encode()
    except UnicodeEncodeError:  # bytes of another encoding arrive as lone surrogates
        raise UserError("the question is not text in UTF-8; write it in that") from None
    plain = data_type == "plain"
    prompt_ids = render(
        question,
        "math" if plain else data_type,
        tokenizer=speaker.tokenizer,
        instruction=not plain,
        test_method="stdio",
    )
    if unknown := prompt_ids.count(speaker.tokenizer.unk_token_id):
        print(f"(the model does not know {unknown} word{'s' if unknown > 1 else ''} of the question)", file=out)
    settings = speaker.settings_for(prompt_ids)
    if drawn:
        out.write(HIDE_CURSOR)
        canvas = Canvas(out)
        try:
            watch = Watch(speaker, canvas, len(prompt_ids), settings.max_token, delay)
            answer = speaker.answer(prompt_ids, settings, watch)
            canvas.draw(answer.text)
        finally:
            canvas.close()
            out.write(SHOW_CURSOR)
        seconds = answer.seconds - watch.seconds
        print(f"{MASKED}{figures(answer, seconds)}{RESET}", file=out, flush=True)
    else:
        answer = speaker.answer(prompt_ids, settings)
        seconds = answer.seconds
        print(f"{answer.text}\n{figures(answer, seconds)}", file=out, flush=True)
    return answer, seconds


def figures(answer: Trajectory, seconds: float) -> str:
    """One line on what an answer took."""
    cut = ", cut at its longest length" if answer.finish_reason == "length" else ""
    return (
        f"{answer.length} tokens, {answer.steps} denoising steps, {answer.forwards} forwards, {seconds:.2f} s: "
        f"{answer.length / answer.steps:.2f} tokens/step, {answer.length / seconds:.0f} tokens/s{cut}"
    )


def comparison(teacher: Trajectory, teacher_seconds: float, student: Trajectory, student_seconds: float) -> str:
    """One line: the student beside the teacher, in tokens per step and per second, and in boxed answers if any."""
    per_step = (student.length / student.steps) / (teacher.length / teacher.steps)
    per_second = (student.length / student_seconds) / (teacher.length / teacher_seconds)
    line = f"student: {per_step:.1f}x the teacher's tokens/step, {per_second:.1f}x its tokens/s"
    said, expected = extract_answer(student.text), extract_answer(teacher.text)
    if said is None or expected is None:
        return line
    return f"{line}; both answer {said}" if said == expected else f"{line}; it answers {said}, the teacher {expected}"


def questions(source: TextIO, out: TextIO) -> Iterator[str]:
    """Questions until /quit or the end of input. Those from a pipe are shown as if they had been typed."""
    typed = source.isatty()
    while True:
        if typed:
            try:
                line = input("\n> ")
            except EOFError:
                print(file=out)
                return
        else:
            line = source.readline()
            if not line:
                return
        line = line.strip()
        if line == "/quit":
            return
        if line and not typed:
            print(f"\n> {line}", file=out, flush=True)
        if line.startswith("/"):
            print(f"{line}: no such command; /quit or Ctrl-D ends", file=out)
        elif line:
            yield line


def chat(speakers: list[Speaker], args: argparse.Namespace, source: TextIO, out: TextIO) -> None:
    """Let every model answer every question. On a terminal that takes colours the answers are drawn step by step."""
    drawn = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for question in questions(source, out):
        results = []
        try:
            for speaker in speakers:
                if len(speakers) > 1:
                    steps = speaker.settings.denoising_steps_per_block
                    print(f"\n{speaker.name}, {steps} step{'s' if steps > 1 else ''} a block", file=out)
                results.append(ask(question, speaker, args.data_type, out, drawn=drawn, delay=args.demo_delay))
        except UserError as error:
            print(f"error: {error}", file=out)
            continue
        if len(results) > 1:
            print(f"\n{comparison(*results[0], *results[1])}", file=out, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m t3d.cli.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="SDAR model: a folder or a hub id; with --student the teacher")
    add("--student", metavar="DIR", help="a second model that answers the same questions in --steps steps")
    add("--steps", type=int, metavar="N", help="denoising steps a block; default all, for a student 1")
    add("--block-size", type=int, metavar="N", help="positions of a block; default the model's own")
    strategy = DecodeSettings.remasking_strategy
    add("--strategy", default=strategy, metavar="NAME", help=f"of choosing positions: {', '.join(names())}")
    add("--threshold", type=float, metavar="P", help="of the strategy, where it has one")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) = greedy")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K most likely tokens; default 0 = all")
    add(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest with this mass; default 1 = all"
    )
    add("--self-verify", action="store_true", help="let the model check its blocks one token at a time as it goes")
    add("--max-token", type=int, default=2000, metavar="N", help="an answer's longest length; default 2000")
    add("--data-type", default="math", choices=(*DATA_TYPES, "plain"), help="wording around a question; plain = none")
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers above temperature 0")
    add("--demo-delay", type=float, default=0.0, metavar="SECONDS", help="pause after every step drawn")
    args = parser.parse_args(argv)
    if not 0 <= args.demo_delay <= 60:
        parser.error(f"--demo-delay {args.demo_delay}: give seconds from 0 to 60")
    return args


def main() -> None:
    args = parse()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what a terminal's encoding lacks is shown as "?"
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a question that is no text ends that question only
    with contextlib.suppress(KeyboardInterrupt):
        from transformers.utils import logging

        logging.disable_progress_bar()
        if args.student is None:
            speakers = [load_speaker("model", args.model, args.steps, args)]
        else:
            student_steps = 1 if args.steps is None else args.steps
            speakers = [
                replace(load_speaker("model", args.model, None, args), name="teacher"),
                load_speaker("student", args.student, student_steps, args),
            ]
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() line editing and history
            print("Ask a question; /quit or Ctrl-D ends.")
        chat(speakers, args, sys.stdin, sys.stdout)
        return
    print()  # behind the ^C


if __name__ == "__main__":
    run_main(main)
