#!/usr/bin/env bash
# OpenVINO: `import openvino` alone writes an identifier and a counter into the home folder.
#
# Guess: importing a library for inference reads files and writes none; telemetry waits until a tool is used, and asks.
# Behaviour (openvino 2026.4.1, openvino-telemetry 2025.2.0, which pip brings along): the first import makes ~/intel with a
# random identifier (openvino_ga_cid) and a counter (stats), asks nothing and says nothing; later imports keep the
# identifier. Without the package openvino_telemetry nothing is written, and the rest works as before.
# Why it matters: a run that should leave nothing outside its folder does, machines of a hospital are not to have such
# identifiers, and a test that compares the home folder before and after fails for a reason that is not its own.
#
# Fails if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q openvino==2026.4.1 openvino-telemetry==2025.2.0 numpy==2.2.6
import_it() { HOME=$1 "$work/venv/bin/python" -c 'import openvino; print("openvino", openvino.__version__)'; }

mkdir "$work/with" "$work/without"
import_it "$work/with"
first=$(cat "$work/with/intel/openvino_ga_cid")
import_it "$work/with"
files=$(cd "$work/with" && find . -type f | sort | tr '\n' ' ')
echo "after two imports the home folder holds: $files"
[ "$files" = "./intel/openvino_ga_cid ./intel/stats " ]
[[ $first =~ ^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$ ]]
[ "$first" = "$(cat "$work/with/intel/openvino_ga_cid")" ]

"$work/venv/bin/pip" uninstall -q -y openvino-telemetry
import_it "$work/without"
left=$(find "$work/without" -type f | wc -l)
echo "without openvino-telemetry: $left files"
[ "$left" -eq 0 ]
