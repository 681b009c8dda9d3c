"""lm-evaluation-harness's own command line with the model ``t3d_sdar`` in its registry.

``python -m t3d.integrations.lm_eval ...`` takes the arguments of ``lm_eval`` and works with every release. Releases
that look for models in installed packages (entry-point group "lm_eval.models") find the model without this module.
"""

from t3d.common.errors import UserError, run_main

NAME, TARGET = "t3d_sdar", "t3d.integrations.lm_eval.model:SDARHarness"


def command_line() -> None:
    """The harness's own command line, with our model registered."""
    try:
        import lm_eval.models  # noqa: F401 - fills the registry, from installed packages too where it can
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        raise UserError(f"lm_eval: {error}; pip install -e '.[lm-eval]' in the repository's root", "lm_eval") from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
    cli_evaluate()


def main() -> None:
    """The command."""
    run_main(command_line)


if __name__ == "__main__":
    main()
