"""The terminal chat: sessions through a pipe, and what a person sees on a terminal of a few rows."""

import io
import itertools
import os
import re
import sys

import pytest
from rich.console import Console
from rich.text import Text

from t3d.blocks.settings import DecodeSettings
from t3d.cli import chat, speaker
from t3d.cli.chat import MASK, Tail, printable
from tests.conftest import raises_key


class Screen(io.StringIO):
    """A terminal: text moves a cursor over rows, and rows wrap at the width. It has a second screen, which programs
    open and leave, and which ``watched`` remembers; a narrower width wraps the rows of the first anew.
    """

    def __init__(self, columns: int):
        super().__init__()
        self.columns, self.rows, self.row, self.column = columns, [""], 0, 0
        self.first, self.watched, self.raw, self.cursor = None, [], "", True

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.raw += text
        for code, character in re.findall(r"(\033\[[?\d;]*[A-Za-z])|(.)", text, re.DOTALL):
            if code in ("\033[?25l", "\033[?25h"):
                self.cursor = code.endswith("h")
            elif code == "\033[?1049h":
                self.first = (self.rows, self.row, self.column)
                self.rows, self.row, self.column = [""], 0, 0
            elif code == "\033[?1049l":
                self.rows, self.row, self.column = self.first
            elif code == "\033[H":
                self.row = self.column = 0
            elif code.endswith("A"):
                self.row = max(0, self.row - int(code[2:-1]))
            elif code == "\033[2K":
                self.rows[self.row] = ""
            elif character == "\r":
                self.column = 0
            elif character == "\n":  # as a terminal driver has it: carriage return included
                self.feed()
            elif character:
                if self.column == self.columns:
                    self.feed()
                row = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = row[: self.column] + character + row[self.column + 1 :]
                self.column += 1
        if "\033[H" in text:
            self.watched.append("\n".join(row.rstrip() for row in self.rows))
        return len(text)

    def feed(self) -> None:
        self.row, self.column = self.row + 1, 0
        self.rows += [""] * (self.row + 1 - len(self.rows))

    def shown(self) -> str:
        """The words of the first screen, wherever their rows end."""
        return " ".join(" ".join(self.rows).split())


@pytest.fixture
def screen(monkeypatch):
    def make(columns: int, height: int) -> Screen:
        out = Screen(columns)
        monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((out.columns, height)))
        monkeypatch.setenv("TERM", "xterm-256color")
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            monkeypatch.delenv(name, raising=False)
        return out

    return make


def session(monkeypatch, out, text: str, *argv: object) -> str:
    """Run the program with `text` on its standard input; returns what it wrote."""
    monkeypatch.setattr(sys, "argv", ["chat", *map(str, argv)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(sys, "stdout", out)
    chat.main()
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def test_the_last_rows_of_a_text_are_drawn():
    console = Console(file=io.StringIO(), width=10, height=2, color_system=None)
    console.print(Tail(Text("one two three four five six")))
    assert console.file.getvalue().split() == ["three", "four", "five", "six"]


def test_no_control_characters_pass():
    assert printable("a\033[2Jb\r\nc") == "a [2Jb \nc"


# ---------------------------------------------------------------------------------------------------------------------
# Sessions


QUESTION = "Tom has 3 apples. How many apples does Tom have now?"


def test_a_piped_session(story_teacher, monkeypatch):
    asked = f"{QUESTION}\n\n/help\nzebra\n/quit\nnever asked\n"
    written = session(monkeypatch, io.StringIO(), asked, "--model", story_teacher, "--max-token", 12)
    first, second = re.split(r"\n> zebra\n", written)
    question, answer, figures, *_ = first.strip().splitlines()
    assert question == f"> {QUESTION}" and answer
    assert re.fullmatch(
        r"\d+ tokens, \d+ denoising steps, \d+ forwards, [\d.]+ s: [\d.]+ tokens/step, \d+ tokens/s.*", figures
    )
    assert "/help: no such command" in first and "(the model does not know 1 word of the question)" in second
    assert "\033" not in written and "never asked" not in written


def test_teacher_and_student_answer_the_same_question(story_teacher, monkeypatch):
    argv = ("--model", story_teacher, "--student", story_teacher, "--max-token", 12, "--data-type", "text")
    written = session(monkeypatch, io.StringIO(), QUESTION, *argv)
    assert re.search(r"\nteacher, 4 steps a block\n.*\nstudent, 1 step a block\n", written, re.DOTALL)
    assert re.search(r"\nstudent: [\d.]+x the teacher's tokens/step, [\d.]+x its tokens/s", written)


def test_flags_reach_the_decoder(story_teacher):
    given = "--strategy low_confidence_dynamic --threshold 0.5 --temperature 0.7 --top-k 5 --top-p 0.8 --self-verify"
    args = chat.parse(["--model", str(story_teacher), *given.split(), "--block-size", "8", "--max-token", "9"])
    settings = chat.load_speaker("model", args.model, 2, args).settings
    assert settings == DecodeSettings(
        8, 2, "low_confidence_dynamic", 0.5, temperature=0.7, top_k=5, top_p=0.8, max_token=9, self_verify=True
    )
    bounded = chat.parse(["--model", str(story_teacher), "--strategy", "entropy_bounded", "--threshold", "0.7"])
    assert chat.load_speaker("model", bounded.model, 2, bounded).settings.eb_threshold == 0.7
    none = chat.parse(["--model", str(story_teacher), "--threshold", "0.7"])
    with raises_key("--threshold"):
        chat.load_speaker("model", none.model, 2, none)
    plain = chat.parse(["--model", str(story_teacher)])
    assert chat.load_speaker("model", plain.model, None, plain).settings == DecodeSettings(temperature=0.0)


def test_self_verification_is_watched(story_teacher, screen, monkeypatch):
    """Each answer takes a check a block: more forwards than steps. The screen ends with the answer a pipe gets."""
    argv = ("--model", story_teacher, "--max-token", 14, "--steps", 2, "--self-verify")
    plain = session(monkeypatch, io.StringIO(), QUESTION, *argv)
    steps, forwards = map(int, re.search(r"(\d+) denoising steps, (\d+) forwards", plain).groups())
    assert forwards > steps + 1
    out = screen(200, 50)
    session(monkeypatch, out, QUESTION, *argv)
    assert plain.splitlines()[2] in out.shown()


def test_blocks_are_watched_on_a_terminal(story_teacher, screen, monkeypatch):
    argv = ("--model", story_teacher, "--max-token", 22, "--temperature", 1.0, "--seed", 12)
    plain = session(monkeypatch, io.StringIO(), QUESTION, *argv).splitlines()
    out = screen(30, 6)
    session(monkeypatch, out, QUESTION, *argv)
    assert f"\033[2m{MASK}" in out.raw and "\033[1;32m" in out.raw, "dim masks, fresh tokens in bold green"
    assert any(MASK in frame for frame in out.watched) and MASK not in "".join(out.rows)
    answer = " ".join(" ".join(plain[2:-1]).split())
    assert len(answer) > 30
    assert out.shown().count(answer) == 1 and max(map(len, out.rows)) <= 30
    assert "loading" in out.raw


def test_a_resize_doubles_no_row(story_teacher, screen, monkeypatch):
    argv = ("--model", story_teacher, "--max-token", 22, "--temperature", 1.0, "--seed", 12)
    plain = session(monkeypatch, io.StringIO(), QUESTION, *argv).splitlines()
    out, widths = screen(60, 6), itertools.cycle((20, 44, 60))

    def resize(seconds: float) -> None:
        out.columns = next(widths)

    monkeypatch.setattr(chat.time, "sleep", resize)
    session(monkeypatch, out, QUESTION, *argv)
    assert out.shown().count(QUESTION) == 1
    assert out.shown().count(" ".join(" ".join(plain[2:-1]).split())) == 1


def test_no_color(story_teacher, screen, monkeypatch):
    out = screen(200, 50)
    monkeypatch.setenv("NO_COLOR", "1")
    session(monkeypatch, out, QUESTION, "--model", story_teacher, "--max-token", 8)
    assert "\033" not in out.raw


def test_ctrl_c_stops_the_answer_and_not_the_program(story_teacher, screen, monkeypatch):
    out, presses = screen(80, 20), iter([True])

    def press_once(seconds: float) -> None:
        if next(presses, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(chat.time, "sleep", press_once)
    session(monkeypatch, out, f"{QUESTION}\n{QUESTION}", "--model", story_teacher, "--max-token", 8)
    assert out.shown().count(QUESTION) == 2
    assert out.shown().count("(stopped)") == out.shown().count(" forwards") == 1
    assert out.cursor and "\033[?1049l" in out.raw, "the first screen and its cursor are back"


class Keyboard(io.StringIO):
    """A person at a terminal, line by line; the line ^C is the keys Ctrl-C."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int = -1) -> str:
        if (line := super().readline(size)) == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.mark.parametrize(
    "typed, hints, answers",
    [
        ("^C\n^C\nQ\n", 1, 0),  # twice in a row: the end
        ("^C\nQ\n^C\nQ\n", 2, 2),  # a question between them: two first ones
        ("^C\n\n^C\n^C\nQ\n", 2, 0),  # as does an empty line
        ("^C\n/quit\nQ\n", 1, 0),
    ],
)
def test_ctrl_c_at_the_prompt_says_how_to_leave_and_the_second_leaves(
    story_teacher, monkeypatch, typed, hints, answers
):
    monkeypatch.setattr(sys, "argv", ["chat", "--model", str(story_teacher), "--max-token", "4"])
    monkeypatch.setattr(sys, "stdin", Keyboard(typed.replace("Q\n", f"{QUESTION}\n")))
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    chat.main()
    assert out.getvalue().count("Ctrl-C again") == hints and out.getvalue().count(" forwards") == answers


def test_samples_are_in_the_words_of_the_model(story_teacher, monkeypatch):
    args = chat.parse(["--model", str(story_teacher)])
    offered = speaker.samples(chat.load_speaker("model", args.model, None, args), "math")
    assert offered == list(speaker.STORIES), "word for word, others have words that it does not know"
    written = session(monkeypatch, io.StringIO(), "/2", "--model", story_teacher, "--max-token", 8)
    assert f"> {offered[1]}" in written and "does not know" not in written


def test_a_conversation_keeps_its_turns(story_teacher, monkeypatch):
    asked = []
    render = speaker.prompt_ids
    monkeypatch.setattr(speaker, "prompt_ids", lambda *a, **k: asked.append(list(k["earlier"])) or render(*a, **k))
    argv = ("--model", story_teacher, "--max-token", 4, "--data-type", "text")
    session(monkeypatch, io.StringIO(), f"{QUESTION}\n{QUESTION}\n/new\n{QUESTION}", *argv)
    assert [len(turns) for turns in asked] == [0, 2, 0]
    assert asked[1][0] == {"role": "user", "content": QUESTION} and asked[1][1]["role"] == "assistant"
    asked.clear()
    session(monkeypatch, io.StringIO(), f"{QUESTION}\n" * 9, *argv, "--turns", 1)
    assert max(map(len, asked)) == 2
    asked.clear()
    session(monkeypatch, io.StringIO(), f"{QUESTION}\n{QUESTION}", *argv[:-2])
    assert asked == [[], []], "worded questions stand for themselves"


def test_mistakes_are_one_line(story_teacher, monkeypatch):
    for argv, key, named in [
        (("--model", "nowhere"), "--model", "=nowhere"),
        (("--model", story_teacher, "--student", "nowhere"), "--student", "=nowhere"),
        (("--model", story_teacher, "--steps", 5), "denoising_steps_per_block", "block_size=4"),
        (("--model", story_teacher, "--strategy", "fast"), "remasking_strategy", "=fast"),
        (("--model", story_teacher, "--top-p", 0), "top_p", "=0.0"),
        (("--model", story_teacher, "--self-verify", "--block-size", 1), "self_verify", "block_size"),
    ]:
        with raises_key(key, named):
            session(monkeypatch, io.StringIO(), "", *argv)
    asked = f"{'apples ' * 300}\n{QUESTION}"
    written = session(monkeypatch, io.StringIO(), asked, "--model", story_teacher, "--max-token", 4)
    assert "tokens, the model 256 positions;" in written and written.count(" forwards") == 1


@pytest.mark.parametrize("first", [b"caf\xe9\n", b"\xed\xa0\x80\n"])
def test_a_question_that_is_no_text_is_told_and_the_next_one_answered(story_teacher, monkeypatch, first):
    monkeypatch.setattr(sys, "argv", ["chat", "--model", str(story_teacher), "--max-token", "4"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(first + QUESTION.encode()), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    chat.main()
    out.seek(0)
    written = out.read()
    assert "error: the question" in written and "UTF-8" in written and written.count(" forwards") == 1
