"""PEFT's C3A and LoRA in PyTorch: the same layers, for comparison."""

from collections.abc import Callable

from benchmarks.results import Record


def layers(case: Record) -> dict[str, Callable[[], None]]:
    """PEFT's adapters alone, forward and backward, by name; none where torch or peft is absent."""
    try:
        import torch
        import torch.distributed.tensor
        from peft import C3AConfig, LoraConfig, get_peft_model
        from peft.tuners.c3a.utils import BlockCircularConvolution
    except ImportError:
        return {}
    tokens, features = case["tokens"], case["features"]
    blocks = features // case["block"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case["dtype"])
    x = torch.randn(tokens, features, dtype=dtype, device=device, requires_grad=True)
    g = torch.randn(tokens, features, dtype=dtype, device=device)

    def adapted(config) -> torch.nn.Module:
        base = torch.nn.Sequential(torch.nn.Linear(features, features, bias=False))
        return get_peft_model(base, config).base_model.model[0].to(device)

    lora = adapted(LoraConfig(r=8, target_modules=["0"])).to(dtype)
    a, b = lora.lora_A["default"], lora.lora_B["default"]
    functions = {"peft lora": lambda: b(a(x))}
    # With more blocks than this, one run takes a minute.
    if device == "cuda" or tokens * features * blocks <= 2**28:
        c3a = adapted(C3AConfig(block_size=case["block"], target_modules=["0"]))
        kernel = c3a.c3a_kernel["default"]

        def product() -> torch.Tensor:
            # As its layer does: in float32, divided by the input's width.
            y = BlockCircularConvolution.apply(x.to(torch.float32), kernel) / features
            return y.to(dtype)

        functions["peft c3a"] = product

    def run(product: Callable[[], torch.Tensor]) -> None:
        y = product()
        torch.autograd.backward(y, g)
        if device == "cuda":
            torch.cuda.synchronize()

    return {name: (lambda f=f: run(f)) for name, f in functions.items()}
