"""Write StoryCode: data/StoryCode_*.json, and an untrained model (``python -m studies.storycode``)."""

from studies.domains import DOMAINS, write
from t3d.common.errors import run_main


def main() -> None:
    """The command."""
    write(DOMAINS["StoryCode"])


if __name__ == "__main__":
    run_main(main)
