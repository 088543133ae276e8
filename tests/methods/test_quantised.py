"""Every method on a quantised base."""

import pytest
import torch
from contract import (
    Net,
    adapt,
    every_method,
    largest,
    layers_of,
    train,
    wander,
)
from torch import nn

from inlay.methods.bone import Bone

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


def quantised(bits: int, shape: tuple[int, int]) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    net = Net(shape)
    if bits == 4:
        layer = bnb.nn.Linear4bit(shape[1], shape[0], quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(shape[1], shape[0], has_fp16_weights=False)
    layer.load_state_dict(net.layer.state_dict())
    try:
        net.layer = layer.to("cpu")
        with torch.no_grad():
            net(torch.zeros(1, shape[1]))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes has no {bits}-bit CPU kernels here: {error}")
    return net


@every_method
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(row, bits):
    net, x = quantised(bits, (64, 64)), torch.randn(7, 64)
    with torch.no_grad():
        before = net(x)
    packed = net.layer.weight.detach().clone()
    assert packed.dtype in (torch.uint8, torch.int8)
    model = adapt(net, row.method)
    assert torch.equal(model(x), before) != row.method.departs
    losses = train(model, x, steps=4)
    assert losses[-1] < losses[0]
    trained = model(x).detach()
    assert largest(trained - before) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    assert torch.equal(layers_of(model)[0].base_layer.weight, packed)


@pytest.mark.filterwarnings("ignore:Merge")
@every_method
@pytest.mark.parametrize("bits", [4, 8])
def test_merging_into_a_quantised_base_and_back(row, bits):
    model, x = adapt(quantised(bits, (64, 64)), row.method), torch.randn(7, 64)
    wander(model, 0.5)
    with torch.no_grad():
        with model.disable_adapter():
            before = model(x)
        adapted = model(x)
        for _ in range(2):
            model.merge_adapter()
            assert largest(model(x) - adapted) < 0.5 * largest(before - adapted)  # it is quantised again
            model.unmerge_adapter()
            assert torch.equal(model(x), adapted)
        with model.disable_adapter():
            assert torch.equal(model(x), before)


@every_method
@pytest.mark.parametrize("bits", [4, 8])
def test_an_inference_pass_does_not_change_what_is_read_of_a_quantised_weight(row, bits):
    """On some CPUs bitsandbytes repacks a 4-bit weight at the first inference pass."""
    net, x = quantised(bits, (64, 64)), torch.randn(7, 64)
    model = adapt(net, row.method)
    wander(model, 0.02)
    layer = layers_of(model)[0]
    W, delta = layer.matrix().float(), layer.get_delta_weight("default")
    model.eval()
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(layer.matrix().float(), W, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(layer.get_delta_weight("default").float(), delta.float(), rtol=0.02, atol=2e-3)


def test_a_4_bit_weight_that_bitsandbytes_misreads_is_named():
    net = quantised(4, (64, 96))
    with pytest.warns(UserWarning, match="96 is no multiple of its block of 64"):
        adapt(net, Bone(r=4))
