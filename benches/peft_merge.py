#!/usr/bin/env python3
"""Time the same merge in PEFT: load, merge_and_unload, save_pretrained, sync. Imports are not counted.

    peft_merge.py --base WORK/base --adapter WORK/adapter --output NEW_FOLDER

Run it inside `measure.py --rss` for the peak of RssAnon. Needs the environment of tests/peers/README.md.
"""
import argparse
import os
import resource
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never ask a hub

import peft
import torch
import transformers

p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
p.add_argument("--base", required=True)
p.add_argument("--adapter", required=True)
p.add_argument("--output", required=True)
args = p.parse_args()
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
if os.path.exists(args.output):
    p.error("the output exists: every run writes new files")

steps = [("start", time.perf_counter())]
model = transformers.AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16)
steps.append(("load base", time.perf_counter()))
model = peft.PeftModel.from_pretrained(model, args.adapter)
steps.append(("load adapter", time.perf_counter()))
model = model.merge_and_unload()
steps.append(("merge", time.perf_counter()))
model.save_pretrained(args.output, max_shard_size="1GB")  # three files, as the base has
fd = os.open(args.output, os.O_RDONLY)
for name in os.listdir(args.output):  # durable, as loratool's and the cp's output is
    file = os.open(os.path.join(args.output, name), os.O_RDONLY)
    os.fsync(file)
    os.close(file)
os.fsync(fd)
steps.append(("save and sync", time.perf_counter()))

parts = ", ".join(f"{name} {t - steps[i][1]:.2f}" for i, (name, t) in enumerate(steps[1:]))
print(f"peft {peft.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads: "
      f"{steps[-1][1] - steps[0][1]:.2f} s ({parts}); peak RSS "
      f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
