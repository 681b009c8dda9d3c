"""Ask a model questions in a terminal and watch it unmask its answer, block by block.

    t3d chat --model models/embedded-teacher
    t3d chat --model TEACHER --student STUDENT     both answer, the student in fewer steps
    echo "..." | t3d chat --model DIR              questions from a pipe, one a line

With --data-type text earlier turns stay in the prompt; otherwise every question stands alone. Type /1, /2, ... for a
sample question. /new begins a new conversation. Ctrl-C stops an answer, and drops a line that is being typed. /quit,
Ctrl-D, or Ctrl-C twice at the prompt ends the chat.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import names, strategy_named
from t3d.cli.speaker import Speaker, samples, warmed
from t3d.common.errors import UserError, fault, run_main
from t3d.data.trajectory import Trajectory
from t3d.decode.protocol import Step
from t3d.grading.math import extract_answer
from t3d.tasks import TASKS

MASK = "\N{LIGHT SHADE}"
PLAIN, FRESH, MASKED = "", "bold green", "dim"  # settled text, just unmasked, not yet decided


# ---------------------------------------------------------------------------------------------------------------------
# One model answering


def load_speaker(name: str, source: str, steps: int | None, args: argparse.Namespace) -> Speaker:
    """Load a model and decode a few tokens, so that the time of the first answer does not include the start-up.

    Args:
        name: "teacher" or "student"; also the name of its option on the command line.
        steps: denoising steps per block; None = all.

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
            raise fault("--threshold", args.threshold, f"{args.strategy} has no threshold; leave it out")
        settings = replace(settings, **{threshold: args.threshold})
    return warmed(Speaker.of(name, decoder, checked(settings), args.seed), decoder)


@dataclass
class Watch:
    """The observer of one answer: it draws every step, and measures the time that drawing takes.

    It draws on the terminal's second screen, so that a resize leaves no traces on the first.
    """

    speaker: Speaker
    console: Console
    question: str
    prompt_length: int
    max_token: int
    delay: float = 0.0
    seconds: float = field(default=0.0, init=False)
    settled: str = field(default="", init=False)  # the text of all complete blocks
    begin: int = field(default=0, init=False)  # start of the current block in the response

    def __enter__(self) -> "Watch":
        self.live = Live(console=self.console, screen=True, auto_refresh=False, redirect_stdout=False)
        self.live.start()
        block = self.speaker.settings.block_size
        self._draw(Text(MASK * (block - self.prompt_length % block), MASKED))
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, step: Step) -> None:
        began = time.perf_counter()
        ids, stops = step.response_ids[: self.max_token], self.speaker.stop_ids
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        pending = self._block(ids[:end], set(step.unmasked))
        if step.block_complete and end == len(ids) < self.max_token:
            pending.append(MASK * self.speaker.settings.block_size, MASKED)  # the next block
        self._draw(pending)
        if step.block_complete:
            # A character may begin in this block's last token and end in the next block.
            self.settled = self.speaker.text(ids[:end]).rstrip("\N{REPLACEMENT CHARACTER}")
            self.begin = len(ids)
        time.sleep(self.delay)
        self.seconds += time.perf_counter() - began

    def _draw(self, pending: Text) -> None:
        self.live.update(Tail(Text(f"> {self.question}\n\n{printable(self.settled)}") + pending), refresh=True)

    def _block(self, ids: list[int], fresh: set[int]) -> Text:
        """The current block. Neighbouring tokens of one style are decoded together; a mask is one sign."""
        runs: list[tuple[str, list[int]]] = []
        for i in range(self.begin, len(ids)):
            style = MASKED if ids[i] == self.speaker.mask_id else FRESH if i in fresh else PLAIN
            if not runs or runs[-1][0] != style:
                runs.append((style, []))
            runs[-1][1].append(ids[i])
        texts = [(MASK * len(run) if style == MASKED else self.speaker.text(run), style) for style, run in runs]
        return Text.assemble(*((printable(text), style) for text, style in texts))


@dataclass(frozen=True)
class Tail:
    """The last rows of a text that fit the screen."""

    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.text.wrap(console, options.max_width)[-options.size.height :]


def printable(text: str) -> str:
    """The text without control characters, which a model may write and a terminal would obey."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


# ---------------------------------------------------------------------------------------------------------------------
# The session


@dataclass
class Turns:
    """The conversation with one model: at most ``longest`` earlier questions and answers stay in the prompt."""

    speaker: Speaker
    longest: int
    earlier: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, question: str, data_type: str) -> list[int]:
        """The prompt's ids. If there is no room for an answer, the oldest turns are dropped."""
        while True:
            ids = self.speaker.prompt(question, data_type, self.earlier)
            if not self.earlier or len(ids) < self.speaker.positions // 2:
                return ids
            del self.earlier[:2]

    def add(self, question: str, answer: str) -> None:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        self.earlier = [*self.earlier, *turns][-2 * self.longest :] if self.longest else []


def ask(question: str, turns: Turns, console: Console, *, data_type: str, delay: float) -> tuple[Trajectory, float]:
    """Let one model answer, show the answer and its figures. Returns the answer and the seconds it took to decode.

    Raises:
        UserError: a question that the model cannot take.
        KeyboardInterrupt: the person has stopped the answer; the text so far has been shown.
    """
    speaker = turns.speaker
    ids = turns.prompt(question, data_type)
    if unknown := ids.count(speaker.tokenizer.unk_token_id):
        console.out(f"(the model does not know {unknown} word{'s' if unknown > 1 else ''} of the question)")
    settings = speaker.settings_for(ids)
    if not draws(console):
        answer = speaker.answer(ids, settings)
        turns.add(question, answer.text)
        console.out(f"{answer.text}\n{figures(answer, answer.seconds)}")
        return answer, answer.seconds
    watch = Watch(speaker, console, question, len(ids), settings.max_token, delay)
    try:
        with watch:
            answer = speaker.answer(ids, settings, watch)
    except KeyboardInterrupt:
        console.print(Text(printable(watch.settled)), Text("(stopped)", MASKED))
        raise
    seconds = answer.seconds - watch.seconds
    turns.add(question, answer.text)
    console.print(Text(printable(answer.text)))
    console.print(Text(figures(answer, seconds), MASKED))
    return answer, seconds


def draws(console: Console) -> bool:
    """Whether answers are drawn step by step: only on a terminal with colours."""
    return console.is_terminal and not console.is_dumb_terminal and not console.no_color


def figures(answer: Trajectory, seconds: float) -> str:
    """An answer's length, steps, forwards and time in one line."""
    cut = ", cut at the length limit" if answer.finish_reason == "length" else ""
    return (
        f"{answer.length} tokens, {answer.steps} denoising steps, {answer.forwards} forwards, {seconds:.2f} s: "
        f"{answer.length / answer.steps:.2f} tokens/step, {answer.length / seconds:.0f} tokens/s{cut}"
    )


def comparison(teacher: Trajectory, teacher_seconds: float, student: Trajectory, student_seconds: float) -> str:
    """One line that compares student and teacher: tokens per step and per second, and boxed answers if any."""
    per_step = (student.length / student.steps) / (teacher.length / teacher.steps)
    per_second = (student.length / student_seconds) / (teacher.length / teacher_seconds)
    line = f"student: {per_step:.1f}x the teacher's tokens/step, {per_second:.1f}x its tokens/s"
    said, expected = extract_answer(student.text), extract_answer(teacher.text)
    if said is None or expected is None:
        return line
    return f"{line}; both answer {said}" if said == expected else f"{line}; it answers {said}, the teacher {expected}"


def lines(source: TextIO, console: Console) -> Iterator[str]:
    """The lines of the input, asked for at a terminal."""
    if not source.isatty():
        yield from iter(source.readline, "")
        return
    pressed = False  # whether Ctrl-C was the last thing at the prompt
    with contextlib.suppress(EOFError):
        while True:
            try:
                line = input("\n> ")
            except KeyboardInterrupt:
                if pressed and not half_typed():
                    break
                pressed = True
                console.out("\n(Ctrl-C again, Ctrl-D or /quit ends the chat)")
                continue
            pressed = False
            yield line
    console.out()


def half_typed() -> bool:
    """Whether the line of the last prompt has text, as far as the terminal's line editor tells."""
    editor = sys.modules.get("readline")
    return editor is not None and bool(editor.get_line_buffer())


def questions(source: TextIO, console: Console, examples: Sequence[str]) -> Iterator[str]:
    """Questions until /quit or the end of input, and /new. Questions from a pipe are shown as if they were typed."""
    typed, numbered = source.isatty(), {f"/{i}": question for i, question in enumerate(examples, 1)}
    if typed:
        console.out("Ask a question. Ctrl-C stops an answer, /quit or Ctrl-D ends the chat. Sample questions:")
        for number, question in numbered.items():
            console.out(f"  {number}  {question}")
    for line in map(str.strip, lines(source, console)):
        if line == "/quit":
            return
        if line and (not typed or line in numbered):
            line = numbered.get(line, line)
            console.out(f"\n> {line}")
        if line.startswith("/") and line != "/new":
            console.out(f"{line}: no such command; /new begins a new conversation, /quit or Ctrl-D ends the chat")
        elif line:
            yield line


def chat(speakers: Sequence[Speaker], args: argparse.Namespace, source: TextIO, console: Console) -> None:
    """Let every model answer every question."""
    longest = (8 if args.data_type == "text" else 0) if args.turns is None else args.turns
    conversations = [Turns(speaker, longest) for speaker in speakers]
    for question in questions(source, console, samples(speakers[0], args.data_type)):
        if question == "/new":
            conversations = [Turns(speaker, longest) for speaker in speakers]
            continue
        results = []
        with contextlib.suppress(KeyboardInterrupt):
            for turns in conversations:
                speaker = turns.speaker
                if len(speakers) > 1:
                    steps = speaker.settings.denoising_steps_per_block
                    console.out(f"\n{speaker.name}, {steps} step{'s' if steps > 1 else ''} a block")
                try:
                    results.append(ask(question, turns, console, data_type=args.data_type, delay=args.demo_delay))
                except UserError as error:
                    console.out(f"error: {error}")
                    break
        if len(results) > 1:
            console.out(f"\n{comparison(*results[0], *results[1])}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="t3d chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR",
        help="model: a folder or a hub id; with --student the teacher",
    )
    add("--student", metavar="DIR", help="a second model that answers the same questions in --steps steps")
    add("--steps", type=int, metavar="N", help="denoising steps per block; default all, for a student 1")
    add("--block-size", type=int, metavar="N", help="positions of a block; default the model's own")
    strategy = DecodeSettings.remasking_strategy
    add("--strategy", default=strategy, metavar="NAME", help=f"how positions are chosen: {', '.join(names())}")
    add("--threshold", type=float, metavar="P", help="the strategy's threshold, if it has one")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) = greedy")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K most likely tokens; default 0 = all")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest of this mass; default 1 = all")
    add("--self-verify", action="store_true", help="let the model check each block one token at a time")
    add("--max-token", type=int, default=2000, metavar="N", help="most tokens of an answer; default 2000")
    add("--data-type", default="math", choices=tuple(TASKS), help="wording around a question; text = none")
    add("--turns", type=int, metavar="N", help="earlier turns that stay in the prompt; default 0, with text 8")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random numbers above temperature 0")
    add("--demo-delay", type=float, default=0.0, metavar="SECONDS", help="pause after every drawn step")
    args = parser.parse_args(argv)
    if not 0 <= args.demo_delay <= 60:
        parser.error(f"--demo-delay {args.demo_delay}: give seconds from 0 to 60")
    if args.turns is not None and args.turns < 0:
        parser.error(f"--turns {args.turns}: give 0 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command `t3d chat`."""
    args = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks become "?"
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad question does not end the chat
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    with contextlib.suppress(KeyboardInterrupt):
        from transformers.utils import logging

        logging.disable_progress_bar()
        loads = [("model", args.model, args.steps)]
        if args.student is not None:
            loads = [("model", args.model, None), ("student", args.student, 1 if args.steps is None else args.steps)]
        speakers = []
        for name, source, steps in loads:
            with console.status(f"loading {source}") if draws(console) else contextlib.nullcontext():
                speakers.append(load_speaker(name, source, steps, args))
        if len(speakers) > 1:
            speakers[0] = replace(speakers[0], name="teacher")
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() line editing and history
        chat(speakers, args, sys.stdin, console)
        return
    print()  # a new line after the ^C


if __name__ == "__main__":
    run_main(main)
