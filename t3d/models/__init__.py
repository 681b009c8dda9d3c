"""SDAR models as native transformers classes; importing this registers them with the Auto classes."""

from t3d.models.sdar import SDARConfig, SDARForCausalLM, SDARModel

__all__ = ["SDARConfig", "SDARForCausalLM", "SDARModel"]
