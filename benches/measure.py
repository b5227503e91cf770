#!/usr/bin/env python3
"""Run a command; print its wall seconds, its peak RssAnon in MB ('-' without --rss) and its peak RSS in MB.

    measure.py [--rss] COMMAND...

RssAnon is the memory a program asked for. Pages of mapped files count in RSS too, but the kernel takes those
back when it likes, so they say nothing about how much memory a machine must have. RssAnon has no high-water
mark in the kernel, hence the polling (every 5 ms: shorter peaks escape). It disturbs the timing a little on
a small machine, so a run is either timed or watched.
"""
import os
import subprocess
import sys
import time

args = sys.argv[1:]
watch = args[:1] == ["--rss"]
start = time.perf_counter()
child = subprocess.Popen(args[watch:], stdout=subprocess.DEVNULL)
peak = 0
if watch:
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        try:
            with open(f"/proc/{child.pid}/status") as f:
                peak = max([peak] + [int(line.split()[1]) for line in f if line.startswith("RssAnon")])
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended
        time.sleep(0.005)
else:
    _, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - start
child.returncode = os.waitstatus_to_exitcode(status)
if child.returncode:
    sys.exit(f"exit status {child.returncode}: {' '.join(args[watch:])}")  # and no numbers: a failed run has none
print(f"{seconds:.4f} {peak / 1024:.1f}" if watch else f"{seconds:.4f} -", f"{usage.ru_maxrss / 1024:.0f}")
