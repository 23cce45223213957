from pathlib import Path
def test_mem():
    for l in Path("/proc/self/status").read_text().splitlines():
        if l.startswith(("VmRSS","VmHWM")): print(l.strip())
