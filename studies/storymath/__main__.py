"""Write StoryMath: data/StoryMath_*.json, and an untrained model (``python -m studies.storymath``)."""

from studies.domains import DOMAINS, write
from t3d.common.errors import run_main


def main() -> None:
    """The command."""
    write(DOMAINS["StoryMath"])


if __name__ == "__main__":
    run_main(main)
