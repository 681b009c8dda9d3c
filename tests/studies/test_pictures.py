"""The picture of the decode settings."""

from studies.storymath import pictures
from t3d.data.trajectory import Trajectory


def test_a_step_counts_from_its_block_on():
    """A prompt of 3 in blocks of 4: the first answer token ends the prompt's block. A step may unmask nothing."""
    trajectory = Trajectory(
        id="a/0/0",
        prompt_ids=[5, 6, 7],
        response_ids=[8, 8, 8, 8, 8],
        unmask_step=[1, 4, 2, 2, 3],
        length=5,
        block_size=4,
        finish_reason="length",
    )
    assert pictures.steps_of_blocks(trajectory) == [1, 3, 1, 1, 2]


def test_it_shows_every_setting(tmp_path, monkeypatch, capsys):
    image = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["pictures", "--output", str(image)])
    pictures.main()
    assert image.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == list(pictures.SETTINGS)
    assert shown[0].endswith("\\boxed{35}.") and not shown[2].endswith("\\boxed{35}.")
