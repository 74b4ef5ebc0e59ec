#!/usr/bin/env bash
# A ViT on 5,000 real images: trained dense, then trained and compressed in one run, then loaded in a fresh process.
#
#   bash scripts/quickstart.sh          ends with a table, and the same figures in outputs/quickstart/report.json
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
make_venv .venv quickstart

# Threads that wait without spinning: small models on a busy machine are many times faster so.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
config=configs/vit_tiny-mnist5k-w4a8-s50.yaml
out=outputs/quickstart
run() { "$PYTHON" scripts/run_image_classification.py --config "$config" "$@"; }

"$PYTHON" scripts/write_mnist5k.py "$out/data"
echo "1/3  Train the dense model"
run --compress false --output_dir "$out/dense"
echo "2/3  Train the same model for as many steps, pruned and quantized on the way"
run --output_dir "$out/compressed"
echo "3/3  Load the compressed model in a fresh process"
run --do_train false --model_name_or_path "$out/compressed" --output_dir "$out/loaded"
echo
"$PYTHON" scripts/compare_reports.py "$out/dense" "$out/loaded" "$out/report.json"
echo
echo "The compressed model: $out/compressed    These figures: $out/report.json"
