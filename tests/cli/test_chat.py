"""The terminal chat: sessions through a pipe, and what a person sees on a terminal of a few rows."""

import io
import random
import re
import sys

import pytest

from t3d.blocks.settings import DecodeSettings
from t3d.cli import chat
from t3d.cli.chat import FRESH, MASK, MASKED, PLAIN, Canvas, paint, wrap
from t3d.common.errors import UserError


class Screen(io.StringIO):
    """A terminal: what is written moves a cursor over rows that scroll away at the top."""

    def __init__(self, columns: int, height: int):
        super().__init__()
        self.columns, self.height = columns, height
        self.rows, self.row, self.column, self.frames = [""], 0, 0, []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for code, character in re.findall(r"(\033\[[?\d;]*[A-Za-z])|(.)", text, re.DOTALL):
            if code.endswith("A"):
                top = max(0, len(self.rows) - self.height)  # the cursor does not leave the screen
                self.row = max(top, self.row - int(code[2:-1]))
            elif code.endswith("J"):
                self.rows[self.row :] = [self.rows[self.row][: self.column]]
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
        self.frames.append(text)
        return len(text)

    def feed(self) -> None:
        self.row, self.column = self.row + 1, 0
        self.rows += [""] * (self.row + 1 - len(self.rows))


@pytest.fixture
def screen(monkeypatch):
    def make(columns: int, height: int) -> Screen:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(height))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        return Screen(columns, height)

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


def cells(text: str, style: str = PLAIN) -> list[tuple[str, str]]:
    return [(character, style) for character in text]


@pytest.mark.parametrize(
    "text, rows",
    [
        ("", [""]),
        ("one two three", ["one two", "three"]),
        ("one twos  three", ["one twos", "three"]),
        ("a\n\nb\n", ["a", "", "b", ""]),
        ("abcdefghijkl m", ["abcdefgh", "ijkl m"]),
        ("x abcdefghijkl", ["x", "abcdefgh", "ijkl"]),
        ("数学问题很难", ["数学问题", "很难"]),
    ],
)
def test_wrap(text, rows):
    wrapped = wrap(cells(text), 8)
    assert [paint(row) for row in wrapped] == rows
    assert sum(wrapped, []) == cells(text)


def test_paint_passes_no_control_characters_on():
    assert paint(cells("a\033[2Jb\r")) == "a [2Jb "
    assert (
        paint(cells("ab") + cells("c", FRESH) + cells(MASK, MASKED)) == f"ab\033[0m{FRESH}c\033[0m{MASKED}{MASK}\033[0m"
    )


@pytest.mark.parametrize("columns", [12, 31])
def test_a_text_longer_than_the_screen_is_drawn_once(screen, columns):
    """Frames of settled text and a pending tail, with other words in it each time: the screen ends as the text does."""
    rng, out = random.Random(columns), screen(columns, 5)
    words = ["".join(rng.choices("abc", k=rng.choice((1, 2, 5, 9, 17)))) for _ in range(60)]
    text = "".join(word + rng.choice((" ", " ", " ", "\n")) for word in words).rstrip()
    canvas = Canvas(out)
    for end in sorted(rng.sample(range(len(text)), 40)):
        canvas.draw(text[:end], cells(rng.choice((MASK * 4, "xyz " + MASK, " w" + MASK)), MASKED))
    canvas.draw(text)
    canvas.close()
    assert [row.rstrip() for row in out.rows] == [*(paint(row) for row in wrap(cells(text), columns - 1)), ""]


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
    argv = ("--model", story_teacher, "--student", story_teacher, "--max-token", 12, "--data-type", "plain")
    written = session(monkeypatch, io.StringIO(), QUESTION, *argv)
    assert re.search(r"\nteacher, 4 steps a block\n.*\nstudent, 1 step a block\n", written, re.DOTALL)
    assert re.search(r"\nstudent: [\d.]+x the teacher's tokens/step, [\d.]+x its tokens/s", written)


def test_flags_reach_the_decoder(story_teacher):
    given = "--strategy low_confidence_dynamic --threshold 0.5 --temperature 0.7 --top-k 5 --top-p 0.8 --self-verify"
    args = chat.parse(["--model", str(story_teacher), *given.split(), "--block-size", "8", "--max-token", "9"])
    settings = chat.load_speaker("model", args.model, 2, args).settings
    assert settings == DecodeSettings(8, 2, "low_confidence_dynamic", 0.5, 0.1, 0.7, 5, 0.8, 9, self_verify=True)
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
    answer = plain.splitlines()[2]
    assert answer in "\n".join(out.rows)


def test_blocks_are_watched_on_a_terminal(story_teacher, screen, monkeypatch):
    argv = ("--model", story_teacher, "--max-token", 22, "--temperature", 1.0)
    plain = session(monkeypatch, io.StringIO(), QUESTION, *argv).splitlines()
    out = screen(30, 6)
    session(monkeypatch, out, QUESTION, *argv)
    drawn = [frame for frame in out.frames if frame.startswith("\r") and "\033[J" in frame]
    assert any(MASKED + MASK in frame for frame in drawn) and any(FRESH in frame for frame in drawn)
    assert MASKED not in drawn[-1] and FRESH not in drawn[-1]
    answer = wrap(cells("\n".join(plain[2:-1])), 29)
    assert "\n".join(map(paint, answer)) in "\n".join(row.rstrip() for row in out.rows)


def test_no_color(story_teacher, screen, monkeypatch):
    out = screen(200, 50)
    monkeypatch.setenv("NO_COLOR", "1")
    session(monkeypatch, out, QUESTION, "--model", story_teacher, "--max-token", 8)
    assert not any("\033" in frame for frame in out.frames)


def test_ctrl_c_ends_and_gives_the_cursor_back(story_teacher, screen, monkeypatch):
    out = screen(80, 20)
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    session(monkeypatch, out, f"{QUESTION}\n{QUESTION}", "--model", story_teacher)
    text = "".join(out.frames)
    assert text.count(QUESTION) == 1 and text.rstrip().endswith("\033[?25h")


def test_mistakes_are_one_line(story_teacher, monkeypatch):
    for argv, message in [
        (("--model", "nowhere"), "--model=nowhere: no such folder"),
        (("--model", story_teacher, "--student", "nowhere"), "--student=nowhere: no such folder"),
        (("--model", story_teacher, "--steps", 5), "denoising_steps_per_block=5: a block has 4 positions"),
        (("--model", story_teacher, "--strategy", "fast"), "remasking_strategy=fast: must be one of"),
        (("--model", story_teacher, "--top-p", 0), "top_p=0.0: must be"),
        (("--model", story_teacher, "--self-verify", "--block-size", 1), "self_verify=true: a block of one token"),
    ]:
        with pytest.raises(UserError, match=message):
            session(monkeypatch, io.StringIO(), "", *argv)
    asked = f"{'apples ' * 300}\n{QUESTION}"
    written = session(monkeypatch, io.StringIO(), asked, "--model", story_teacher, "--max-token", 4)
    assert "tokens, the model 256 positions; shorten it" in written and written.count(" forwards") == 1


@pytest.mark.parametrize("first", [b"caf\xe9\n", b"\xed\xa0\x80\n"])
def test_a_question_that_is_no_text_is_told_and_the_next_one_answered(story_teacher, monkeypatch, first):
    monkeypatch.setattr(sys, "argv", ["chat", "--model", str(story_teacher), "--max-token", "4"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(first + QUESTION.encode()), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    chat.main()
    out.seek(0)
    written = out.read()
    assert "error: the question is not text in UTF-8" in written and written.count(" forwards") == 1
