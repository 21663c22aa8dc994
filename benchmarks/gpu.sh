#!/usr/bin/env bash
# Build, test, check and time edlm on a machine with a GPU, offline, in less than nine minutes:
#
#   benchmarks/gpu.sh                        results under benchmarks/results/<the GPU's name>/
#   OUT=folder benchmarks/gpu.sh             results there
#   STEPS="build bench" benchmarks/gpu.sh    some of the steps: build check bench tests memcheck racecheck ncu
#
# Also from the environment: PYTHON (one that has torch, pytest, cmake, ninja, pybind11 and scikit-build-core; default python3), ARCH
# (for CMake, such as 90; default: the GPU's own), BENCH (options of `edlm bench ops`), and <STEP>_S, a step's limit in seconds.
# A step goes on if an earlier one failed. Exit status: 0 where every step passed or had no tool to run with, 1 otherwise.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-build check bench tests memcheck racecheck ncu}
BENCH=${BENCH:---memory}
# 520 s together, and 10 s where a step has to be killed.
: "${BUILD_S:=110}" "${CHECK_S:=25}" "${BENCH_S:=130}" "${TESTS_S:=130}" "${MEMCHECK_S:=45}" "${RACECHECK_S:=45}" "${NCU_S:=35}"

if ! gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null); then
  echo "gpu.sh: torch of $PYTHON can use no GPU here" >&2
  exit 2
fi
name=$(tr '[:upper:]' '[:lower:]' <<<"$gpu" | tr -cs 'a-z0-9\n' '-' | sed 's/^-*//; s/-*$//')
ARCH=${ARCH:-$("$PYTHON" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')}
out=${OUT:-benchmarks/results/$name}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
ops_json=$out/$(date +%F)-ops.json
rm -f "$out"/{build,check,bench,tests,ncu}.log "$out"/summary.{json,md} "$ops_json"

# Not a virtual environment: where python is one itself, another would not see its torch. Kept between runs, as CMake's folder is.
site=$PWD/build/gpu-site
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH PYTHONUNBUFFERED=1

steps=$(mktemp) || exit 2
trap 'rm -f "$steps"' EXIT
failed=0

wanted() { [[ " $STEPS " == *" $1 "* ]]; }

# record STEP STATUS SECONDS NOTE
record() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4//$'\t'/ }" >>"$steps"
  printf '%-10s %-8s %4s s  %s\n' "$1" "$2" "$3" "$4"
  [[ $2 == failed ]] && failed=1
  return 0
}

# find_tool NAME: on PATH, or where the toolkit and the profiler are installed
find_tool() {
  command -v "$1" && return
  local path
  for path in "${CUDA_HOME:-/usr/local/cuda}"/bin/"$1" /opt/nvidia/nsight-compute/*/"$1"; do
    [[ -x $path ]] && echo "$path" && return
  done
  return 1
}

# step STEP LIMIT LOG REFUSED COMMAND...: REFUSED matches what a tool prints where this machine does not let it work.
# An interrupt first: pytest then tells what has failed so far, and the benchmark keeps what it has measured.
step() {
  local step=$1 limit=$2 log=$3 refused=$4 begin=$SECONDS status=passed note='' rc
  shift 4
  wanted "$step" || return 0
  printf '\n== %s: %s\n' "$step" "$*" >>"$log"
  local from
  from=$(wc -l <"$log")
  timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  rc=$?
  if ((rc != 0)); then
    status=failed note="exit status $rc"
    ((rc == 124 || rc == 137)) && note="stopped after $limit s"
    local why=''
    [[ -n $refused ]] && why=$(tail -n "+$from" "$log" | grep -m1 -E "$refused")
    [[ -n $why ]] && status=skipped note=$why
  fi
  record "$step" "$status" $((SECONDS - begin)) "$note"
  [[ $status == failed ]] && tail -n 8 "$log" | sed 's/^/    /'
  return 0
}

step build "$BUILD_S" "$out/build.log" '' \
  "$PYTHON" -m pip install --disable-pip-version-check --no-index --no-build-isolation --no-deps --upgrade --target "$site" -v . \
  -C cmake.define.EDLM_CUDA=ON -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$ARCH"

# An editable installation comes before any path: what follows would try another build.
found=$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("edlm").submodule_search_locations[0])' 2>/dev/null)
[[ $found == "$site/edlm" ]] || record import failed 0 "$PYTHON finds edlm at ${found:-no place}, not at $site/edlm"

step check "$CHECK_S" "$out/check.log" '' "$PYTHON" -m edlm.benchmarks.gpu_check

# shellcheck disable=SC2086  # BENCH is a list of options
step bench "$BENCH_S" "$out/bench.log" '' \
  "$PYTHON" -c 'from edlm.cli import main; raise SystemExit(main())' bench ops --device cuda --json "$ops_json" $BENCH

# A file stays with one process, for its fixtures may compile.
spread=()
"$PYTHON" -c 'import xdist' 2>/dev/null && spread=(-n 8 --dist loadfile)
step tests "$TESTS_S" "$out/tests.log" '' "$PYTHON" -m pytest tests -q -rf -p no:cacheprovider ${spread[@]+"${spread[@]}"}

# Without torch's cache every tensor is an allocation of its own, past whose end memcheck can see. What torch itself asks the driver
# in vain, as it does at its start, is no error of ours.
if sanitizer=$(find_tool compute-sanitizer); then
  for tool in memcheck racecheck; do
    limit=${tool^^}_S every=1
    [[ $tool == racecheck ]] && every=3 # it watches every access to shared memory
    step "$tool" "${!limit}" "$out/check.log" 'Device not supported|Unable to (find|attach)' \
      env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 9 --print-limit 20 \
      "$PYTHON" -m edlm.benchmarks.gpu_check --every "$every"
  done
else
  for tool in memcheck racecheck; do
    wanted "$tool" && record "$tool" skipped 0 "compute-sanitizer is not installed"
  done
fi

metrics=dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum,launch__registers_per_thread
metrics+=,launch__grid_size,launch__block_size,sm__warps_active.avg.pct_of_peak_sustained_active
if ncu=$(find_tool ncu); then
  step ncu "$NCU_S" "$out/ncu.log" 'ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize' \
    "$ncu" --profile-from-start off --clock-control none --csv --page raw --metrics "$metrics" \
    "$PYTHON" -m edlm.benchmarks.gpu_check --profile
else
  wanted ncu && record ncu skipped 0 "ncu is not installed"
fi

"$PYTHON" - "$steps" "$out" "$gpu" "$ARCH" "$SECONDS" <<'END'
import csv, json, platform, subprocess, sys, time
import torch

steps_file, out, gpu, arch, seconds = sys.argv[1:]
keys = ("name", "status", "seconds", "note")
with open(steps_file) as file:
    steps = [dict(zip(keys, row)) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
for step in steps:
    step["seconds"] = int(step["seconds"])


def read(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


try:
    import edlm

    version = edlm.__version__
except ImportError:
    version = None
versions = {"edlm": version, "torch": torch.__version__, "cuda": torch.version.cuda, "nvcc": read("nvcc", "--version")}
versions |= {"driver": read("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"), "python": platform.python_version()}
summary = {"gpu": gpu, "architecture": arch, "date": time.strftime("%Y-%m-%d"), "versions": versions, "seconds": int(seconds)}
with open(f"{out}/summary.json", "w") as file:
    json.dump(summary | {"steps": steps}, file, indent=1)
lines = [f"{gpu}, " + ", ".join(f"{key} {value}" for key, value in versions.items()), "", "| step | status | s | |", "|---|---|---|---|"]
lines += ["| " + " | ".join(str(step[key]).replace("|", "\\|") for key in keys) + " |" for step in steps]
with open(f"{out}/summary.md", "w") as file:
    file.write("\n".join(lines) + "\n")
print("\n" + "\n".join(lines))
END
# shellcheck disable=SC2181  # the status of the lines above
(($? == 0)) || failed=1

[[ -f $out/bench.log ]] && sed -n '/^Verdict/,$p' "$out/bench.log"
[[ -f $out/tests.log ]] && tail -n 3 "$out/tests.log"
exit "$failed"
