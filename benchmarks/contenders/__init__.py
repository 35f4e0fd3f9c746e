"""Ways to train one adapter on one sequence of batches, so that they can be timed side by side.

`workloads` makes models and batches from seeds, without torch; `rivals` trains as Hugging Face,
PEFT and bitsandbytes do, `ours` as a device of fedtune does; `worker` is a process that holds one
of them and steps when it is told to.
"""
