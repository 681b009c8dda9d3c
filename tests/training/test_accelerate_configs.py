"""The shipped launch configurations: accelerate reads each, and they leave to training what training decides."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import ComputeEnvironment, DistributedType

from tests.conftest import ROOT

FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
STAGES = {"deepspeed_zero1": 1, "deepspeed_zero2": 2, "deepspeed_zero3": 3, "1_node_8_gpus_deepspeed_zero1": 1}
STAGES |= {"2_cpu_processes_deepspeed_zero1": 1}


def test_the_names_of_the_documentation_are_there():
    names = {path.stem for path in FILES}
    assert names >= STAGES.keys() | {"cpu", "1_gpu", "1_node_8_gpus", "2_cpu_processes"}
    assert {name for name in names if "zero" in name} == STAGES.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_loads(path):
    config = load_config_from_file(str(path))  # unknown keys are errors
    assert config.compute_environment == ComputeEnvironment.LOCAL_MACHINE
    assert config.mixed_precision == "no", "training.mixed_precision decides"
    cpu = "cpu" in path.stem
    assert config.use_cpu == cpu
    if path.stem in STAGES:
        assert config.distributed_type == DistributedType.DEEPSPEED
        settings = config.deepspeed_config
        assert settings["zero_stage"] == STAGES[path.stem] and settings["gradient_accumulation_steps"] == 1
        assert settings["gradient_clipping"] == "auto", "experiment.max_grad_norm decides"
    else:
        several = config.num_processes > 1
        assert config.distributed_type == (DistributedType.MULTI_GPU if several else DistributedType.NO)
