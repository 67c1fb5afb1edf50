#!/usr/bin/env bash
# Trains the demo checkpoint: runs side by side on one GPU that differ in their weight decay, of which the one with the
# lowest loss on valid.txt is kept. Usage, in the repository's root, after `python examples/prepare_text.py`:
#     bash examples/train_demo.sh FOLDER [further options of train_language_model.py]
#     DECAYS="2 4" bash examples/train_demo.sh FOLDER --steps 2400
# FOLDER/demo then holds all that goes into hf_mamba/demo, FOLDER/log.txt the logs.
set -euo pipefail
folder=${1:?name the folder to write into}
shift
read -r -a decays <<<"${DECAYS:-0.1 0.4 1.2}"
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1
pids=()
for decay in "${decays[@]}"; do
    "${PYTHON:-python3}" examples/train_language_model.py --output_dir "runs/demo-$decay" --overwrite --weight_decay "$decay" \
        --model_name hf-mamba-demo --card_model "hf_mamba.demo_checkpoint()" --max_minutes 6 --steps 7000 \
        --card_note "Chosen by the loss on valid.txt from runs with a weight decay of ${decays[*]}." \
        "$@" >"runs-demo-$decay.log" 2>&1 &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
mkdir -p "$folder"
for decay in "${decays[@]}"; do
    echo "== weight decay $decay"
    tr '\r' '\n' <"runs-demo-$decay.log" | grep -v -E '^ *[0-9]+%\||^$' || true
    rm "runs-demo-$decay.log"
done >"$folder/log.txt"
tail -n 12 "$folder/log.txt"
[ "$failed" = 0 ] || { echo "a run failed: see $folder/log.txt" >&2; exit 1; }
"${PYTHON:-python3}" - "$folder/demo" "${decays[@]}" <<'PYTHON'
import json
import pathlib
import shutil
import sys

target, *decays = sys.argv[1:]
figures = {}
for decay in decays:
    report = json.loads(pathlib.Path(f"runs/demo-{decay}/training_report.json").read_text())
    figures[decay] = report["results"]["valid"]["bits_per_byte"]
    print(f"weight decay {decay}: valid {figures[decay]:.4f}, test {report['results']['test']['bits_per_byte']:.4f} bits/byte,"
          f" step {report['best_step']} of {report['steps']}, {report['training_seconds']} s")
best = min(figures, key=figures.get)
shutil.copytree(f"runs/demo-{best}", target, dirs_exist_ok=True)
print(f"kept weight decay {best}: {target}, {sum(f.stat().st_size for f in pathlib.Path(target).iterdir()):,} bytes")
PYTHON
