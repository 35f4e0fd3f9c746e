def warm():
    import torch, gc, numpy as np, threading
    from transformers import LlamaConfig, LlamaForCausalLM
    from planned.worker import rss

    print(rss())
    cfg = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
        pad_token_id=0,
    )
    m = LlamaForCausalLM(cfg)
    print("model", rss())
    from contenders.ours import quantise
    from contenders.workloads import Sample
    from fedtune.records import DevicePlan, MatrixPlan, MatrixForm, Dispatch, LoraFactors
    from fedtune.train.round import train_round
    from fedtune.wire.messages import OptimizerSpec

    names = [
        n for n, mod in m.named_modules() if isinstance(mod, torch.nn.Linear) and "layers" in n
    ]
    b = quantise(m, names, MatrixForm("nf4", 64))
    rng = np.random.default_rng(0)
    sent = Dispatch(
        {
            n: LoraFactors(
                rng.standard_normal((4, l.in_features)).astype(np.float32),
                np.zeros((l.out_features, 4), np.float32),
            )
            for n, l in b.layers.items()
        }
    )
    plan = DevicePlan("d", tuple(MatrixPlan(n, 4, "nf4", 0, 64) for n in b.layers), 2, 2, 16, 1)
    s = [Sample(rng.integers(3, 256, 64).astype(np.int32), np.ones(64, bool)) for _ in range(2)]
    train_round(b, [s], sent, plan, OptimizerSpec(), task="causal-lm", pad_id=0)
    print("step", rss())
    del b, m
    gc.collect()
    from fedtune.kernels.workspace import release_workspaces

    release_workspaces()
    print("gone", rss())


def tensor_peak(run):
    import numpy as np
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())
