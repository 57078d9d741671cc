#!/bin/sh
# Flame graphs (SVG) of a node of a running lab: its supervisor, and its busiest worker with the compiled frames.
#
#     appliance lab up --instances 1    # with more, the connections of one iperf3 meet different servers
#     appliance lab exec client1 -- iperf3 -c 10.30.30.30 -p 5201 -t 60 &
#     perf/profile.sh [LAB] [NODE] [SECONDS] [DIRECTORY]
#
# py-spy reads the processes from outside: they are not slowed down but for the pauses at each sample. In a worker all
# time is in one Python frame, `work`; --native shows what is compiled and the system calls below it. Where the machine has
# perf(1) with hardware counters, they are recorded too; a virtual machine often has none.
set -eu
lab=${1:-lab} node=${2:-node1} seconds=${3:-10} into=${4:-.cache/perf/profile}
files=/run/edge-lab/$lab/$node
test -f "$files/appliance.pid" || { echo "$files: expected a lab that is up (appliance lab up)" >&2; exit 1; }
bin=$(dirname "$0")/../.venv/bin
python=$bin/python spy=$bin/py-spy
test -x "$spy" || { echo "$spy: expected to be installed: make venv" >&2; exit 1; }
supervisor=$(sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' "$files/appliance.pid")

workers() {
    "$python" -c 'import sys; from appliance.lab import lifecycle
lab = lifecycle.opened(sys.argv[1])
print(*(worker["pid"] for worker in lab.api(lab.host(sys.argv[2])).status()["workers"]))' "$lab" "$node"
}

busiest() { # the worker that used most processor time in the last second
    before=$(for pid in $(workers); do echo "$pid $(used "$pid")"; done)
    sleep 1
    echo "$before" | while read -r pid ticks; do echo "$(($(used "$pid") - ticks)) $pid"; done |
        sort -rn | head -n 1 | cut -d ' ' -f 2
}

used() { # clock ticks, utime and stime of proc(5)
    sed 's/.*) //' /proc/"$1"/stat | awk '{print $12 + $13}'
}

mkdir -p "$into"
worker=$(busiest)
"$spy" record --pid "$supervisor" --duration "$seconds" --idle --output "$into/supervisor.svg" &
"$spy" record --pid "$worker" --duration "$seconds" --native --output "$into/worker.svg"
wait
if command -v perf > /dev/null && ! perf stat -e cycles true 2>&1 | grep -q 'not supported'; then
    perf stat --pid "$worker" -e cycles,instructions,cache-misses,branch-misses -- sleep "$seconds" 2> "$into/worker.txt"
else
    echo "hardware counters: not recorded, this machine has none or no perf(1)" >&2
fi
ls "$into"/*
