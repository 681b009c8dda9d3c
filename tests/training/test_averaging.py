"""The moving average against its recursion written out."""

import torch

from t3d.training.averaging import WeightAverage


def test_the_average_is_the_recursion_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)).to(torch.bfloat16)
    model[1].requires_grad_(False)
    average = WeightAverage(model, 0.9)
    expected = model[0].weight.detach().float().clone()
    for _ in range(5):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
        average.update()
        expected = 0.9 * expected + 0.1 * model[0].weight.detach().float()
    torch.testing.assert_close(average.state_dict()["0.weight"], expected)
    assert set(average.state_dict()) == {"0.weight", "0.bias"}, "what is not trained is not averaged"

    own, place = model[0].weight.detach().clone(), model[0].weight.data_ptr()
    with average.in_place():
        assert torch.equal(model[0].weight, expected.to(torch.bfloat16))
    assert torch.equal(model[0].weight, own) and model[0].weight.data_ptr() == place

    again = WeightAverage(model, 0.9)
    again.load_state_dict({name: value.clone() for name, value in average.state_dict().items()})
    for each in (average, again):
        each.update()
    assert torch.equal(again.state_dict()["0.weight"], average.state_dict()["0.weight"])
