"""SDAR models as native transformers classes; importing this registers them with the Auto classes."""

from t3d.models.block_diffusion import SDARConfig, SDARForCausalLM, SDARModel

__all__ = ["SDARConfig", "SDARForCausalLM", "SDARModel"]
