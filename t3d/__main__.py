"""`python -m t3d`: the command `t3d`."""

from t3d.cli import main

if __name__ == "__main__":
    main()
